"""Tests that equal captions are not negatives, against a dense loss with a mask."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from disco_jax.config import default
from disco_jax.mesh import batch_sharding, place_batch
from disco_jax.models.clip import abstract_model
from disco_jax.models.folder import nest, shapes_of
from disco_jax.step import host_step, train_step
from disco_jax.step.labels import equal_rows, hashes_of
from disco_jax.step.state import TrainState
from tests.conftest import mesh_of
from tests.small_run import SIZES
from tests.test_microbatch import difference

BATCH = 16


def batch() -> dict[str, np.ndarray]:
    """Returns 16 samples with 7 captions, in random order.

    Some captions differ only in one token or in its place.
    """
    rng = np.random.default_rng(0)
    captions = rng.integers(1, 64, (7, 4)).astype(np.int32)
    captions[1:4] = captions[0]
    captions[1, -1] += 1
    captions[2, :2] = captions[0, 1::-1]
    captions[3, 0] = 0
    images = rng.integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8)
    return {"images": images, "tokens": captions[rng.integers(0, 7, BATCH)]}


def model_params() -> dict:
    rng = np.random.default_rng(1)
    params = {k: rng.normal(size=v).astype(np.float32) / 4 for k, v in shapes_of(SIZES).items()}
    return nest(params | {"logit_scale": np.float32(1.5)})


@functools.cache
def dense() -> tuple[np.ndarray, dict]:
    """Returns loss and gradients by the definition: all logits at once, with pairs masked out."""
    graph, samples = abstract_model(SIZES)[0], batch()
    _, caption = np.unique(samples["tokens"], axis=0, return_inverse=True)
    kept = (caption.ravel()[:, None] != caption.ravel()[None, :]) | np.eye(BATCH, dtype=bool)

    def loss(params):
        clip = nnx.merge(graph, params)
        image, text = clip.encode_image(samples["images"]), clip.encode_text(samples["tokens"])
        logits = jnp.exp(params["logit_scale"]) * image @ text.T
        odds = jnp.where(kept, jnp.exp(logits), 0.0)
        return jnp.mean(jnp.log(odds.sum(0)) + jnp.log(odds.sum(1)) - 2 * logits.diagonal()) / 2

    return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss))(model_params()))


def handed_over(config, model):
    """A stand-in for `make_update` whose update returns the loss and gradients it receives."""
    return lambda state, loss, gradients: (state, {"loss": loss, "gradients": gradients})


@pytest.mark.parametrize(
    ("devices", "microbatch", "mode", "method"),
    [(1, 0, "scan", "auto"), (2, 4, "scan", "disco"), (8, 1, "host", "ring")],
)
def test_the_step_leaves_equal_captions_out(devices, microbatch, mode, method, monkeypatch):
    config = default()
    config.batch_size, config.microbatch = BATCH, microbatch
    config.loss.method, config.loss.group_equal_captions = method, True
    monkeypatch.setattr(train_step, "make_optimizer", lambda config: optax.identity())
    monkeypatch.setattr(train_step, "make_update", handed_over)
    monkeypatch.setattr(host_step, "make_update", handed_over)
    mesh = mesh_of(devices)
    state = TrainState(jnp.int32(0), model_params(), optax.EmptyState())
    state = jax.device_put(state, train_step.state_shardings(config, SIZES, mesh))
    if mode == "host":
        _, got = host_step.HostStep(config, SIZES, mesh)(state, batch())
    else:
        step = train_step.make_train_step(config, SIZES, mesh)
        _, got = step(state, place_batch(batch(), mesh))
    loss, gradients = dense()
    assert difference(np.asarray(got["loss"]), loss) < 1e-5
    assert difference(jax.tree.map(np.asarray, got["gradients"]), gradients) < 1e-5


@pytest.mark.parametrize("devices", [1, 8])
def test_ids_are_equal_where_rows_are(devices):
    """Rows of few distinct tokens, many of them equal, permuted or shifted, also across devices."""
    rows = np.array(list(itertools.product((0, 1, 49407), repeat=5)), np.int32)
    tokens = np.random.default_rng(0).permutation(np.concatenate([rows, rows[::3], rows[:5]]))
    tokens = tokens[: len(tokens) // 8 * 8]
    mesh = mesh_of(devices)
    placed = jax.device_put(tokens, batch_sharding(mesh))
    ids = np.asarray(jax.jit(lambda x: equal_rows(hashes_of(x), mesh))(placed))
    assert (ids.dtype, ids.shape) == (np.int32, tokens.shape[:1])
    np.testing.assert_array_equal(
        ids[:, None] == ids[None, :], (tokens[:, None] == tokens[None, :]).all(axis=2)
    )


def test_300000_captions_do_not_collide():
    """A 32-bit hash of this many captions would have ten collisions on average."""
    tokens = np.zeros((300_000, 4), np.int32)
    tokens[:, 0], tokens[:, 3] = np.divmod(np.arange(300_000), 997)
    ids = np.asarray(jax.jit(lambda x: equal_rows(hashes_of(x), mesh_of(1)))(tokens))
    assert len(np.unique(ids)) == 300_000
