"""Tests the losses against the dense reference on random shapes, labels, tiles and scales."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from disco_jax.losses import KINDS, contrastive_loss
from tests.conftest import mesh_of
from tests.losses_common import arguments, dense, value_and_grads


@st.composite
def cases(draw):
    devices = draw(st.sampled_from([1, 2, 4, 8]))
    batch = devices * draw(st.integers(1, 5))
    labels = {}
    if draw(st.booleans()):
        weights = draw(
            st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=batch, max_size=batch)
        )
        labels["weights"] = np.asarray(weights, np.float32)
    if draw(st.booleans()):
        ids = draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
        labels["group_ids"] = np.asarray(ids, np.int32)
    return {
        "devices": devices,
        "batch": batch,
        "dim": draw(st.integers(1, 9)),
        "tile": draw(st.integers(1, 12)),
        "scale": draw(st.sampled_from([0.5, 10.0, 100.0])),
        "seed": draw(st.integers(0, 99)),
        "labels": labels,
    }


@pytest.mark.parametrize("method", ["disco", "stream", "ring"])
@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(case=cases())
def test_equals_reference(kind, method, case):
    args = arguments(kind, case["batch"], case["dim"], case["seed"], case["scale"])
    mesh = mesh_of(case["devices"])
    got = value_and_grads(
        lambda *a: contrastive_loss(
            *a, mesh=mesh, kind=kind, method=method, tile=case["tile"], **case["labels"]
        ),
        args,
    )
    # Gradients are sums of terms as large as `scale`, which may cancel to zero. Their error is
    # therefore relative to the terms, and the error of the loss is relative to the logits.
    sizes = [case["scale"], case["scale"], case["scale"], 1.0, 1.0]
    for a, b, size in zip(got, dense(kind, args, **case["labels"]), sizes, strict=False):
        assert np.max(np.abs(a - b)) <= 1e-5 * max(np.max(np.abs(b)), size)
