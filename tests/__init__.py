"""Tests of DisCo-JAX. Shared helpers are in the modules without the prefix `test_`."""
