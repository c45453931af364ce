"""The configuration: its fields and their defaults, validation, command-line overrides."""

from disco_jax.config.defaults import default, flatten, zeroshot_set

__all__ = ["default", "flatten", "zeroshot_set"]
