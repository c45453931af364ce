"""Runs under real schedulers: `make cluster-check`."""
