"""The towers as jitted functions over the mesh, for any number of inputs, on every process."""

from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from disco_jax.mesh import batch_sharding, place_batch, replicated
from disco_jax.models import CLIPConfig
from disco_jax.training.state import Params, abstract_model

EncodeFn = Callable[[Params, jax.Array], jax.Array]


class Encoder:
    """Images and texts to fp32 features of unit length.

    Inputs go through in batches of one size, the last filled up, so that each tower is compiled
    once. Every process gives its own rows of a batch and gets the features of all.

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

    def place(self, rows: np.ndarray) -> jax.Array:
        """This process's rows of a batch, `[batch_size / processes, ...]`, as a global array."""
        return place_batch({"rows": rows}, self.mesh)["rows"]

    def encode_all(self, encode: EncodeFn, params: Params, inputs: np.ndarray) -> np.ndarray:
        """fp32 `[n, embed_dim]` of `[n, ...]` that every process holds, by `image` or `text`."""
        features = [
            np.asarray(encode(params, self.place(part)))[:count]
            for part, count in self._parts(inputs)
        ]
        return np.concatenate(features)

    def _parts(self, inputs: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """This process's rows of each batch, and how many of the whole batch are real."""
        own = self.batch_size // jax.process_count()
        for start in range(0, len(inputs), self.batch_size):
            first = start + jax.process_index() * own
            part = inputs[first : first + own]
            padded = np.zeros((own, *inputs.shape[1:]), inputs.dtype)
            padded[: len(part)] = part
            yield padded, min(self.batch_size, len(inputs) - start)
