"""Random features, reference results and relative errors for tests of the losses."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from disco_jax.losses import reference

Array = jax.Array
# Arguments of every way to compute the loss. All logits are kept for the backward pass or, with the
# suffix `_linear`, none.
PATHS = {
    "auto": {"method": "auto"},
    "reference": {"method": "reference"},
    "disco": {"method": "disco"},
    "stream": {"method": "stream"},
    "stream_linear": {"method": "stream", "keep_bytes": 0},
    "ring": {"method": "ring"},
    "ring_linear": {"method": "ring", "keep_bytes": 0},
}
# The sigmoid loss keeps no logits.
KINDS_AND_PATHS = [
    *(("softmax", path) for path in PATHS),
    *(("sigmoid", path) for path in PATHS if not path.endswith("_linear")),
]


def unit_rows(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def features(batch: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns image and text features `[batch, dim]` whose pairs are similar but not equal."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(batch, dim))
    return unit_rows(image), unit_rows(image + rng.normal(size=(batch, dim)))


def arguments(
    kind: str, batch: int = 48, dim: int = 16, seed: int = 0, scale: float = 14.0
) -> tuple:
    """Returns the differentiable arguments: image, text, logit_scale and, for sigmoid, the bias."""
    image, text = features(batch, dim, seed)
    bias = (jnp.float32(-5.0),) if kind == "sigmoid" else ()
    return (image, text, jnp.float32(scale), *bias)


def labels(batch: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Returns weights, some of which are 0, and group ids, some of which are equal."""
    rng = np.random.default_rng(seed)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], size=batch).astype(np.float32)
    return {"weights": weights, "group_ids": rng.integers(0, batch // 3, size=batch)}


def value_and_grads(loss, args: tuple) -> list[np.ndarray]:
    """Returns the loss, dI, dT, ds and, for sigmoid, the gradient of the bias."""
    value, grads = jax.jit(jax.value_and_grad(loss, tuple(range(len(args)))))(*args)
    return [np.asarray(value), *(np.asarray(g) for g in grads)]


def dense(kind: str, args: tuple, **kwargs: np.ndarray) -> list[np.ndarray]:
    """Returns loss and gradients of the unsharded reference, as `value_and_grads` does."""
    value, grads = _dense(kind, args, kwargs)
    return [np.asarray(value), *(np.asarray(g) for g in grads)]


@partial(jax.jit, static_argnums=0)
def _dense(kind: str, args: tuple, kwargs: dict[str, np.ndarray]) -> tuple:
    """Is traced once for all tests with arguments of the same shapes."""
    loss = getattr(reference, kind)
    return jax.value_and_grad(lambda args: loss(*args, **kwargs))(args)


def relative_errors(got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> list[float]:
    """Returns the largest difference of each array, divided by its largest expected value."""
    return [
        float(np.max(np.abs(a.astype(np.float64) - b)) / np.max(np.abs(b)))
        for a, b in zip(got, expected, strict=True)
    ]
