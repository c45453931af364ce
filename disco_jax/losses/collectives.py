"""Collectives whose transposes are written down, for use inside `jax.shard_map`.

`axis_name` is a mesh axis or a tuple of them. All are differentiable once in reverse mode, and
carry the varying-axes types that `check_vma=True` checks.
"""

from functools import partial
from typing import TypeVar

import jax
from jax import lax

Array = jax.Array
AxisName = str | tuple[str, ...]
Tree = TypeVar("Tree")


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def all_gather(x: Array, axis_name: AxisName) -> Array:
    """Shards `[b, ...]` of every device, joined in rank order to `[B, ...]`.

    Each device uses the whole, so the cotangents `[B, ...]` of all devices are summed and each gets
    its own rows back: the backward pass is `psum_scatter` (DisCo-CLIP, Algorithm 1).
    """
    return lax.all_gather(x, axis_name, tiled=True)


def _all_gather_forward(x: Array, axis_name: AxisName) -> tuple[Array, None]:
    return all_gather(x, axis_name), None


def _all_gather_backward(axis_name: AxisName, _: None, g: Array) -> tuple[Array]:
    return (psum_scatter(g, axis_name),)


all_gather.defvjp(_all_gather_forward, _all_gather_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def psum_scatter(x: Array, axis_name: AxisName) -> Array:
    """The sum over devices of `[B, ...]`, of which each keeps its own rows `[b, ...]`.

    Row k of the sum is used by one device alone, so its cotangent is needed by all of them: the
    backward pass is `all_gather`.
    """
    return lax.psum_scatter(x, axis_name, tiled=True)


def _psum_scatter_forward(x: Array, axis_name: AxisName) -> tuple[Array, None]:
    return psum_scatter(x, axis_name), None


def _psum_scatter_backward(axis_name: AxisName, _: None, g: Array) -> tuple[Array]:
    return (all_gather(g, axis_name),)


psum_scatter.defvjp(_psum_scatter_forward, _psum_scatter_backward)


def ring_shift(tree: Tree, axis_name: AxisName) -> Tree:
    """Sends each leaf to the next device and receives the previous one's; N of them come home."""
    n = lax.axis_size(axis_name)
    steps = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, steps), tree)


def to_varying(x: Array, axis_name: AxisName) -> Array:
    """`x`, typed as varying over `axis_name` where it is not yet.

    Its transpose is the psum that a replicated value's gradient needs. Every psum of such a
    gradient is left to it: one more, by hand, gives N times the right answer and type-checks.
    """
    missing = replicated_axes(x, axis_name)
    return lax.pcast(x, missing, to="varying") if missing else x


def replicated_axes(x: Array, axis_name: AxisName) -> tuple[str, ...]:
    """Those of the axes over which `x` is typed as being the same on every device."""
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    return tuple(name for name in names if name not in jax.typeof(x).manual_axis_type.varying)
