"""Keeps samples with equal captions from being each other's negatives.

Datasets repeat captions, and a large batch holds several samples of the same one. The loss takes
IDs of groups in which no sample is another's negative. Here they are made from the tokens, inside
the step, so that they hold across all devices and microbatches.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from disco_jax.mesh import replicated
from disco_jax.models import Params
from disco_jax.step.gradients import Features, ModelFns, batch_loss

Array = jax.Array


def group_ids(tokens: Array, mesh: Mesh) -> Array:
    """Returns int32 `[B]`, equal where the rows of `tokens`, int32 `[B, n]`, are equal.

    Rows are compared by a 64-bit hash. Among 65,536 different rows, the probability that any two
    are mistaken for equal is 1e-10.
    """
    hashes = lax.with_sharding_constraint(_hash(tokens), replicated(mesh))
    places = jnp.arange(len(tokens), dtype=jnp.int32)
    first, second, places = lax.sort((hashes[:, 0], hashes[:, 1], places), num_keys=2)
    begins = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    numbers = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(begins, dtype=jnp.int32)])
    return jnp.zeros_like(places).at[places].set(numbers)


def _hash(tokens: Array) -> Array:
    """Returns uint32 `[B, 2]`: random keys into which the tokens of a row are folded in order."""

    def fold(keys: Array, column: Array) -> tuple[Array, None]:
        return jax.vmap(jax.random.fold_in)(keys, column), None

    keys = jnp.broadcast_to(jax.random.key(0, impl="threefry2x32"), len(tokens))
    return jax.random.key_data(lax.scan(fold, keys, tokens.T)[0])


def with_groups(fns: ModelFns, ids: Array, config: ConfigDict, mesh: Mesh) -> ModelFns:
    """Returns `fns` with a loss in which samples of equal `ids`, `[B]`, are no negatives."""

    def loss(scalars: Params, features: Features) -> Array:
        return batch_loss(config, mesh, scalars, features, ids)

    return fns._replace(loss=loss)
