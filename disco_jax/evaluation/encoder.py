"""The towers as jitted functions over the mesh that encode any number of inputs."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from disco_jax.mesh import BATCH_AXES, batch_sharding, own_rows, place_batch, place_rows, replicated
from disco_jax.models import CLIP, CLIPConfig, Params, abstract_model

EncodeFn = Callable[[Params, jax.Array], jax.Array]
LENGTHS = (16, 32, 48)  # to which texts are cut


class Encoder:
    """Encodes images and texts to fp32 features of unit length.

    Inputs are processed in batches of a fixed size, with the last one padded, so that each tower is
    compiled once, the text tower once for every length (`encode_texts`). Every process gets the
    features of all inputs.

    Args:
      model: the towers.
      mesh: the mesh that a batch is sharded over.
      batch_size: the global batch size, rounded up to a multiple of the number of devices.
    """

    def __init__(self, model: CLIPConfig, mesh: Mesh, batch_size: int):
        graph, _ = abstract_model(model)
        whole = replicated(mesh)
        devices = mesh.devices.size
        self.mesh = mesh
        self.batch_size = -(-batch_size // devices) * devices

        def jitted(encode: Callable[[CLIP, jax.Array], jax.Array]) -> EncodeFn:
            """Every device encodes its rows. Parameters arrive in any sharding."""

            def on_device(params: Params, rows: jax.Array) -> jax.Array:
                return encode(nnx.merge(graph, params), rows)

            specs = P(), P(BATCH_AXES)
            on_devices = jax.shard_map(
                on_device, mesh=mesh, in_specs=specs, out_specs=P(BATCH_AXES)
            )
            return jax.jit(
                lambda params, rows: on_devices(
                    jax.lax.with_sharding_constraint(params, whole), rows
                ),
                in_shardings=(None, batch_sharding(mesh)),
                out_shardings=whole,
            )

        self.image = jitted(CLIP.encode_image)
        self.text = jitted(CLIP.encode_text)

        context = model.text.context_length
        short = LENGTHS if model.text.pool == "argmax" else ()  # others attend to the padding
        self._lengths = [*(n for n in short if n < context), context]
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
        starts = range(0, len(inputs), self.batch_size)
        parts = (inputs[start : start + self.batch_size] for start in starts)
        return np.concatenate([self._encode(encode, params, part) for part in parts])

    def encode_texts(self, params: Params, tokens: np.ndarray) -> np.ndarray:
        """Returns fp32 `[n, embed_dim]`, the features of `tokens` `[n, context_length]`.

        CLIP's text tower does not see what follows a text's end. Texts are therefore ordered by
        length, and each batch is cut to the first of a few lengths that it fits; the text tower is
        compiled once for each that occurs. `tokens` are the same on every process.
        """
        ends = tokens.argmax(axis=1) + 1
        order = np.argsort(ends, kind="stable")
        features = []
        for start in range(0, len(tokens), self.batch_size):
            rows = order[start : start + self.batch_size]
            length = next(n for n in self._lengths if n >= ends[rows[-1]])
            features.append(self._encode(self.text, params, tokens[rows, :length]))
        return np.concatenate(features)[np.argsort(order)]

    def _encode(self, encode: EncodeFn, params: Params, part: np.ndarray) -> np.ndarray:
        """Encodes at most a batch, padding it."""
        batch = np.zeros((self.batch_size, *part.shape[1:]), part.dtype)
        batch[: len(part)] = part
        return np.asarray(encode(params, place_rows(batch, self.mesh)))[: len(part)]
