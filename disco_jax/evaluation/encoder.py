"""The towers as jitted functions over the mesh, for any number of inputs, on every process."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from disco_jax.mesh import batch_sharding, own_rows, place_batch, place_rows, replicated
from disco_jax.models import CLIPConfig, Params, abstract_model

EncodeFn = Callable[[Params, jax.Array], jax.Array]


class Encoder:
    """Images and texts to fp32 features of unit length.

    Inputs go through in batches of one size, the last filled up, so that each tower is compiled
    once. Every process gets the features of all.

    Args:
      model: the towers.
      mesh: over which a batch is split.
      batch_size: rows of all processes together; made up to a multiple of the devices.
    """

    def __init__(self, model: CLIPConfig, mesh: Mesh, batch_size: int):
        graph, _ = abstract_model(model)
        whole = replicated(mesh)
        # Parameters come as they lie, and are whole where they are used.
        inputs = (None, batch_sharding(mesh))
        devices = mesh.devices.size
        self.mesh = mesh
        self.batch_size = -(-batch_size // devices) * devices

        def image(params: Params, images: jax.Array) -> jax.Array:
            params = jax.lax.with_sharding_constraint(params, whole)
            return nnx.merge(graph, params).encode_image(images)

        def text(params: Params, tokens: jax.Array) -> jax.Array:
            params = jax.lax.with_sharding_constraint(params, whole)
            return nnx.merge(graph, params).encode_text(tokens)

        self.image: EncodeFn = jax.jit(image, in_shardings=inputs, out_shardings=whole)
        self.text: EncodeFn = jax.jit(text, in_shardings=inputs, out_shardings=whole)

        self.rows = own_rows(mesh, self.batch_size)  # of a batch, that this process feeds

    def place(self, rows: np.ndarray) -> jax.Array:
        """This process's `rows` of a batch, `[own, ...]`, as a global array `[batch_size, ...]`."""
        return place_batch({"rows": rows}, self.mesh)["rows"]

    def encode_all(self, encode: EncodeFn, params: Params, inputs: np.ndarray) -> np.ndarray:
        """fp32 `[n, embed_dim]` of `[n, ...]` that every process holds, by `image` or `text`."""
        features = []
        for start in range(0, len(inputs), self.batch_size):
            part = inputs[start : start + self.batch_size]
            batch = np.zeros((self.batch_size, *inputs.shape[1:]), inputs.dtype)
            batch[: len(part)] = part
            encoded = encode(params, place_rows(batch, self.mesh))
            features.append(np.asarray(encoded)[: len(part)])
        return np.concatenate(features)
