"""DisCo-JAX: distributed contrastive training of CLIP models, exact and linear in memory."""

__version__ = "0.1.0"
