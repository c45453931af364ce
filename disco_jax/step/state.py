"""The training state, and how it is created on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from disco_jax.mesh import batch_sharding, state_sharding
from disco_jax.models import CLIP, CLIPConfig, Params
from disco_jax.step.labels import label_shapes
from disco_jax.step.optimizer import AFTER_BLOCKS


class TrainState(NamedTuple):
    """The number of updates, the parameters as a nested dict, and the optimizer state.

    Parameters that are not trained are in `params` but not in `opt_state`.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState


def trained(config: CLIPConfig, params: Params) -> Params:
    """Returns the parameters to train: all, unless a tower's `trained_blocks` says otherwise.

    If only the last blocks of a tower are trained, these are those blocks, sliced from the stack,
    and the layers after them. With `trained_blocks` 0 (LiT, Zhai et al., 2022), nothing of it is
    trained.
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
    """Returns `params` with the subset that `trained` selects replaced by `changed`."""
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


def averaged(config: CLIPConfig, state: TrainState) -> Params:
    """Returns the parameters to evaluate and export: their average, if the optimizer keeps one."""
    average = optax.tree.get(state.opt_state, "average")
    return state.params if average is None else with_trained(config, state.params, average)


def _partly_trained(config: CLIPConfig, params: Params) -> list[tuple[str, int]]:
    towers = {"visual": config.vision.trained_blocks, "text": config.text.trained_blocks}
    return [(name, n) for name, n in towers.items() if n >= 0 and name in params]


def _init(config: CLIPConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    params = nnx.to_pure_dict(nnx.state(CLIP(config, rngs=nnx.Rngs(seed)), nnx.Param))
    return TrainState(jnp.int32(0), params, optimizer.init(trained(config, params)))


def abstract_state(
    config: CLIPConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns the state as shapes with shardings, to restore, compile or initialize it."""
    shapes = jax.eval_shape(lambda: _init(config, optimizer, 0))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=state_sharding(mesh, x.shape)),
        shapes,
    )


def abstract_batch(
    config: ConfigDict, model: CLIPConfig, batch_size: int, mesh: Mesh
) -> dict[str, Any]:
    """Returns a training batch as shapes with shardings."""
    size, length = model.vision.image_size, model.text.context_length
    shapes = {
        "images": ((batch_size, size, size, 3), jnp.uint8),
        "tokens": ((batch_size, length), jnp.int32),
    }
    shapes |= label_shapes(config, batch_size)
    rows = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(*shape, sharding=rows) for name, shape in shapes.items()}


def init_state(
    config: CLIPConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """Initializes a state in its sharding: no device ever holds more than its share."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, optimizer, mesh))
    return jax.jit(lambda: _init(config, optimizer, seed), out_shardings=shardings)()
