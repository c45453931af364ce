"""The towers as jitted functions over the mesh, for any number of inputs."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from disco_jax.mesh import batch_sharding, replicated
from disco_jax.models import CLIPConfig
from disco_jax.training.state import Params, abstract_model

EncodeFn = Callable[[Params, np.ndarray], np.ndarray]


class Encoder:
    """Images and texts to fp32 features `[n, embed_dim]` of unit length.

    Inputs go through in batches of one size, the last filled up with zeros, so that each tower is
    compiled once.
    """

    def __init__(self, model: CLIPConfig, mesh: Mesh, batch_size: int):
        graph, _ = abstract_model(model)
        whole = replicated(mesh)
        # Parameters come as they lie, and are whole where they are used.
        inputs, outputs = (None, batch_sharding(mesh)), whole
        devices = mesh.devices.size
        self._batch_size = -(-batch_size // devices) * devices

        def image(params: Params, images: jax.Array) -> jax.Array:
            params = jax.lax.with_sharding_constraint(params, whole)
            return nnx.merge(graph, params).encode_image(images)

        def text(params: Params, tokens: jax.Array) -> jax.Array:
            params = jax.lax.with_sharding_constraint(params, whole)
            return nnx.merge(graph, params).encode_text(tokens)

        self._image = jax.jit(image, in_shardings=inputs, out_shardings=outputs)
        self._text = jax.jit(text, in_shardings=inputs, out_shardings=outputs)

    def image(self, params: Params, images: np.ndarray) -> np.ndarray:
        """Features of uint8 images `[n, h, w, 3]`."""
        return self._batched(self._image, params, images)

    def text(self, params: Params, tokens: np.ndarray) -> np.ndarray:
        """Features of int32 tokens `[n, context_length]`."""
        return self._batched(self._text, params, tokens)

    def _batched(self, encode: EncodeFn, params: Params, inputs: np.ndarray) -> np.ndarray:
        features = []
        for start in range(0, len(inputs), self._batch_size):
            part = inputs[start : start + self._batch_size]
            padded = np.zeros((self._batch_size, *part.shape[1:]), part.dtype)
            padded[: len(part)] = part
            features.append(np.asarray(encode(params, padded))[: len(part)])
        return np.concatenate(features)
