"""Tests; helpers that several of them use are in conftest.py and in losses_common.py."""
