"""Benchmarks against peers: `python -m benchmarks NAME` from the root of the repository, or `make bench NAME=…`."""
