"""The microbatch step with images in host memory, which then limits the batch.

A Python loop over the jitted functions of `HostStep.phases`. Samples are sent to the devices
one microbatch ahead of the computation, once for the features and again for the gradients.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from disco_jax.mesh import batch_sharding, place_batch, replicated
from disco_jax.models import CLIPConfig, Params
from disco_jax.models.text_groups import too_long
from disco_jax.step.gradients import (
    ROWS,
    Features,
    add,
    make_model_fns,
    own_places,
    pullback,
    split,
    sum_over_devices,
    zeros,
)
from disco_jax.step.labels import SAMPLES, Labels, arrays_of, labels_of
from disco_jax.step.optimizer import make_optimizer
from disco_jax.step.state import TrainState, abstract_batch, abstract_state, trained
from disco_jax.step.train_step import Metrics, make_update, state_shardings

Array = jax.Array
Samples = dict[str, Array]
# Features, and for each device the share of its texts that did not fit their groups, `[N]`.
Encoded = tuple[Features, Array]


class Phase(NamedTuple):
    """One jitted function of a step, for the planner."""

    function: Any
    arguments: tuple[Any, ...]  # abstract
    turns: int  # calls per step
    beside: tuple[Any, ...]  # abstract arrays that are also alive, besides the arguments


class HostStep:
    """(state, batch) -> (state, metrics), like `make_train_step`, but with a batch of NumPy arrays.

    The batch contains this process's rows: uint8 `images` `[B / processes, h, w, 3]`, int32
    `tokens`, and what `labels_of` reads, which may already be on the devices.
    """

    # Longer than other functions because the phases are closures over the same few values.
    def __init__(self, config: ConfigDict, model: CLIPConfig, mesh: Mesh):
        fns = make_model_fns(config, model, mesh)
        update = make_update(config, model)
        self._config, self._model, self._mesh = config, model, mesh
        self._count = count = config.batch_size // mesh.devices.size // config.microbatch
        self._local_devices = len(mesh.local_devices)
        rows, whole = batch_sharding(mesh), replicated(mesh)
        shardings = state_shardings(config, model, mesh)

        def empty() -> Encoded:
            shape = (mesh.devices.size, count, config.microbatch, model.embed_dim)
            features = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
            return features, jnp.zeros(mesh.devices.size, jnp.float32)

        def places(i: Array) -> Array:
            """Returns the places in the batch of microbatch i's samples on a device."""
            return own_places(count * config.microbatch).reshape(count, -1)[i]

        def encode(
            towers: Params, encoded: Encoded, samples: Samples, i: Array, step: Array
        ) -> tuple[Encoded, Array]:
            """On a device: stores microbatch i's features; also returns a value to wait for."""
            features, long_texts = encoded
            if fns.groups:
                long_texts += too_long(samples["tokens"], fns.groups) / count
            new = fns.encode(towers, samples, places(i), step)
            image, text = (
                lax.dynamic_update_slice_in_dim(old, piece[None, None], i, axis=1)
                for old, piece in zip(features, new, strict=True)
            )
            return ((image, text), long_texts), new[0][0, :1]

        def loss(
            scalars: Params, folded: Features, labels: Labels
        ) -> tuple[Array, Params, Features]:
            features = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), folded)
            gradient = jax.value_and_grad(fns.loss, (0, 1))
            value, (d_scalars, d_features) = gradient(scalars, features, labels)
            return (
                value,
                d_scalars,
                jax.tree.map(lambda g, x: g.reshape(x.shape), d_features, folded),
            )

        def pull(
            towers: Params,
            total: Params,
            samples: Samples,
            cotangents: Features,
            i: Array,
            step: Array,
        ) -> tuple[Params, Array]:
            """On a device: adds microbatch i's gradients; also returns a value to wait for."""
            of_samples = jax.tree.map(lambda x: x[0, i], cotangents)
            grads = pullback(fns, model, towers)(samples, places(i), of_samples, step)
            return add(total, grads), jax.tree.leaves(grads)[0].ravel()[:1]

        def on_devices(function: Any, *specs: P) -> Any:
            return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=ROWS)

        def finish(
            state: TrainState, value: Array, total: Params, d_scalars: Params, long_texts: Array
        ) -> tuple[TrainState, Metrics]:
            grads = sum_over_devices(mesh, total, config.reduce_dtype)
            state, metrics = update(state, value, grads | d_scalars)
            if fns.groups:
                metrics["train/long_texts"] = jnp.mean(long_texts)
            return state, metrics

        self._cast_params = jax.jit(
            lambda params: fns.cast_params(split(params)[0]), out_shardings=whole
        )
        self._empty = jax.jit(empty, out_shardings=rows)
        self._encode = jax.jit(on_devices(encode, P(), ROWS, ROWS, P(), P()), donate_argnums=1)
        self._loss = jax.jit(loss, donate_argnums=1, out_shardings=(whole, whole, (rows, rows)))
        self._labels = jax.jit(lambda arrays: labels_of(config, arrays, mesh))
        self._begin = jax.jit(on_devices(lambda towers: zeros(trained(model, towers)), P()))
        self._pull = jax.jit(on_devices(pull, P(), ROWS, ROWS, ROWS, P(), P()), donate_argnums=1)
        self._update = jax.jit(finish, donate_argnums=0, out_shardings=(shardings, whole))

    def __call__(
        self, state: TrainState, batch: dict[str, np.ndarray]
    ) -> tuple[TrainState, Metrics]:
        """Takes one step. The state passed in is donated."""
        return self._update(state, *self._gradients(state, batch))

    def gradients(
        self, state: TrainState, batch: dict[str, np.ndarray]
    ) -> tuple[Array, Params, Params]:
        """Returns the loss and the gradients of the towers and of the scalars.

        Gradients of the towers are each device's own, `[N, ...]`. Everything else is freed before
        the update.
        """
        return self._gradients(state, batch)[:3]

    def _gradients(
        self, state: TrainState, batch: dict[str, np.ndarray]
    ) -> tuple[Array, Params, Params, Array]:
        """Also returns each device's share of texts too long for their groups, `[N]`."""
        towers = self._cast_params(state.params)
        features, long_texts = self._each(
            batch,
            self._empty(),
            lambda x, samples, i: self._encode(towers, x, samples, i, state.step),
        )
        given = {name: batch[name] for name in arrays_of(self._config)}
        here = {name: x for name, x in given.items() if isinstance(x, np.ndarray)}
        labels = self._labels(given | place_batch(here, self._mesh))
        value, d_scalars, d_features = self._loss(split(state.params)[1], features, labels)
        total = self._each(
            batch,
            self._begin(towers),
            lambda x, samples, i: self._pull(towers, x, samples, d_features, i, state.step),
        )
        return value, total, d_scalars, long_texts

    def _each(self, batch: dict[str, np.ndarray], carry: Any, call: Any) -> Any:
        """Folds `call(carry, microbatch i, i)` over all i, sending each while the last one runs.

        At most two microbatches are on the devices: a third is sent only after the first is done.
        """
        folded = {
            name: x.reshape(self._local_devices, self._count, -1, *x.shape[1:])
            for name, x in batch.items()
            if name in SAMPLES
        }

        def place(i: int) -> Samples:
            pieces = {name: x[:, i].reshape(-1, *x.shape[3:]) for name, x in folded.items()}
            return place_batch(pieces, self._mesh)

        samples, before = place(0), None
        for i in range(self._count):
            carry, done = call(carry, samples, np.int32(i))
            if i + 1 < self._count:
                jax.block_until_ready(before)
                before, samples = done, place(i + 1)
        return carry

    def phases(self) -> dict[str, Phase]:
        """Returns what a step compiles, in order, as shapes for the planner."""
        config, model, mesh = self._config, self._model, self._mesh
        state = abstract_state(model, make_optimizer(config), mesh)
        towers, scalars = split(state.params)
        towers = _like(jax.eval_shape(self._cast_params, state.params), lambda _: replicated(mesh))
        encoded = _like(jax.eval_shape(self._empty), lambda _: batch_sharding(mesh))
        features, long_texts = encoded
        total = _like(jax.eval_shape(self._begin, towers), lambda _: batch_sharding(mesh))
        micro, whole = (
            abstract_batch(config, model, size, mesh)
            for size in (config.microbatch * mesh.devices.size, config.batch_size)
        )
        samples = {name: micro[name] for name in SAMPLES}
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
        value = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
        # The program that makes the labels is too small to count.
        labels = jax.eval_shape(self._labels, {name: whole[name] for name in arrays_of(config)})
        return {
            "prepare": Phase(self._cast_params, (state.params,), 1, (state.opt_state,)),
            "encode": Phase(
                self._encode,
                (towers, encoded, samples, number, number),
                self._count,
                (state, samples),
            ),
            "loss": Phase(self._loss, (scalars, features, labels), 1, (state, towers)),
            "pull": Phase(
                self._pull,
                (towers, total, samples, features, number, number),
                self._count,
                (state, samples),
            ),
            "update": Phase(self._update, (state, value, total, scalars, long_texts), 1, ()),
        }


def _like(shapes: Any, sharding: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), shapes
    )
