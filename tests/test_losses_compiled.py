"""Tests the collectives, buffers and memory of the compiled losses."""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from disco_jax.losses import KINDS, contrastive_loss
from tests.conftest import mesh_of

B, D, DEVICES = 256, 48, 8  # so that b = 32 differs from D, and all products differ


def compiled(method, batch=B, dim=D, kind="softmax", backward=True, tile=None):
    mesh = mesh_of(DEVICES)
    rows = jax.ShapeDtypeStruct((batch, dim), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    args = (rows, rows, scalar) + ((scalar,) if kind == "sigmoid" else ())

    def loss(*a):
        return contrastive_loss(*a, mesh=mesh, kind=kind, method=method, tile=tile, keep_bytes=0)

    f = jax.value_and_grad(loss, tuple(range(len(args)))) if backward else loss
    return jax.jit(f).lower(*args).compile()


def count(program, collective):
    """Counts the occurrences of a collective, synchronous or started asynchronously."""
    return len(re.findall(rf" {collective}(?:-start)?\(", program.as_text()))


def has_logits(program):
    """Returns whether any buffer has the shape of a whole block of logits."""
    b = B // DEVICES
    shapes = (f"[{b},{B}]", f"[{B},{b}]", f"[{B},{B}]")
    return any(shape in program.as_text() for shape in shapes)


def test_disco_gathers_twice_and_scatters_twice():
    program = compiled("disco")
    assert count(program, "all-gather") == 2
    assert count(program, "reduce-scatter") == 2
    assert has_logits(program)  # so `has_logits` finds them where they exist


def test_stream_gathers_the_features_once():
    """One gather serves both passes. All other gathers have one number per sample."""
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", compiled("stream").as_text())
    assert shapes.count(f"{B},{D}") == 1
    assert set(shapes) <= {f"{B},{D}", str(B)}


@pytest.mark.parametrize("kind", KINDS)
def test_ring_never_gathers(kind):
    program = compiled("ring", kind=kind)
    assert count(program, "all-gather") == 0
    assert count(program, "collective-permute") > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["stream", "ring"])
def test_no_block_of_logits_exists(method, kind):
    assert not has_logits(compiled(method, kind=kind, tile=20))


@pytest.mark.parametrize(("method", "mebibytes"), [("ring", 9), ("stream", 23)])
def test_temporary_memory(method, mebibytes):
    """B = 4,096 and D = 512 on 8 devices; a block of logits would take 8 MiB, kept or not."""
    stats = compiled(method, 4096, 512).memory_analysis()
    assert stats.temp_size_in_bytes <= mebibytes * 2**20


@pytest.mark.parametrize("method", ["stream", "ring"])
def test_memory_is_linear_if_nothing_is_kept(method):
    """Doubling the batch about doubles the memory. It would quadruple a block of logits."""
    sizes = [
        compiled(method, batch, 512).memory_analysis().temp_size_in_bytes
        for batch in (4096, 8192, 16384, 32768)
    ]
    assert all(b <= 2.1 * a for a, b in itertools.pairwise(sizes))
