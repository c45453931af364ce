"""The loss alone, in a trainer of your own: a data-parallel loop with its own `shard_map`.

    python examples/own_trainer.py

The loop below is what many trainers look like: each device computes the gradients of its part of
the batch. With a dense loss there, each device would only see the negatives of its own part. One
line makes it the loss of the whole batch: `local_contrastive_loss` in place of the dense one.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from disco_jax.losses import local_contrastive_loss

BATCH, STEPS = 256, 50


class Tower(nn.Module):
    """Somebody's encoder: features of unit length."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b, n]` to `[b, 32]`."""
        x = nn.Dense(32)(nn.gelu(nn.Dense(128)(x)))
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns two views `[B, 24]` and `[B, 16]` of the same hidden numbers."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(BATCH, 4))
    views = np.random.default_rng(0)
    return tuple(
        (np.tanh(hidden @ views.normal(size=(4, n))) + 0.1 * rng.normal(size=(BATCH, n))).astype(
            np.float32
        )
        for n in (24, 16)
    )


def main() -> list[float]:
    """Trains, and returns the loss of every step."""
    mesh = Mesh(jax.devices(), ("data",))
    image_tower, text_tower, optimizer = Tower(), Tower(), optax.adam(3e-3)
    first, second = draw(0)
    params = {
        "image": image_tower.init(jax.random.key(0), first),
        "text": text_tower.init(jax.random.key(1), second),
        "log_scale": jnp.log(jnp.float32(10)),
    }
    moments = optimizer.init(params)

    def loss_fn(params, images, texts):
        image = image_tower.apply(params["image"], images)
        text = text_tower.apply(params["text"], texts)
        scale = jnp.exp(params["log_scale"])
        # Instead of a dense loss over this device's pairs:
        return local_contrastive_loss(image, text, scale, axis_name="data")

    def on_device(params, images, texts):
        # The loss is the whole batch's on every device, and so are these gradients: JAX sums those
        # of replicated parameters over the devices. No `pmean` comes after it.
        return jax.value_and_grad(loss_fn)(params, images, texts)

    rows = P("data")
    gradient = jax.shard_map(on_device, mesh=mesh, in_specs=(P(), rows, rows), out_specs=(P(), P()))

    @jax.jit
    def step(params, moments, images, texts):
        loss, gradients = gradient(params, images, texts)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(params, updates), moments, loss

    losses = []
    for i in range(STEPS):
        params, moments, loss = step(params, moments, *draw(i))
        losses.append(float(loss))
        if i % 10 == 0 or i == STEPS - 1:
            print(f"step {i + 1:2}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
