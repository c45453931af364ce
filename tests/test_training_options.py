"""Tests sharded state, frozen towers and blocks, and the optimizers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from disco_jax.config import default
from disco_jax.mesh import place_batch
from disco_jax.plan.flops import matmul_flops
from disco_jax.step.gradients import by_microbatches, make_model_fns
from disco_jax.step.optimizer import make_optimizer
from disco_jax.step.state import init_state, trained, with_trained
from disco_jax.step.train_step import make_train_step
from tests.conftest import mesh_of
from tests.test_microbatch import first_state, random_batch, small

pytestmark = pytest.mark.usefixtures("standard_promotion")


def curve(fsdp):
    config, model = small()
    mesh = mesh_of(4, fsdp)
    step = make_train_step(config, model, mesh)
    state = first_state(config, model, mesh)
    losses = []
    for seed in range(8):
        state, metrics = step(state, place_batch(random_batch(seed), mesh))
        losses.append(float(metrics["train/loss"]))
    return np.array(losses), state


def test_sharded_state_gives_the_same_curve():
    """`(data, fsdp)` meshes of 4 x 1 and 1 x 4 agree over 8 steps; each device holds its share."""
    expected, whole = curve(1)
    assert expected[-1] < expected[0]

    def held(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    scalars = 4 * 4  # the step, Adam's and the schedule's counts, logit_scale: too small to split
    losses, state = curve(4)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert held(state.params) - 4 == (held(whole.params) - 4) // 4
    assert held(state.opt_state) - scalars <= (held(whole.opt_state) - 8) // 4


def test_a_locked_image_tower_stays_as_it_is():
    config, model = small(microbatch=4)
    model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, trained_blocks=0))
    mesh = mesh_of(2)
    step = make_train_step(config, model, mesh)
    state = init_state(model, make_optimizer(config), mesh, seed=0)
    before = jax.tree.map(np.asarray, state.params)
    bytes_of_moments = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    losses = []
    for _ in range(8):
        state, metrics = step(state, place_batch(random_batch(), mesh))
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, state.params["visual"], before["visual"])
    assert np.abs(state.params["text"]["proj"] - before["text"]["proj"]).max() > 1e-3
    trained_bytes = sum(x.nbytes for x in jax.tree.leaves((before["text"], before["logit_scale"])))
    assert bytes_of_moments <= 2 * trained_bytes + 16


def last_blocks(model, count):
    return dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, trained_blocks=count),
        text=dataclasses.replace(model.text, trained_blocks=count),
    )


def test_the_last_blocks_alone_are_trained():
    """Their gradients equal those of the whole model, for less work. The rest does not change."""
    config, model = small(microbatch=4, drop=(0.0, 0.0))
    mesh, part = mesh_of(2), last_blocks(model, 1)
    params = init_state(model, make_optimizer(config), mesh, seed=0).params
    batch = place_batch(random_batch(), mesh)

    def gradient(model):
        fns = make_model_fns(config, model, mesh)
        return jax.jit(by_microbatches(config, fns, model, mesh))

    inputs = (params, batch, jnp.int32(0))
    expected = trained(part, gradient(model)(*inputs)[1])
    got = gradient(part)(*inputs)[1]
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest), got, expected
    )
    assert "patch_embed" not in got["visual"]
    done, whole = (
        matmul_flops(jax.make_jaxpr(gradient(m))(*inputs))["float32"] for m in (part, model)
    )
    assert done < 0.8 * whole
    before = jax.tree.map(np.asarray, params)
    after = jax.tree.map(np.asarray, with_trained(part, params, jax.tree.map(jnp.ones_like, got)))
    for name in ("visual", "text"):
        kernel, old = (
            p[name]["transformer"]["blocks"]["mlp_in"]["kernel"] for p in (after, before)
        )
        np.testing.assert_array_equal(kernel[0], old[0])
        np.testing.assert_array_equal(kernel[1], 1)
        np.testing.assert_array_equal(
            after[name]["positional_embedding"], before[name]["positional_embedding"]
        )
        np.testing.assert_array_equal(after[name]["proj"], 1)


def updates_of(name):
    """Returns gradients, updates and state after one update of two layers' kernels and biases.

    There is no weight decay.
    """
    config = default()
    config.optimizer.name, config.optimizer.warmup_steps = name, 0
    config.optimizer.weight_decay, config.optimizer.learning_rate = 0.0, 1.0
    rng = np.random.default_rng(0)
    params = {"blocks": {"mlp_in": {"kernel": jnp.ones((2, 16, 64)), "bias": jnp.ones((2, 64))}}}
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    optimizer = make_optimizer(config)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    return grads["blocks"]["mlp_in"], updates["blocks"]["mlp_in"], state


def test_lion_moves_by_signs():
    grads, updates, _ = updates_of("lion")
    np.testing.assert_array_equal(updates["kernel"], -np.sign(grads["kernel"]))


def test_muon_orthogonalises_each_layers_matrix():
    """All singular values are similar: Newton-Schulz brings them to about 0.7 to 1.2."""
    grads, updates, _ = updates_of("muon")
    for layer in np.asarray(updates["kernel"]):
        values = np.linalg.svd(layer, compute_uv=False)
        assert values.max() / values.min() < 2
        # Scaled by the root of the longer side, the RMS is that of AdamW's updates, 0.2 (Liu et
        # al., 2025).
        assert np.sqrt(np.mean(layer**2)) == pytest.approx(0.2, rel=0.25)
    np.testing.assert_array_equal(np.sign(updates["bias"]), -np.sign(grads["bias"]))
    assert np.ptp(np.abs(updates["bias"])) < 1e-3  # Adam's first step is equal in size everywhere


def test_adafactor_keeps_factors_alone():
    """The second moment of a 256 x 256 matrix is stored as a row and a column."""
    config = default()
    config.optimizer.name = "adafactor"
    params = {"kernel": jnp.ones((256, 256))}
    numbers = optax.tree.size(make_optimizer(config).init(params))
    assert 512 <= numbers < 1024
