"""`shapes`: drawn scenes with captions, the data set that comes with the library."""

from disco_jax.data.shapes.builder import Shapes

__all__ = ["Shapes"]
