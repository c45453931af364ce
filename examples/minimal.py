"""CLIP in one file: a mesh, two small towers, the distributed loss, fifty steps.

    python examples/minimal.py

Images show a square of one of 8 colors at one of 16 places; captions name both. Every device holds
a part of the batch, encodes it, and computes its own part of the loss: with method `ring`, text
features travel around the devices, and none of them ever holds the logits of the whole batch.
"""

import os

# Eight simulated devices, where there are no others. Must be set before JAX starts.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from disco_jax.losses import contrastive_loss

BATCH, STEPS, WIDTH, DIM = 512, 50, 64, 32
COLORS = np.array([[r, g, b] for r in (0, 1) for g in (0, 1) for b in (0, 1)], np.float32)
VOCABULARY = len(COLORS) + 16  # a word for each color and each place


def draw(seed: int) -> dict[str, np.ndarray]:
    """Returns a batch: images `[B, 16, 16, 3]` in [0, 1], and captions of two words, `[B, 2]`."""
    rng = np.random.default_rng(seed)
    color, place = rng.integers(len(COLORS), size=BATCH), rng.integers(16, size=BATCH)
    images = rng.uniform(0.4, 0.6, (BATCH, 16, 16, 3)).astype(np.float32)
    for image, c, p in zip(images, color, place, strict=True):
        y, x = divmod(int(p), 4)
        image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = COLORS[c]
    return {"images": images, "words": np.stack([color, len(COLORS) + place], axis=1)}


class Block(nnx.Module):
    """A transformer block: attention, then an MLP, each on normalized inputs."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.hidden = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b, n, WIDTH]` to the same shape."""
        x = x + self.attention(self.norms[0](x))
        return x + self.out(nnx.gelu(self.hidden(self.norms[1](x))))


class CLIP(nnx.Module):
    """An image tower over 4 x 4 patches and a text tower over words; unit-length features."""

    def __init__(self, rngs: nnx.Rngs):
        self.patches = nnx.Linear(4 * 4 * 3, WIDTH, rngs=rngs)
        self.words = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.places = nnx.Param(0.1 * jax.random.normal(rngs.params(), (16, WIDTH)))
        self.image_block, self.text_block = Block(rngs), Block(rngs)
        self.image_out = nnx.Linear(WIDTH, DIM, use_bias=False, rngs=rngs)
        self.text_out = nnx.Linear(WIDTH, DIM, use_bias=False, rngs=rngs)
        self.log_scale = nnx.Param(jnp.log(jnp.float32(10)))

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Returns `[b, DIM]` for images `[b, 16, 16, 3]`."""
        patches = images.reshape(-1, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(-1, 16, 48)
        x = self.image_block(self.patches(patches) + self.places[...])
        return normalized(self.image_out(x.mean(axis=1)))

    def encode_text(self, words: jax.Array) -> jax.Array:
        """Returns `[b, DIM]` for words `[b, 2]`."""
        return normalized(self.text_out(self.text_block(self.words(words)).mean(axis=1)))


def normalized(x: jax.Array) -> jax.Array:
    """Returns features of unit length, which the loss expects."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def main() -> list[float]:
    """Trains, and returns the loss of every step."""
    mesh = Mesh(jax.devices(), ("data",))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    graph, params = nnx.split(CLIP(nnx.Rngs(0)))
    optimizer = optax.adam(3e-3)
    state = jax.device_put((params, optimizer.init(params)), whole)

    def loss_fn(params: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        clip = nnx.merge(graph, params)
        image, text = clip.encode_image(batch["images"]), clip.encode_text(batch["words"])
        scale = jnp.exp(clip.log_scale[...])
        return contrastive_loss(image, text, scale, mesh=mesh, method="ring")

    @jax.jit
    def step(state: tuple, batch: dict[str, jax.Array]) -> tuple[tuple, jax.Array]:
        params, moments = state
        loss, gradients = jax.value_and_grad(loss_fn)(params, batch)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    losses = []
    for i in range(STEPS):
        state, loss = step(state, jax.device_put(draw(i), rows))
        losses.append(float(loss))
        if i % 10 == 0 or i == STEPS - 1:
            print(f"step {i + 1:2}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
