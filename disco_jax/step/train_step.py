"""One update: both towers, the loss over the mesh, gradients, optimizer. Pure, and jitted once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from disco_jax.mesh import batch_sharding, replicated
from disco_jax.models import CLIPConfig, Params
from disco_jax.step.gradients import (
    by_microbatches,
    make_model_fns,
    share_too_long,
    whole_batch,
)
from disco_jax.step.labels import SAMPLES, labels_of
from disco_jax.step.optimizer import clamp_logit_scale, make_optimizer, make_schedule
from disco_jax.step.scopes import OPTIMIZER
from disco_jax.step.state import TrainState, abstract_state, trained, with_trained

Array = jax.Array
Metrics = dict[str, Array]
StepFn = Callable[[TrainState, dict[str, Any]], tuple[TrainState, Metrics]]


def make_train_step(config: ConfigDict, model: CLIPConfig, mesh: Mesh) -> StepFn:
    """Returns the jitted step of `config` on `mesh`: (state, batch) -> (state, metrics).

    The batch contains uint8 `images` `[B, h, w, 3]` and int32 `tokens` `[B, context_length]`,
    sharded over the mesh, and what `labels_of` reads. The state is donated: don't use the one
    passed in again. Metrics are fp32 scalars: `train/loss`, `train/logit_scale` (the factor),
    `train/grad_norm`, `train/learning_rate`, and `train/skipped`, which is 1 if loss or gradients
    were not finite and the update was skipped. With text groups, `train/long_texts` is the share of
    the texts that were processed at full length because a device's (micro)batch did not fit its
    groups.

    Raises:
      ValueError: if the config contains an unknown name, or sizes do not fit the mesh.
    """
    fns = make_model_fns(config, model, mesh)
    make_gradient = by_microbatches if config.microbatch else whole_batch
    update = make_update(config, model)

    gradient = make_gradient(config, fns, model, mesh)

    def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        samples, labels = {k: batch[k] for k in SAMPLES}, labels_of(config, batch, mesh)
        loss, grads = gradient(state.params, samples, state.step, labels)
        state, metrics = update(state, loss, grads)
        if fns.groups:
            metrics["train/long_texts"] = share_too_long(fns.groups, batch, mesh)
        return state, metrics

    shardings = state_shardings(config, model, mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def batches_on_devices(config: ConfigDict) -> int:
    """Returns how many batches of images the devices hold, for the loop and the planner.

    Two by default: the next batch is sent while a step runs, which hides the transfer. One with
    microbatches: such a step takes long compared to the transfer, and its images may fill most of
    the device memory. (With images in host memory, `microbatch_mode = "host"`, the devices hold two
    microbatches: step/host_step.py.)
    """
    return 1 if config.microbatch else 2


def make_update(
    config: ConfigDict, model: CLIPConfig
) -> Callable[[TrainState, Array, Params], tuple[TrainState, Metrics]]:
    """Returns (state, loss, gradients) -> (state, metrics), the optimizer's part of a step."""
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    # SigLIP's scale is not clamped: its published models exceed CLIP's bound.
    clamp = clamp_logit_scale if config.loss.kind == "softmax" else lambda params: params

    @jax.named_scope(OPTIMIZER)
    def update(state: TrainState, loss: Array, grads: Params) -> tuple[TrainState, Metrics]:
        changing = trained(model, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, changing)
        changed = clamp(optax.apply_updates(changing, updates))
        grad_norm = optax.tree.norm(grads)
        # Skip updates that are not finite: they would stay in the parameters forever.
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        changed, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (changed, opt_state),
            (changing, state.opt_state),
        )
        # The schedule counts the steps of the run, including skipped ones.
        opt_state = optax.tree.set(opt_state, of_schedule, count=state.step + 1)
        params = with_trained(model, state.params, changed)
        metrics = {
            "train/loss": loss,
            "train/logit_scale": jnp.exp(params["logit_scale"]),
            "train/grad_norm": grad_norm,
            "train/learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "train/skipped": jnp.where(good, 0.0, 1.0),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return update


def of_schedule(path: tuple[Any, ...], value: Any) -> bool:
    """Whether an entry of the optimizer state is the update count of the schedule."""
    return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"


def state_shardings(config: ConfigDict, model: CLIPConfig, mesh: Mesh) -> TrainState:
    """Returns the sharding of each array of the state."""
    state = abstract_state(model, make_optimizer(config), mesh)
    return jax.tree.map(lambda x: x.sharding, state)
