"""Checks on the devices of this machine what the documentation claims: `make gpu-check`."""
