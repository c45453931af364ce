"""A trained model that encodes each batch of a run, for distillation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from disco_jax.mesh import BATCH_AXES, place_batch, replicated
from disco_jax.models import CLIPConfig, Params, abstract_model
from disco_jax.models.build import teacher_config
from disco_jax.models.folder import load_model
from disco_jax.step.labels import SAMPLES

Array = jax.Array
Features = dict[str, Array]
ROWS = P(BATCH_AXES)


class Teacher:
    """Adds `teacher_image` and `teacher_text` to batches, as `step.labels.labels_of` reads them.

    A device encodes as many samples at once as in training: a microbatch, or its whole share of the
    batch. Images are resized to the teacher's size.

    Raises:
      UserError: if the config's teacher is missing or reads other tokens.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh):
        model = teacher_config(config)
        _, params = load_model(Path(config.distill.teacher))
        self._mesh, self._microbatch = mesh, config.microbatch
        self._params = jax.device_put(params, replicated(mesh))
        encode = encoder_of(model)

        def at_once(params: Params, samples: dict[str, Array]) -> Features:
            b = len(samples["tokens"])
            size = config.microbatch or b
            pieces = jax.tree.map(lambda x: x.reshape(b // size, size, *x.shape[1:]), samples)
            features = lax.map(lambda piece: encode(params, piece), pieces)
            return jax.tree.map(lambda x: x.reshape(b, -1), features)

        def joined(pieces: list[Features]) -> Features:
            return jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)

        def on_devices(function: Callable[..., Any], *specs: P) -> Any:
            return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=ROWS))

        self._encode = on_devices(at_once, P(), ROWS)
        self._join = on_devices(joined, ROWS)

    def on_devices(self, batch: dict[str, Any]) -> Features:
        """Returns the features for a batch of global arrays."""
        return self._encode(self._params, {name: batch[name] for name in SAMPLES})

    def on_host(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Returns the features, as global arrays, for this process's rows of a batch.

        A microbatch at a time is sent to the devices.
        """
        devices = len(self._mesh.local_devices)
        shares = {
            name: batch[name].reshape(devices, -1, self._microbatch, *batch[name].shape[1:])
            for name in SAMPLES
        }
        pieces: list[Features] = []
        for i in range(shares["tokens"].shape[1]):
            part = {name: x[:, i].reshape(-1, *x.shape[3:]) for name, x in shares.items()}
            if len(pieces) > 1:
                jax.block_until_ready(pieces[-2])  # at most two microbatches are on the devices
            pieces.append(self.on_devices(place_batch(part, self._mesh)))
        return self._join(pieces)


def encoder_of(model: CLIPConfig) -> Callable[[Params, dict[str, Array]], Features]:
    """Returns (parameters, samples on a device) -> features."""
    graph, _ = abstract_model(model)
    size = model.vision.image_size

    def encode(params: Params, samples: dict[str, Array]) -> Features:
        clip = nnx.merge(graph, params)
        images = samples["images"]
        if images.shape[1] != size:
            shape = len(images), size, size, 3
            resized = jax.image.resize(images.astype(jnp.float32), shape, "cubic")
            images = jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)
        scale = jnp.exp(params["logit_scale"])
        image, text = clip.encode_image(images), clip.encode_text(samples["tokens"])
        return {"teacher_image": scale * image, "teacher_text": text}

    return encode
