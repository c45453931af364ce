"""Optax optimizers by name, with CLIP's weight decay exceptions and warmup-cosine schedule."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

# Parameters without weight decay: gains, biases, single vectors and scalars.
UNDECAYED = frozenset(
    {"scale", "bias", "proj_bias", "class_embedding", "logit_scale", "logit_bias"}
)


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
    """Returns the optimizer that the config names, after clipping by global norm, if any.

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
    if c.grad_clip_norm:
        return optax.chain(optax.clip_by_global_norm(c.grad_clip_norm), optimizer)
    return optimizer


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
