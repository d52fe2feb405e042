"""A sweep: the same recipe with other values of some keys, each trial an ordinary run, the worse ones ended early."""
