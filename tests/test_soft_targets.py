"""Tests several positives and distillation against their definitions in float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from disco_jax.losses import KINDS, Teacher, contrastive_loss, local_contrastive_loss
from tests.conftest import mesh_of
from tests.losses_common import arguments, features, value_and_grads

METHODS = ("auto", "reference", "disco", "stream", "ring")


def defined(kind, args, ids=None, weights=None, groups=None, teacher=None):
    """Returns the loss by its definition, one sample after the other, in float64."""
    image, text, scale, *bias = (np.asarray(x, np.float64) for x in args)
    n = len(image)
    weights = np.ones(n) if weights is None else weights.astype(np.float64)
    ids = np.arange(n) if ids is None else ids
    share = weights / (weights.sum() or 1)
    logits = scale * image @ text.T + (bias[0] if bias else 0)
    present = np.outer(weights > 0, weights > 0)
    positive = (ids[:, None] == ids[None, :]) & present | np.eye(n, dtype=bool)
    counts = present if groups is None else present & (groups[:, None] != groups[None, :])
    counts = counts | positive
    if kind == "sigmoid":
        z = np.where(positive, 1, -1)
        pairs = (share[:, None] + share[None, :]) / 2 * np.log1p(np.exp(-z * logits))
        return np.sum(pairs[counts])
    total = 0.0
    for of, with_positives, with_counts, given in (
        (logits, positive, counts, teacher),
        (logits.T, positive.T, counts.T, teacher and teacher[::-1]),
    ):
        for i in range(n):
            candidates = np.flatnonzero(with_counts[i])
            row = of[i, candidates]
            log_softmax = row - row.max() - np.log(np.sum(np.exp(row - row.max())))
            targets = with_positives[i, candidates] / with_positives[i].sum()
            if given:
                other = TEACHER_SCALE * given[1].astype(np.float64)[candidates] @ given[0][i]
                soft = np.exp(other - other.max())
                targets = targets + WEIGHT * soft / soft.sum()
            total -= share[i] * np.sum(targets * log_softmax) / 2
    return total


TEACHER_SCALE, WEIGHT = 30.0, 0.7


def taught(pair):
    return None if pair is None else Teacher(*pair, TEACHER_SCALE, WEIGHT)


@st.composite
def cases(draw):
    devices = draw(st.sampled_from([1, 2, 4, 8]))
    batch = devices * draw(st.integers(1, 4))

    def numbers(values, dtype):
        return np.array(draw(st.lists(values, min_size=batch, max_size=batch)), dtype)

    labels = {"ids": numbers(st.integers(0, 5), np.int32)}
    if draw(st.booleans()):
        labels["weights"] = numbers(st.sampled_from([0.0, 0.5, 1.0, 3.0]), np.float32)
    if draw(st.booleans()):
        labels["groups"] = numbers(st.integers(0, 4), np.int32)
    seed = draw(st.integers(0, 99))
    if draw(st.booleans()):
        labels["teacher"] = features(batch, 7, seed + 100)
    scale = draw(st.sampled_from([0.5, 10.0, 100.0]))
    return devices, batch, draw(st.integers(1, 9)), draw(st.integers(1, 12)), scale, seed, labels


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=3, deadline=None, derandomize=True)
@hypothesis.given(case=cases())
def test_equals_the_definition(kind, method, case):
    """The loss, and gradients as differences of the definition in a random direction."""
    devices, batch, dim, tile, scale, seed, labels = case
    if kind == "sigmoid":
        labels = {name: x for name, x in labels.items() if name != "teacher"}
    args = arguments(kind, batch, dim, seed, scale)
    options = {
        "positive_ids": labels["ids"],
        "weights": labels.get("weights"),
        "group_ids": labels.get("groups"),
        "teacher": taught(labels.get("teacher")),
    }
    got = value_and_grads(
        lambda *a: contrastive_loss(
            *a, mesh=mesh_of(devices), kind=kind, method=method, tile=tile, **options
        ),
        args,
    )
    expected = defined(kind, args, **labels)
    assert abs(got[0] - expected) <= 1e-5 * max(abs(expected), scale)
    rng = np.random.default_rng(seed)
    for i, x in enumerate(args):
        x = np.asarray(x, np.float64)
        direction, step = rng.normal(size=x.shape), 1e-6
        ends = [
            defined(kind, [*args[:i], x + sign * step * direction, *args[i + 1 :]], **labels)
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        found = np.sum(got[1 + i].astype(np.float64) * direction)
        size = scale * np.sqrt(batch) if x.ndim else 1.0  # of terms that may cancel
        assert abs(found - slope) <= 1e-5 * max(abs(slope), size)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("method", ["disco", "stream", "ring"])
def test_equals_the_dense_loss(method, devices):
    """To 1e-5 of each gradient, without allowance for terms that cancel."""
    args, ids = arguments("softmax", 64, 16), np.arange(64) // 2 % 20
    teacher = taught(features(64, 24, 5))

    def of(method, devices):
        return value_and_grads(
            lambda *a: contrastive_loss(
                *a,
                mesh=mesh_of(devices),
                method=method,
                tile=5,
                positive_ids=ids,
                teacher=teacher,
            ),
            args,
        )

    for a, b in zip(of(method, devices), of("auto", 1), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b))


def test_one_positive_each_is_the_loss_of_pairs():
    args = arguments("softmax", 32, 8)
    plain, other = (
        value_and_grads(lambda *a, o=o: contrastive_loss(*a, mesh=mesh_of(4), **o), args)
        for o in ({}, {"positive_ids": np.arange(32)[::-1].copy()})
    )
    for a, b in zip(plain, other, strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(a))


def test_a_teacher_of_the_same_features_teaches_nothing():
    """Its targets are the student's own softmax, where the cross-entropy is least."""
    args, teacher = arguments("softmax", 32, 8), None
    teacher = Teacher(args[0], args[1], args[2], 1.0)
    got, plain = (
        value_and_grads(
            lambda *a, t=t: contrastive_loss(*a, mesh=mesh_of(4), method="ring", teacher=t), args
        )
        for t in (teacher, None)
    )
    assert got[0] > plain[0]
    for a, b in zip(got[1:3], plain[1:3], strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b))


def test_a_confident_pair_keeps_its_precision():
    """Features of equal pairs at the largest scale: the loss is 8e-13, and logits are 100."""
    image = np.eye(8, dtype=np.float32)
    image[1] = image[0] * 0.96 + image[1] * 0.28
    args = (image, image, jnp.float32(100.0))
    ids = np.arange(8)
    for method in ("stream", "ring"):
        got = contrastive_loss(*args, mesh=mesh_of(4), method=method, positive_ids=ids)
        expected = 2 / 8 * np.log1p(np.exp(-100 * (1 - np.float64(image[1] @ image[0]))))
        np.testing.assert_allclose(got, expected, rtol=1e-3)


def compiled(method, batch):
    rows = NamedSharding(mesh_of(8), P("data"))
    wide = jax.ShapeDtypeStruct((batch, 64), jnp.float32, sharding=rows)
    ids = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows)

    def loss(image, text, ids, *teacher):
        return contrastive_loss(
            image,
            text,
            jnp.float32(10.0),
            mesh=mesh_of(8),
            method=method,
            positive_ids=ids,
            teacher=taught(teacher),
        )

    lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(wide, wide, ids, wide, wide)
    return lowered.compile()


@pytest.mark.parametrize("method", ["stream", "ring"])
def test_memory_is_linear(method):
    """Doubling the batch at most about doubles the memory; blocks of logits would grow fourfold."""
    sizes = [compiled(method, n).memory_analysis().temp_size_in_bytes for n in (8192, 16384)]
    assert sizes[1] <= 2.2 * sizes[0]
    assert sizes[1] < 4 * 16384 * 16384 / 8 / 4  # a quarter of the logits of a device


def test_ring_gathers_nothing():
    assert "all-gather" not in compiled("ring", 256).as_text()


def test_local_shards():
    args, ids = arguments("softmax", 32, 8), np.arange(32) // 3
    pair = features(32, 5, 9)
    mesh = mesh_of(4)

    def local(image, text, scale, ids, *teacher):
        return local_contrastive_loss(
            image, text, scale, axis_name="data", positive_ids=ids, teacher=taught(teacher)
        )

    rows = P("data")
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, rows, P(), rows, rows, rows), out_specs=P()
    )
    np.testing.assert_allclose(
        mapped(*args, ids, *pair), defined("softmax", args, ids, teacher=pair), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive_ids": np.arange(7)}, r"positive_ids must have shape \(8,\), not \(7,\)"),
        ({"positive_ids": np.ones(8, np.float32)}, "positive_ids must be integers, not float32"),
        ({"teacher": taught(features(7, 4))}, "teacher.image has 7 rows; image has 8"),
        (
            {"teacher": Teacher(*features(8, 4), "x", 1.0)},
            "teacher.logit_scale must be a floating-point scalar, not 'x'",
        ),
        (
            {"teacher": taught(features(8, 4)), "kind": "sigmoid", "logit_bias": jnp.float32(0)},
            "teacher is for the softmax loss only",
        ),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(*arguments("softmax", 8, 4), mesh=mesh_of(2), **options)
