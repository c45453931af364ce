"""The towers as jitted functions over the mesh that encode any number of inputs."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from disco_jax.mesh import batch_sharding, own_rows, place_batch, place_rows, replicated
from disco_jax.models import CLIPConfig, Params, abstract_model

EncodeFn = Callable[[Params, jax.Array], jax.Array]


class Encoder:
    """Encodes images and texts to fp32 features of unit length.

    Inputs are processed in batches of a fixed size, with the last one padded, so that each tower is
    compiled once. Every process gets the features of all inputs.

    Args:
      model: the towers.
      mesh: the mesh that a batch is sharded over.
      batch_size: the global batch size, rounded up to a multiple of the number of devices.
    """

    def __init__(self, model: CLIPConfig, mesh: Mesh, batch_size: int):
        graph, _ = abstract_model(model)
        whole = replicated(mesh)
        # Parameters arrive in any sharding and are replicated inside the jitted functions.
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

        self.rows = own_rows(mesh, self.batch_size)  # rows of a batch that this process feeds

    def place(self, rows: np.ndarray) -> jax.Array:
        """Places this process's `rows`, `[own, ...]`, in a global array `[batch_size, ...]`."""
        return place_batch({"rows": rows}, self.mesh)["rows"]

    def encode_all(self, encode: EncodeFn, params: Params, inputs: np.ndarray) -> np.ndarray:
        """Returns fp32 `[n, embed_dim]`, the features of `inputs`.

        Args:
          encode: `image` or `text`.
          params: the parameters.
          inputs: `[n, ...]`, the same on every process.
        """
        features = []
        for start in range(0, len(inputs), self.batch_size):
            part = inputs[start : start + self.batch_size]
            batch = np.zeros((self.batch_size, *inputs.shape[1:]), inputs.dtype)
            batch[: len(part)] = part
            encoded = encode(params, place_rows(batch, self.mesh))
            features.append(np.asarray(encoded)[: len(part)])
        return np.concatenate(features)
