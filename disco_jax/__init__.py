"""DisCo-JAX: distributed contrastive training of CLIP models, exact and linear in memory."""

__version__ = "0.2.0"


def load(path, batch_size: int = 64):  # type: ignore[no-untyped-def]
    """Loads the model at `path` for encoding and classifying; see `disco_jax.inference.load`."""
    from disco_jax import inference  # lazy: `import disco_jax` alone does not import JAX

    return inference.load(path, batch_size)
