"""Tests that microbatches give the loss and gradients of the whole batch, also with dropout."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disco_jax.config import default
from disco_jax.config.validation import check_division
from disco_jax.errors import UserError
from disco_jax.mesh import batch_sharding, place_batch, state_sharding
from disco_jax.models import CLIP, CLIPConfig, TextConfig, VisionConfig
from disco_jax.models.vision import drop_patches
from disco_jax.plan.flops import matmul_flops
from disco_jax.step import gradients
from disco_jax.step.gradients import (
    by_microbatches,
    make_model_fns,
    split,
    sum_over_devices,
    whole_batch,
)
from disco_jax.step.host_step import HostStep
from disco_jax.step.optimizer import make_optimizer
from disco_jax.step.state import init_state
from disco_jax.step.train_step import batches_on_devices, state_shardings
from disco_jax.training import loop
from disco_jax.training.health import Health
from tests import small_run
from tests.conftest import mesh_of

pytestmark = pytest.mark.usefixtures("standard_promotion")

BATCH = 32
# devices, devices per copy of the state, samples per device in a microbatch, mode
DIVISIONS = [
    (2, 1, 4, "host"),
    pytest.param(8, 1, 2, "scan", marks=pytest.mark.slow),
    (8, 4, 1, "scan"),
]


def small(kind="softmax", method="ring", microbatch=0, drop=(0.5, 0.1), **model):
    """Returns a config with both kinds of dropout, and a model small enough to compile often."""
    config = default()
    config.batch_size, config.microbatch, config.num_steps = BATCH, microbatch, 20
    config.loss.kind, config.loss.method = kind, method
    config.optimizer.warmup_steps, config.optimizer.learning_rate = 2, 2e-3
    config.model.dtype = model.setdefault("dtype", "float32")
    config.model.patch_dropout, config.model.dropout = drop
    clip = CLIPConfig(
        embed_dim=24,
        vision=VisionConfig(
            image_size=32, patch_size=8, width=32, layers=2, heads=2,
            patch_dropout=config.model.patch_dropout, dropout=config.model.dropout,
        ),
        text=TextConfig(
            context_length=8, vocab_size=64, width=32, layers=2, heads=2,
            dropout=config.model.dropout,
        ),
        logit_bias=-10.0 if kind == "sigmoid" else None,
    )  # fmt: skip
    return config, dataclasses.replace(clip, **model)


def random_batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (BATCH, 32, 32, 3)).astype(np.uint8),
        "tokens": rng.integers(1, 64, (BATCH, 8)).astype(np.int32),
    }


@functools.cache
def initial_state(kind):
    """Returns an initial state; cached, because compiling it takes as long as a test."""
    config, model = small(kind)
    return init_state(model, make_optimizer(config), mesh_of(1), seed=0)


def first_state(config, model, mesh):
    """Returns a copy of the initial state on any mesh, because a step donates its state."""
    state = jax.tree.map(np.asarray, initial_state(config.loss.kind))
    return jax.device_put(state, state_shardings(config, model, mesh))


def loss_and_gradients(config, model, devices, fsdp=1, mode="scan"):
    """Returns the loss and the gradients as NumPy arrays."""
    mesh = mesh_of(devices, fsdp)
    state = first_state(config, model, mesh)
    if mode == "host":
        loss, own, scalars = HostStep(config, model, mesh).gradients(state, random_batch())
        result = loss, sum_over_devices(mesh, own, config.reduce_dtype) | scalars
    else:
        fns = make_model_fns(config, model, mesh)
        make = by_microbatches if config.microbatch else whole_batch
        gradient = make(config, fns, model, mesh)
        batch = place_batch(random_batch(), mesh)
        result = jax.jit(gradient)(state.params, batch, state.step)
    return jax.tree.map(np.asarray, result)


def difference(a, b):
    """Returns the largest difference of all arrays, each relative to its largest entry in `b`."""
    relative = jax.tree.map(lambda x, y: np.abs(x - y).max() / np.abs(y).max(), a, b)
    return max(jax.tree.leaves(relative))


@functools.cache
def whole(kind):
    """Returns loss and gradients of the whole batch at once, with the dense loss on one device."""
    config, model = small(kind, "reference")
    return loss_and_gradients(config, model, 1)


@pytest.mark.parametrize(("devices", "fsdp", "microbatch", "mode"), DIVISIONS)
def test_softmax_gradients_are_the_whole_batchs(devices, fsdp, microbatch, mode):
    config, model = small("softmax", "ring", microbatch)
    got = loss_and_gradients(config, model, devices, fsdp, mode)
    assert difference(got, whole("softmax")) < 1e-5


@pytest.mark.slow
def test_sigmoid_gradients_are_the_whole_batchs():
    config, model = small("sigmoid", "ring", 1)
    got = loss_and_gradients(config, model, devices=8, fsdp=4, mode="host")
    assert difference(got, whole("sigmoid")) < 1e-5


@pytest.mark.parametrize("fsdp", [1, 4])
def test_the_devices_gradients_are_summed_in_fp32(fsdp):
    """In bf16, adding seven times 1 to 256 gives 256, because numbers there are 2 apart."""
    mesh = mesh_of(8, fsdp)
    own = {
        "split": jnp.ones((8, 3, 16), jnp.bfloat16).at[0].set(256),
        "whole": jnp.ones((8, 7), jnp.bfloat16).at[5].set(256),
    }
    total = sum_over_devices(mesh, jax.device_put(own, batch_sharding(mesh)), "float32")
    for name, x in total.items():
        assert x.dtype == jnp.float32
        assert x.sharding.is_equivalent_to(state_sharding(mesh, x.shape), x.ndim)
        np.testing.assert_array_equal(x, np.full(own[name].shape[1:], 263, np.float32))


@pytest.mark.parametrize("microbatch", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_cross_devices_once_in_the_dtype_asked_for(dtype, microbatch):
    config, model = small(microbatch=microbatch, dtype="bfloat16")
    config.reduce_dtype = dtype
    fns, mesh = make_model_fns(config, model, mesh_of(2)), mesh_of(2)
    make = by_microbatches if microbatch else whole_batch
    gradient = make(config, fns, model, mesh)
    params = initial_state("softmax").params
    jaxpr = jax.make_jaxpr(gradient)(params, random_batch(), jnp.int32(0))
    short = {"float32": "f32", "bfloat16": "bf16"}
    sums = re.findall(r":(\w+)\[[\d,]*\](?:\{[^}]*\})? = psum\w*\[", str(jaxpr))
    # One sum for each parameter of the towers. The others are the loss's.
    assert sums.count(short[dtype]) >= len(jax.tree.leaves(split(params)[0]))
    if dtype == "float32":
        assert "bf16" not in sums
    else:
        assert sums.count("bf16") == len(jax.tree.leaves(split(params)[0]))


@pytest.mark.slow
def test_a_loss_of_global_arrays_takes_microbatches():
    """All methods but `auto` run in shard_map, as `ring` does in the tests above."""
    config, model = small("softmax", "auto", 8)
    assert difference(loss_and_gradients(config, model, 2), whole("softmax")) < 1e-5


@pytest.mark.slow
def test_both_passes_must_draw_the_same(monkeypatch):
    """With other dropout keys in the second pass, the gradients are clearly different."""
    real = gradients.pullback

    def other_keys(fns, model, towers):
        pull = real(fns, model, towers)
        return lambda samples, places, d, step: pull(samples, places, d, step + 1)

    monkeypatch.setattr(gradients, "pullback", other_keys)
    config, model = small("softmax", "ring", 8)
    assert difference(loss_and_gradients(config, model, 2), whole("softmax")) > 1e-2


def test_dropout_changes_with_the_step():
    config, model = small(drop=(0.0, 0.1))
    mesh = mesh_of(1)
    fns = make_model_fns(config, model, mesh)
    params = split(initial_state("softmax").params)[0]
    samples, places = random_batch(), np.arange(BATCH, dtype=np.int32)
    encode = jax.jit(fns.encode)
    first, again, later = (encode(params, samples, places, jnp.int32(step)) for step in (3, 3, 4))
    for a, b, c in zip(first, again, later, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(np.asarray(a) - np.asarray(c)).max() > 1e-3


def test_each_sample_and_tower_drops_by_a_key_of_its_own(monkeypatch):
    seen = []
    for name in ("encode_image", "encode_text"):
        real = getattr(CLIP, name)

        def encode(self, x, keys, *groups, real=real):
            seen.append(keys)
            return real(self, x, keys, *groups)

        monkeypatch.setattr(CLIP, name, encode)
    config, model = small(drop=(0.5, 0.1))
    fns = make_model_fns(config, model, mesh_of(1))
    towers = split(initial_state("softmax").params)[0]
    for step in (0, 1):
        fns.encode(towers, random_batch(), np.arange(BATCH, dtype=np.int32), jnp.int32(step))
    keys = np.concatenate([np.asarray(jax.random.key_data(k)) for k in seen])
    assert len(np.unique(keys, axis=0)) == len(keys) == 4 * BATCH


def test_patch_dropout_keeps_the_class_token_and_as_many_patches():
    x = jnp.arange(3 * 17, dtype=jnp.float32).reshape(3, 17, 1)
    keys = jax.random.split(jax.random.key(0), 3)
    kept = drop_patches(x, keys, 0.75, kept_first=1)
    assert kept.shape == (3, 5, 1)
    np.testing.assert_array_equal(kept[:, 0], x[:, 0])
    for row, whole in zip(np.asarray(kept[:, 1:, 0]), np.asarray(x[:, 1:, 0]), strict=True):
        assert len(set(row)) == 4
        assert set(row) <= set(whole)
    alone = drop_patches(x[1:2], keys[1:2], 0.75, kept_first=1)  # does not depend on other samples
    np.testing.assert_array_equal(alone, kept[1:2])


def test_the_loss_is_computed_once():
    """Microbatches cost the FLOPs of the whole batch plus another forward pass of the towers."""
    counts = {}
    config, model = small(drop=(0.0, 0.0), microbatch=4)
    mesh = mesh_of(2)
    state = first_state(config, model, mesh)
    fns, batch = make_model_fns(config, model, mesh), random_batch()
    functions = {
        "whole": whole_batch(config, fns, model, mesh),
        "microbatches": by_microbatches(config, fns, model, mesh),
        "forward": lambda params, batch, step: fns.encode(
            split(params)[0], batch, np.arange(BATCH, dtype=np.int32), step
        ),
    }
    for name, function in functions.items():
        counts[name] = matmul_flops(jax.make_jaxpr(function)(state.params, batch, state.step))
    whole, forward = counts["whole"]["float32"], counts["forward"]["float32"]
    assert counts["microbatches"]["float32"] == whole + forward


def test_parameters_are_cast_once():
    """In bfloat16, kernels are converted once, before the loops, and norms are not converted."""
    config, model = small(drop=(0.0, 0.0), dtype="bfloat16", microbatch=4)
    mesh = mesh_of(2)
    fns = make_model_fns(config, model, mesh)
    state = first_state(config, model, mesh)
    gradient = by_microbatches(config, fns, model, mesh)
    text = str(jax.make_jaxpr(gradient)(state.params, random_batch(), state.step))
    kernel = "bf16[2,32,128] = convert_element_type"  # mlp_in of both layers, both towers
    assert text.count(kernel) == 2
    towers = jax.eval_shape(fns.cast_params, split(state.params)[0])
    dtypes = {
        jax.tree_util.keystr(path, simple=True, separator="."): str(x.dtype)
        for path, x in jax.tree_util.tree_leaves_with_path(towers)
    }
    assert {dtype for name, dtype in dtypes.items() if ".ln_" in name} == {"float32"}
    assert {dtype for name, dtype in dtypes.items() if ".ln_" not in name} == {"bfloat16"}


@pytest.mark.parametrize("microbatch", [0, 4])
def test_cudnns_attention_can_be_trained_with(microbatch, monkeypatch):
    """Lowers for CUDA the attention that every A100 uses in bf16; only GPU checks are replaced.

    The images' 17 tokens, an odd number, are padded, because JAX refuses gradients otherwise.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    config, model = small(microbatch=microbatch, dtype="bfloat16", attention="cudnn", drop=(0, 0))
    fns, mesh = make_model_fns(config, model, mesh_of(2)), mesh_of(2)
    make = by_microbatches if microbatch else whole_batch
    gradient = jax.jit(make(config, fns, model, mesh))
    params = jax.eval_shape(lambda: initial_state("softmax").params)
    traced = gradient.trace(params, random_batch(), jnp.int32(0))
    calls = re.findall(r"__cudnn\$fmha\w+", traced.lower(lowering_platforms=("cuda",)).as_text())
    towers = 2
    assert calls.count("__cudnn$fmhaSoftmax") == towers * (2 if microbatch else 1)  # encoded twice
    assert calls.count("__cudnn$fmhaSoftmaxBackward") == towers


def test_the_hosts_loop_compiles_once_and_donates_its_state():
    config, model = small(microbatch=2)
    mesh = mesh_of(4)
    step = HostStep(config, model, mesh)
    state = first_state(config, model, mesh)
    before = state
    state, _ = step(state, random_batch(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(before.params))
    compilations = []

    def listener(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for seed in (1, 2):
            state, _ = step(state, random_batch(seed))
        assert compilations == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert int(state.step) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"microbatch": 3}, "microbatch 3 does not divide a device's share of the batch, 8 sampl"),
        ({"batch_size": 30}, "batch_size 30 is not divisible by the 4 devices; 28 or 32 would be"),
        ({"fsdp": 3}, "fsdp 3 does not divide the 4 devices"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_told(changes, message):
    config = default()
    config.batch_size = 32
    config.update(changes)
    with pytest.raises(UserError, match=message):
        check_division(config, devices=4)


@pytest.mark.slow
@pytest.mark.parametrize(("microbatch", "batches"), [(0, 2), (2, 1)])
def test_batches_on_the_devices(microbatch, batches, tmp_path, monkeypatch):
    """The planner counts the batches of steps not yet waited for, and the one being placed."""
    held, seen, see = [], [], Health.see

    def place(batch, mesh):
        placed = place_batch(batch, mesh)
        arrays = [x for x in jax.live_arrays() if x.shape == placed["images"].shape]
        assert len(arrays) == 1  # the loop's own; those held by steps in flight are not listed
        held.append(1 + len(held) - len(seen))
        return placed

    def finished(self, step, *args):
        seen.append(step)
        return see(self, step, *args)

    monkeypatch.setattr(loop, "place_batch", place)
    monkeypatch.setattr(Health, "see", finished)
    made = small_run.make(tmp_path)
    config = small_run.config_of(made, batch_size=32, microbatch=microbatch, log_every=1000)
    config.checkpoint_every = 1000
    loop.train(config, tmp_path / "run")
    assert len(held) == 8
    assert max(held) == batches == batches_on_devices(config)
