"""AdamW with CLIP's exceptions from weight decay, warm-up and cosine."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

# Parameters that are pulled to no particular value: gains, biases, single vectors and scalars.
UNDECAYED = frozenset({"scale", "bias", "class_embedding", "logit_scale", "logit_bias"})


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to 0 at `num_steps`."""
    c = config.optimizer
    return optax.warmup_cosine_decay_schedule(
        0.0, c.learning_rate, c.warmup_steps, max(config.num_steps, c.warmup_steps + 1)
    )


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Gradient clipping by global norm, if any, then AdamW."""
    c = config.optimizer
    adamw = optax.adamw(
        make_schedule(config),
        b1=c.b1,
        b2=c.b2,
        eps=c.eps,
        weight_decay=c.weight_decay,
        mask=decay_mask,
    )
    if c.grad_clip_norm:
        return optax.chain(optax.clip_by_global_norm(c.grad_clip_norm), adamw)
    return adamw


def decay_mask(params: Any) -> Any:
    """True for the parameters that decay. By name: a stack of layers makes every bias a matrix."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)
