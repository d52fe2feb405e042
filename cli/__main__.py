"""`python -m raylign.cli` is `raylign`."""

from .main import main

main()
