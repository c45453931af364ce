"""Tests the examples: their losses fall, and are those of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from disco_jax.losses import reference
from examples import minimal, own_trainer


@pytest.fixture(autouse=True)
def jax_as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_the_minimal_example_learns(monkeypatch, capsys):
    monkeypatch.setattr(minimal, "STEPS", 20)
    monkeypatch.setattr(minimal, "BATCH", 256)
    seen, traces = [], []
    loss = minimal.contrastive_loss

    def recorded(image, text, scale, **options):
        traces.append(image.shape)
        value = loss(image, text, scale, **options)
        dense = reference.softmax(image, text, scale)
        jax.debug.callback(lambda a, b: seen.append((float(a), float(b))), value, dense)
        return value

    monkeypatch.setattr(minimal, "contrastive_loss", recorded)
    losses = minimal.main()
    assert losses[0] > 5  # log(256) is 5.5
    assert losses[-1] < losses[0] - 1  # with 128 captions, log(2) = 0.7 is about the least
    assert "step  1  loss" in capsys.readouterr().out
    jax.effects_barrier()
    np.testing.assert_allclose(*zip(*seen, strict=True), rtol=1e-5)
    assert len(seen) == 20
    assert len(traces) == 1, "the step is compiled again"


def test_the_loss_in_somebodys_trainer_is_that_of_the_whole_batch(monkeypatch):
    """Its first loss is the dense one; a mean over each device's own pairs would be far from it."""
    monkeypatch.setattr(own_trainer, "STEPS", 12)
    losses = own_trainer.main()
    tower, (first, second) = own_trainer.Tower(), own_trainer.draw(0)
    image, text = (
        tower.apply(tower.init(jax.random.key(i), x), x) for i, x in enumerate((first, second))
    )
    dense = reference.softmax(image, text, np.float32(10))
    np.testing.assert_allclose(losses[0], dense, rtol=1e-5)
    assert losses[-1] < 0.7 * losses[0]


def test_the_gradients_in_somebodys_trainer_are_those_of_the_whole_batch(monkeypatch):
    """As on one device with the dense loss. Adam would hide gradients that are too large."""
    rate, steps = 0.5, 6
    monkeypatch.setattr(own_trainer, "STEPS", steps)
    monkeypatch.setattr(own_trainer.optax, "adam", lambda _: optax.sgd(rate))
    losses = own_trainer.main()
    tower = own_trainer.Tower()

    @jax.jit
    @jax.value_and_grad
    def dense(params, first, second):
        towers, log_scale = params
        image, text = (tower.apply(*both) for both in zip(towers, (first, second), strict=True))
        return reference.softmax(image, text, jnp.exp(log_scale))

    towers = [tower.init(jax.random.key(i), x) for i, x in enumerate(own_trainer.draw(0))]
    params, expected = (towers, jnp.log(jnp.float32(10))), []
    for i in range(steps):
        loss, gradients = dense(params, *own_trainer.draw(i))
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradients)
        expected.append(float(loss))
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
