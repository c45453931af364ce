"""DisCo-JAX: distributed contrastive training of CLIP models, exact and linear in memory."""

__version__ = "0.1.0"


def load(path, batch_size: int = 64):  # type: ignore[no-untyped-def]
    """The model at `path`, to encode and classify with: see `disco_jax.inference.load`."""
    from disco_jax import inference  # here: `import disco_jax` alone starts no JAX

    return inference.load(path, batch_size)
