"""One update: both towers, the loss over the mesh, gradients, AdamW. Pure, and jitted once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from disco_jax.losses import contrastive_loss
from disco_jax.mesh import batch_sharding, replicated
from disco_jax.models import CLIPConfig
from disco_jax.models.clip import MAX_LOGIT_SCALE
from disco_jax.training.optimizer import make_optimizer, make_schedule
from disco_jax.training.state import Params, TrainState, abstract_model, abstract_state

Array = jax.Array
Metrics = dict[str, Array]
StepFn = Callable[[TrainState, dict[str, Array]], tuple[TrainState, Metrics]]


def make_train_step(config: ConfigDict, model: CLIPConfig, mesh: Mesh) -> StepFn:
    """The jitted step of `config` on `mesh`: (state, batch) to (state, metrics).

    The batch holds uint8 `images` `[B, h, w, 3]` and int32 `tokens` `[B, context_length]`, split
    over the mesh. The state is donated: the one passed in is gone. Metrics are fp32 scalars.
    """
    graph, _ = abstract_model(model)
    optimizer, schedule = make_optimizer(config), make_schedule(config)

    def loss_fn(params: Params, batch: dict[str, Array]) -> Array:
        clip = nnx.merge(graph, params)
        return contrastive_loss(
            clip.encode_image(batch["images"]),
            clip.encode_text(batch["tokens"]),
            jnp.exp(clip.logit_scale[...]),
            clip.logit_bias[...] if config.loss.kind == "sigmoid" else None,
            mesh=mesh,
            kind=config.loss.kind,
            method=config.loss.method,
        )

    def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = clamp_logit_scale(optax.apply_updates(state.params, updates))
        metrics = {
            "train/loss": loss,
            "train/logit_scale": jnp.exp(params["logit_scale"]),
            "train/grad_norm": optax.tree.norm(grads),
            "train/learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer, mesh))
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def clamp_logit_scale(params: dict[str, Any]) -> dict[str, Any]:
    """The scale kept within [1, 100], as CLIP's authors found necessary (section 2.5)."""
    return params | {"logit_scale": jnp.clip(params["logit_scale"], 0.0, MAX_LOGIT_SCALE)}
