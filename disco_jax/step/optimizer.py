"""Optax optimizers by name, with CLIP's weight decay exceptions and warmup-cosine schedule."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from disco_jax.models import Params
from disco_jax.models.clip import MAX_LOGIT_SCALE

# Parameters without weight decay: gains, biases, single vectors and scalars.
UNDECAYED = frozenset(
    {"scale", "bias", "proj_bias", "class_embedding", "logit_scale", "logit_bias"}
)
# A tower's parameters after its blocks, trained together with the last blocks.
AFTER_BLOCKS = ("ln_post", "pool", "ln_final", "proj", "proj_bias")


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Linear warmup to the peak at update `warmup_steps`, then cosine decay to 0 at `num_steps`.

    As in OpenCLIP, the first update has a rate of `peak / warmup_steps`, not 0.
    """
    peak, warmup = config.optimizer.learning_rate, config.optimizer.warmup_steps
    cosine = optax.cosine_decay_schedule(peak, max(config.num_steps - warmup, 1))
    if not warmup:
        return cosine
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, cosine], [warmup])


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Returns the optimizer that the config names, between the steps that it asks for besides.

    Gradients are clipped before it; after it, updates are scaled by layer, and the parameters are
    averaged. The optimizers are:

    - `adamw`: 8 bytes of state per parameter.
    - `lion` (Chen et al., 2023): 4 bytes; needs a learning rate about 3 to 10 times smaller.
    - `adafactor` (Shazeer and Stern, 2018): factored second moment, no first; almost no state.
    - `muon` (Jordan et al., 2024): orthogonalized momentum for the blocks' matrices, 4 bytes,
      scaled so that AdamW's learning rate works (Liu et al., 2025); AdamW without decay for the
      rest.
    """
    c, rate = config.optimizer, make_schedule(config)
    if c.name == "adamw":
        optimizer = optax.adamw(
            rate, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay, mask=decay_mask
        )
    elif c.name == "lion":
        optimizer = optax.lion(rate, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, mask=decay_mask)
    elif c.name == "adafactor":
        # Built from parts because optax.adafactor does not scale its decay by the learning rate.
        optimizer = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(c.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(rate),
        )
    elif c.name == "muon":
        optimizer = optax.contrib.muon(
            rate,
            weight_decay=c.weight_decay,
            adam_b1=c.b1,
            adam_b2=c.b2,
            eps=c.eps,
            muon_weight_dimension_numbers=muon_matrices,
            consistent_rms=0.2,
        )
    else:
        raise ValueError(f"optimizer.name {c.name!r} is not one of adamw, lion, adafactor, muon")
    steps = [optimizer]
    if c.grad_clip_norm:
        steps = [optax.clip_by_global_norm(c.grad_clip_norm), optimizer]
    if c.layer_decay < 1:
        steps.append(scale_by_layer(c.layer_decay))
    if c.ema_decay:
        steps.append(average_parameters(c.ema_decay, config.loss.kind == "softmax"))
    return steps[0] if len(steps) == 1 else optax.chain(*steps)


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Scales a tower's updates by `decay` for each layer that follows (Clark et al., 2020).

    As in BEiT (Bao et al., 2022), the last block has `decay`, the first of n blocks `decay**n`, and
    embeddings `decay**(n + 1)`. Layers after the blocks and the loss's scalars have the full rate.
    """

    def scaled(updates: Params) -> Params:
        result = dict(updates)
        for tower in ("visual", "text"):
            if tower in updates:
                result[tower] = _scaled_tower(updates[tower], decay)
        return result

    return optax.stateless(lambda updates, _: scaled(updates))


def _scaled_tower(updates: Params, decay: float) -> Params:
    depth = len(jax.tree.leaves(updates["transformer"])[0])  # blocks are stacked
    factors = decay ** jnp.arange(depth, 0, -1, dtype=jnp.float32)

    def of_block(x: jax.Array) -> jax.Array:
        return x * factors.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)

    result = {}
    for name, part in updates.items():
        if name == "transformer":
            result[name] = jax.tree.map(of_block, part)
        elif name in AFTER_BLOCKS:
            result[name] = part
        else:
            result[name] = jax.tree.map(lambda x: x * decay ** (depth + 1), part)
    return result


class Average(NamedTuple):
    """The state of `average_parameters`."""

    updates: jax.Array  # so far
    average: Params


def average_parameters(decay: float, clamp: bool) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters, which must come last in a chain.

    The decay of update n, counted from 0, is at most `(1 + n) / (10 + n)`, so that early parameters
    are soon forgotten, as in TensorFlow's ExponentialMovingAverage. Updates are not changed.

    Args:
      decay: of the average per update, less than 1.
      clamp: whether the scale of the logits is clamped after each update.
    """

    def init(params: Params) -> Average:
        return Average(jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(updates: Params, state: Average, params: Params) -> tuple[Params, Average]:
        new = optax.apply_updates(params, updates)
        new = clamp_logit_scale(new) if clamp else new
        so_far = state.updates.astype(jnp.float32)
        rate = 1 - jnp.minimum(decay, (1 + so_far) / (10 + so_far))
        average = jax.tree.map(lambda old, x: old + rate * (x - old), state.average, new)
        return updates, Average(state.updates + 1, average)

    return optax.GradientTransformation(init, update)


def clamp_logit_scale(params: Params) -> Params:
    """Clamps the scale to [1, 100], as CLIP's authors found necessary (section 2.5)."""
    return params | {"logit_scale": jnp.clip(params["logit_scale"], 0.0, MAX_LOGIT_SCALE)}


def decay_mask(params: Any) -> Any:
    """Returns True for parameters that decay, by name: stacking layers makes biases matrices."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)


def muon_matrices(params: Any) -> Any:
    """Returns the matrix axes of each parameter for Muon: those of the blocks' stacked kernels.

    The fused query, key and value projection, `[layers, width, 3 width]`, counts as one matrix.
    """
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def of(path: Any, _: jax.Array) -> Any:
        names = [entry.key for entry in path]
        return matrix if "blocks" in names and names[-1] == "kernel" else None

    return jax.tree_util.tree_map_with_path(of, params)
