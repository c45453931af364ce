"""Optimisers by name, from Optax, with CLIP's exceptions from weight decay, warm-up and cosine."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

# Parameters that are pulled to no particular value: gains, biases, single vectors and scalars.
UNDECAYED = frozenset(
    {"scale", "bias", "proj_bias", "class_embedding", "logit_scale", "logit_bias"}
)


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up to the peak at update `warmup_steps`, then a cosine to 0 at `num_steps`.

    As OpenCLIP's: the first update has a rate of `peak / warmup_steps`, not 0.
    """
    peak, warmup = config.optimizer.learning_rate, config.optimizer.warmup_steps
    cosine = optax.cosine_decay_schedule(peak, max(config.num_steps - warmup, 1))
    if not warmup:
        return cosine
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, cosine], [warmup])


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Gradient clipping by global norm, if any, then the optimiser that the config names.

    - `adamw`: 8 bytes of state a parameter.
    - `lion` (Chen et al., 2023): 4 bytes; wants a learning rate some 3 to 10 times smaller.
    - `adafactor` (Shazeer and Stern, 2018): factored second moment and no first; next to nothing.
    - `muon` (Jordan et al., 2024): the blocks' matrices by orthogonalised momentum, 4 bytes, scaled
      so that AdamW's learning rate serves (Liu et al., 2025); AdamW without decay for the rest.
    """
    c, rate = config.optimizer, make_schedule(config)
    if c.name == "adamw":
        optimizer = optax.adamw(
            rate, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay, mask=decay_mask
        )
    elif c.name == "lion":
        optimizer = optax.lion(rate, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, mask=decay_mask)
    elif c.name == "adafactor":
        # optax.adafactor's own decay is not scaled by the learning rate: so built from its parts.
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
        raise ValueError(f"optimizer.name {c.name!r} is not known")
    if c.grad_clip_norm:
        return optax.chain(optax.clip_by_global_norm(c.grad_clip_norm), optimizer)
    return optimizer


def decay_mask(params: Any) -> Any:
    """True for the parameters that decay. By name: a stack of layers makes every bias a matrix."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)


def muon_matrices(params: Any) -> Any:
    """Which axes of a parameter are a matrix for Muon: those of the blocks' stacked kernels.

    The fused projection to queries, keys and values, `[layers, width, 3 width]`, is one matrix.
    """
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def of(path: Any, _: jax.Array) -> Any:
        names = [entry.key for entry in path]
        return matrix if "blocks" in names and names[-1] == "kernel" else None

    return jax.tree_util.tree_map_with_path(of, params)
