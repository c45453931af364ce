"""Collectives with explicit transposes, for use inside `jax.shard_map`.

`axis_name` is a mesh axis or a tuple of them. All functions support first-order reverse-mode
differentiation and carry the varying-axes types that `check_vma=True` checks.
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
    """Gathers the shards `[b, ...]` of all devices into `[B, ...]`, in rank order.

    Every device uses the full result, so the backward pass is a `psum_scatter`: it sums the
    cotangents `[B, ...]` of all devices and returns to each its own rows (DisCo-CLIP, Algorithm 1).
    """
    return lax.all_gather(x, axis_name, tiled=True)


def _all_gather_forward(x: Array, axis_name: AxisName) -> tuple[Array, None]:
    return all_gather(x, axis_name), None


def _all_gather_backward(axis_name: AxisName, _: None, g: Array) -> tuple[Array]:
    return (psum_scatter(g, axis_name),)


all_gather.defvjp(_all_gather_forward, _all_gather_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def psum_scatter(x: Array, axis_name: AxisName) -> Array:
    """Sums `[B, ...]` over devices; each device keeps its own rows `[b, ...]`.

    Each row of the sum is used by one device, but all devices contributed to it and need its
    cotangent: the backward pass is an `all_gather`.
    """
    return lax.psum_scatter(x, axis_name, tiled=True)


def _psum_scatter_forward(x: Array, axis_name: AxisName) -> tuple[Array, None]:
    return psum_scatter(x, axis_name), None


def _psum_scatter_backward(axis_name: AxisName, _: None, g: Array) -> tuple[Array]:
    return (all_gather(g, axis_name),)


psum_scatter.defvjp(_psum_scatter_forward, _psum_scatter_backward)


def ring_shift(tree: Tree, axis_name: AxisName) -> Tree:
    """Sends each leaf to the next device in the ring; after N shifts, every leaf is back home."""
    n = lax.axis_size(axis_name)
    steps = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, steps), tree)


def to_varying(x: Array, axis_name: AxisName) -> Array:
    """Returns `x` typed as varying over `axis_name`; a no-op if it already is.

    The transpose is the psum that the gradient of a replicated value needs. Never add such a psum
    by hand: a second one type-checks but makes the gradient N times too large.
    """
    missing = replicated_axes(x, axis_name)
    return lax.pcast(x, missing, to="varying") if missing else x


def replicated_axes(x: Array, axis_name: AxisName) -> tuple[str, ...]:
    """Returns the axes in `axis_name` over which `x` is typed as replicated."""
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    return tuple(name for name in names if name not in jax.typeof(x).manual_axis_type.varying)
