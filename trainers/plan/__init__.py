"""What a recipe will need, before it costs anything: memory by item and role, steps, tokens, disk and time.

From a model's `config.json` alone; no weights and no data are read.
"""
