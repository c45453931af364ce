"""Tests that the training step compiles once and gives the same curve on any devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disco_jax.config import default
from disco_jax.mesh import place_batch
from disco_jax.models import abstract_model
from disco_jax.step.gradients import batch_loss
from disco_jax.step.optimizer import decay_mask, make_optimizer, make_schedule
from disco_jax.step.state import init_state
from disco_jax.step.train_step import clamp_logit_scale, make_train_step
from tests.conftest import mesh_of
from tests.test_microbatch import first_state, random_batch, small

pytestmark = pytest.mark.usefixtures("standard_promotion")


def curve(method: str, devices: int, steps: int = 20, kind: str = "softmax") -> np.ndarray:
    config, model = small(kind, method, drop=(0.0, 0.0))
    mesh = mesh_of(devices)
    step = make_train_step(config, model, mesh)
    state = first_state(config, model, mesh)
    losses = []
    for seed in range(steps):
        state, metrics = step(state, place_batch(random_batch(seed), mesh))
        losses.append(float(metrics["train/loss"]))
    return np.array(losses)


@pytest.fixture(scope="module")
def reference_curve() -> np.ndarray:
    return curve("reference", 1)


def test_curves_agree_step_by_step(reference_curve):
    """8 devices with `disco` agree with one device and the dense loss up to fp32 rounding."""
    np.testing.assert_allclose(curve("disco", 8), reference_curve, rtol=2e-5)
    assert reference_curve[-1] < reference_curve[0]


@pytest.mark.slow
def test_the_sigmoid_loss_trains_as_well():
    """SigLIP's loss with its bias: 8 devices with `ring` agree with one with the dense loss."""
    expected = curve("reference", 1, steps=8, kind="sigmoid")
    np.testing.assert_allclose(curve("ring", 8, steps=8, kind="sigmoid"), expected, rtol=2e-5)
    assert expected[-1] < expected[0]


def test_compiles_once_and_donates_its_state():
    (config, model), mesh = small(method="disco"), mesh_of(4)
    compilations = []

    def listener(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(duration)

    step = make_train_step(config, model, mesh)
    state = first_state(config, model, mesh)
    batches = [place_batch(random_batch(seed), mesh) for seed in range(4)]
    before = state
    state, _ = step(state, batches[0])
    assert all(x.is_deleted() for x in jax.tree.leaves(before.params))
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for batch in batches[1:]:
            state, _ = step(state, batch)
        assert compilations == []
        jax.jit(lambda x: x + 1)(1.0)  # the listener does notice compilations
        assert len(compilations) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert int(state.step) == 4


def test_state_begins_on_every_device():
    (config, model), mesh = small(), mesh_of(8)
    state = init_state(model, make_optimizer(config), mesh, seed=0)
    assert all(x.sharding.device_set == set(mesh.devices.flat) for x in jax.tree.leaves(state))
    other = init_state(model, make_optimizer(config), mesh_of(1), seed=0)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_norms_biases_and_the_scale_do_not_decay():
    _, params = abstract_model(small()[1])
    mask = decay_mask(params)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): decays
        for path, decays in jax.tree_util.tree_leaves_with_path(mask)
    }
    kept = {name for name, decays in flat.items() if not decays}
    assert kept == {
        "logit_scale",
        "visual.class_embedding",
        *(
            f"{n}.{p}"
            for n in ("visual.ln_pre", "visual.ln_post", "text.ln_final")
            for p in ("scale", "bias")
        ),
        *(
            f"{tower}.transformer.blocks.{layer}.{p}"
            for tower in ("visual", "text")
            for layer, names in (
                ("ln_1", ("scale", "bias")),
                ("ln_2", ("scale", "bias")),
                ("in_proj", ("bias",)),
                ("out_proj", ("bias",)),
                ("mlp_in", ("bias",)),
                ("mlp_out", ("bias",)),
            )
            for p in names
        ),
    }


@pytest.mark.parametrize(("raw", "kept"), [(-1.0, 0.0), (2.5, 2.5), (9.0, np.log(100))])
def test_the_scale_stays_between_1_and_100(raw, kept):
    clamped = clamp_logit_scale({"logit_scale": np.float32(raw)})
    assert float(clamped["logit_scale"]) == pytest.approx(kept)


def test_schedule_warms_up_and_ends_at_zero():
    config, _ = small()
    config.optimizer.warmup_steps = 5
    schedule = make_schedule(config)
    peak = config.optimizer.learning_rate
    # As in OpenCLIP's scheduler.py: lr (n + 1) / warmup before update n = warmup, then a cosine.
    for n in range(5):
        assert float(schedule(n)) == pytest.approx(peak * (n + 1) / 5)
    assert float(schedule(5)) == pytest.approx(peak)
    assert float(schedule(12.5)) == pytest.approx(peak / 2)
    assert float(schedule(20)) == pytest.approx(0)


@pytest.mark.parametrize(("warmup", "first"), [(0, 1.0), (1, 1.0), (2, 0.5), (40, 1 / 40)])
def test_the_first_update_is_one(warmup, first):
    """Covers no warm-up, warm-ups of one and two updates, and one that is longer than the run."""
    config, _ = small()
    config.optimizer.warmup_steps = warmup
    rate = make_schedule(config)(jnp.int32(0))
    assert float(rate) == pytest.approx(first * config.optimizer.learning_rate, rel=1e-5)


def test_clipping_bounds_the_update():
    """A clipped AdamW step does not change if the gradients are ten thousand times as large."""
    config, _ = small()
    config.optimizer.grad_clip_norm = 1.0
    optimizer = make_optimizer(config)
    params = {"kernel": np.ones((2, 2), np.float32)}
    big, bigger = ({"kernel": np.full((2, 2), v, np.float32)} for v in (1e2, 1e6))
    updates = [optimizer.update(g, optimizer.init(params), params)[1] for g in (big, bigger)]
    for a, b in zip(*(jax.tree.leaves(u) for u in updates), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_loss_can_take_bfloat16_features():
    """They are sent in bfloat16; the loss and its fp32 gradients are those of rounded features."""
    config, mesh = default(), mesh_of(4)
    config.loss.dtype, config.loss.method = "bfloat16", "stream"
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 16, 8)).astype(np.float32)
    features = tuple(rows / np.linalg.norm(rows, axis=2, keepdims=True))
    scalars = {"logit_scale": jnp.float32(2.0)}

    def loss(features, mesh=mesh, config=config):
        return batch_loss(config, mesh, scalars, features)

    program = jax.jit(jax.value_and_grad(loss))
    gathers = re.findall(
        r"stablehlo.all_gather.*-> tensor<16x8x(\w+)>", program.lower(features).as_text()
    )
    assert gathers == ["bf16"]
    value, gradients = program(features)
    rounded = tuple(x.astype(jnp.bfloat16).astype(np.float32) for x in features)
    dense = default()
    dense.loss.method = "reference"
    expected, theirs = jax.value_and_grad(loss)(rounded, mesh_of(1), dense)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, exact in zip(gradients, theirs, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, exact, rtol=0, atol=0.01 * np.abs(exact).max())
