"""Tests sharded state, frozen towers and blocks, and the optimizers."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from disco_jax.config import default
from disco_jax.errors import UserError
from disco_jax.interop.transfer import read_model
from disco_jax.mesh import make_mesh, place_batch
from disco_jax.models.build import model_config
from disco_jax.models.folder import load_model
from disco_jax.plan.flops import matmul_flops
from disco_jax.runs.checkpoint import Checkpoints
from disco_jax.step.gradients import by_microbatches, make_model_fns
from disco_jax.step.optimizer import make_optimizer
from disco_jax.step.state import abstract_state, averaged, init_state, trained, with_trained
from disco_jax.step.train_step import make_train_step
from disco_jax.training.loop import train
from disco_jax.training.setup import begin_from
from tests import small_run
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def two_towers():
    """Returns ones in place of the parameters of two towers of three blocks each."""
    tower = {
        "patch_embed": jnp.ones((2, 2)),
        "transformer": {"blocks": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}},
        "ln_post": {"scale": jnp.ones(2)},
        "proj": jnp.ones((2, 2)),
    }
    return {"visual": tower, "text": dict(tower), "logit_scale": jnp.float32(1)}


def test_lower_layers_are_trained_at_lower_rates():
    """By hand, for a factor of 1/2: 1/2 in the last of three blocks, 1/16 in the embeddings.

    Weight decay is part of an update, as with a learning rate for each layer.
    """
    config = default()
    config.optimizer.warmup_steps, config.optimizer.weight_decay = 0, 0.5
    updates = {}
    for config.optimizer.layer_decay in (1.0, 0.5):
        optimizer, params = make_optimizer(config), two_towers()
        found, _ = optimizer.update(params, optimizer.init(params), params)
        updates[config.optimizer.layer_decay] = found
    ratio = jax.tree.map(jnp.divide, updates[0.5], updates[1.0])
    for name in ("visual", "text"):
        blocks = ratio[name]["transformer"]["blocks"]
        np.testing.assert_allclose(blocks["bias"][:, 0], [1 / 8, 1 / 4, 1 / 2])
        np.testing.assert_allclose(blocks["kernel"][:, 1, 1], [1 / 8, 1 / 4, 1 / 2])
        np.testing.assert_allclose(ratio[name]["patch_embed"], 1 / 16)
        np.testing.assert_allclose(ratio[name]["proj"], 1)
        np.testing.assert_allclose(ratio[name]["ln_post"]["scale"], 1)
    assert ratio["logit_scale"] == 1


@pytest.mark.parametrize("fsdp", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_the_average_is_that_of_the_parameters_after_each_update(fsdp):
    """Computed by hand from the parameters of every step; the last one is skipped as not finite."""
    config, model = small(drop=(0.0, 0.0))
    config.optimizer.ema_decay = 0.3
    mesh = mesh_of(2, fsdp)
    step = make_train_step(config, model, mesh)
    state = init_state(model, make_optimizer(config), mesh, seed=0)
    expected = jax.tree.map(np.asarray, state.params)
    for n in range(4):
        if n == 3:
            state = state._replace(params=state.params | {"logit_scale": jnp.float32(np.nan)})
        state, _ = step(state, place_batch(random_batch(n), mesh))
        decay = min(0.3, (1 + n) / (10 + n))
        if n < 3:
            expected = jax.tree.map(
                lambda a, x, d=decay: d * a + (1 - d) * np.asarray(x), expected, state.params
            )
    found = averaged(model, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(
        lambda x: x.sharding, state.params | {"logit_scale": found["logit_scale"]}
    )


@pytest.mark.slow
def test_a_run_resumes_with_its_average_and_exports_it(tmp_path, capsys):
    """Bit for bit, with layer-wise rates; evaluated and read as a model, it is the average."""
    made = small_run.make(tmp_path)
    fields = {"optimizer__ema_decay": 0.9, "optimizer__layer_decay": 0.7}
    config = small_run.config_of(made, **fields)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(config, whole)
    shutil.copytree(whole, resumed)
    for step in ("6", "8"):
        shutil.rmtree(resumed / "checkpoints" / step)
    train(config, resumed)
    assert "resuming from step 4" in capsys.readouterr().out
    states = [_state(config, workdir) for workdir in (whole, resumed)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    _, exported = read_model(whole)
    average = optax.tree.get(states[0].opt_state, "average")
    jax.tree.map(np.testing.assert_array_equal, exported, jax.tree.map(np.asarray, average))
    assert np.abs(exported["text"]["proj"] - states[0].params["text"]["proj"]).max() > 1e-6


def _state(config, workdir):
    checkpoints = Checkpoints(workdir)
    abstract = abstract_state(model_config(config), make_optimizer(config), make_mesh())
    state, _ = checkpoints.restore(abstract)
    checkpoints.close()
    return state


def test_other_sizes_interpolate_positions(tmp_path):
    """A run of 32 pixels and 6 tokens begins from a model of 16 and 4; so does its average."""
    made = small_run.make(tmp_path)
    config = small_run.config_of(made, model__image_size=32, model__context_length=6)
    config.optimizer.ema_decay = 0.9
    model = model_config(config)
    state = init_state(model, make_optimizer(config), mesh_of(2), seed=3)
    begun = begin_from(made / "model", model, state)
    _, origin = load_model(made / "model")
    old, new = origin["visual"]["positional_embedding"], begun.params["visual"]
    grid = np.asarray(new["positional_embedding"])[-16:].reshape(4, 4, -1)
    assert len(new["positional_embedding"]) == len(old) + 12
    # Interpolation keeps the mean of each half where the grid is mirrored.
    np.testing.assert_allclose(grid.mean((0, 1)), old[-4:].mean(0), atol=1e-5)
    texts = np.asarray(begun.params["text"]["positional_embedding"])
    np.testing.assert_allclose(texts[[0, -1]], origin["text"]["positional_embedding"][[0, -1]])
    np.testing.assert_array_equal(
        optax.tree.get(begun.opt_state, "average")["text"]["positional_embedding"], texts
    )
    config.model.image_size = 20
    with pytest.raises(UserError, match=r"model\.image_size is 20; it must be a multiple"):
        model_config(config)
