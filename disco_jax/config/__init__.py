"""Configuration: fields and defaults, validation, command-line overrides."""

from disco_jax.config.defaults import default, flatten, zeroshot_set

__all__ = ["default", "flatten", "zeroshot_set"]
