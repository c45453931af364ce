"""What training carries from step to step, and how it comes to be on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from disco_jax.mesh import batch_sharding, state_sharding
from disco_jax.models import CLIP, CLIPConfig, Params

# A tower's parameters behind its blocks, trained with the last of them.
AFTER_BLOCKS = ("ln_post", "pool", "ln_final", "proj", "proj_bias")


class TrainState(NamedTuple):
    """Updates done, the parameters as a nested dict, and the optimiser's state.

    Parameters that are not trained are in `params`, and have no part in `opt_state`.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState


def trained(config: CLIPConfig, params: Params) -> Params:
    """The parameters that training changes: all, unless a tower's `trained_blocks` says otherwise.

    Of a tower of which only the last blocks are trained: those, cut off the stack, and what
    follows them. Of one with 0 (LiT, Zhai et al., 2022): nothing.
    """
    kept = dict(params)
    for tower, blocks in _partly_trained(config, params):
        kept.pop(tower)
        if blocks:
            after = {k: v for k, v in params[tower].items() if k in AFTER_BLOCKS}
            stack = jax.tree.map(lambda x, n=blocks: x[-n:], params[tower]["transformer"])
            kept[tower] = after | {"transformer": stack}
    return kept


def with_trained(config: CLIPConfig, params: Params, changed: Params) -> Params:
    """`params` with what `trained` gave of them replaced by `changed`."""
    merged = params | changed
    for tower, blocks in _partly_trained(config, params):
        merged[tower] = params[tower]
        if blocks:
            stack = jax.tree.map(
                lambda old, new, n=blocks: jnp.concatenate([old[:-n], new]),
                params[tower]["transformer"],
                changed[tower]["transformer"],
            )
            merged[tower] = params[tower] | changed[tower] | {"transformer": stack}
    return merged


def _partly_trained(config: CLIPConfig, params: Params) -> list[tuple[str, int]]:
    towers = {"visual": config.vision.trained_blocks, "text": config.text.trained_blocks}
    return [(name, n) for name, n in towers.items() if n >= 0 and name in params]


def _init(config: CLIPConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    params = nnx.to_pure_dict(nnx.state(CLIP(config, rngs=nnx.Rngs(seed)), nnx.Param))
    return TrainState(jnp.int32(0), params, optimizer.init(trained(config, params)))


def abstract_state(
    config: CLIPConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state as shapes with shardings: to restore into, to compile for, to initialise by."""
    shapes = jax.eval_shape(lambda: _init(config, optimizer, 0))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=state_sharding(mesh, x.shape)),
        shapes,
    )


def abstract_batch(config: CLIPConfig, batch_size: int, mesh: Mesh) -> dict[str, Any]:
    """A training batch as shapes with shardings."""
    size, length = config.vision.image_size, config.text.context_length
    rows = batch_sharding(mesh)
    return {
        "images": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8, sharding=rows),
        "tokens": jax.ShapeDtypeStruct((batch_size, length), jnp.int32, sharding=rows),
    }


def init_state(
    config: CLIPConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """A new state, made where it belongs: no device ever holds more than its share."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, optimizer, mesh))
    return jax.jit(lambda: _init(config, optimizer, seed), out_shardings=shardings)()
