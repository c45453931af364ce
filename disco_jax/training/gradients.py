"""The loss of a batch and its gradients: all at once, or exactly by microbatches.

Contrastive gradients need all features at once, but not all activations. By microbatches
(GradCache, Gao et al., 2021): encode every microbatch and keep only the features; one loss over all
of them gives dL/dfeatures; encode again, microbatch by microbatch, pull those back and add up. What
is random is drawn from a sample's place in the batch: both passes, and any division, drop the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from disco_jax.losses import contrastive_loss
from disco_jax.mesh import batch_sharding, replicated, state_sharding
from disco_jax.models import CLIPConfig
from disco_jax.training.state import Params, abstract_model, trained, with_trained

Array = jax.Array
Batch = dict[str, Array]
Features = tuple[Array, Array]  # images' and texts', fp32 `[n, D]` each
GradientFn = Callable[[Params, Batch, Array], tuple[Array, Params]]

SCALARS = ("logit_scale", "logit_bias")


class Parts(NamedTuple):
    """What the gradients are made of, for one config, model and mesh."""

    # fp32 parameters as they lie -> the towers' in their compute dtype, whole on every device
    prepare: Callable[[Params], Params]
    # (prepared parameters, samples with their `index` in the batch, step) -> features
    encode: Callable[[Params, Batch, Array], Features]
    # (the scalars among the parameters, features of the whole batch) -> loss
    loss: Callable[[Params, Features], Array]


def make_parts(config: ConfigDict, model: CLIPConfig, mesh: Mesh) -> Parts:
    """The functions that `whole_batch`, `by_microbatches` and the host's loop are built from."""
    graph, abstract = abstract_model(model)
    everywhere = replicated(mesh)
    root = jax.random.key(config.seed)
    random = bool(config.model.dropout or config.model.patch_dropout)
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def prepare(params: Params) -> Params:
        cast = jax.tree_util.tree_map_with_path(
            lambda path, x: x.astype(model.dtype) if _computes_in_dtype(path) else x, params
        )
        return lax.with_sharding_constraint(cast, everywhere)

    def encode(params: Params, samples: Batch, step: Array) -> Features:
        keys = None
        if random:
            key = jax.random.fold_in(root, step)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, samples["index"])
        scalars = {name: x for name, x in abstract.items() if name in SCALARS}  # unused here
        clip = nnx.merge(graph, params | scalars)
        image = clip.encode_image(samples["images"], keys if model.vision.trained_blocks else None)
        if on_cpu:  # one tower after the other: side by side they fight for the cores and caches
            image, params = lax.optimization_barrier((image, params))
        return image, nnx.merge(graph, params | scalars).encode_text(
            samples["tokens"], keys if model.text.trained_blocks else None
        )

    def loss(scalars: Params, features: Features) -> Array:
        return contrastive_loss(
            *features,
            jnp.exp(scalars["logit_scale"]),
            scalars.get("logit_bias"),
            mesh=mesh,
            kind=config.loss.kind,
            method=config.loss.method,
        )

    return Parts(prepare, encode, loss)


def _computes_in_dtype(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is used in the compute dtype; norms and the scalars are in fp32."""
    names = [entry.key for entry in path]
    return names[0] not in SCALARS and not any(n == "ln" or n.startswith("ln_") for n in names)


def split(params: Params) -> tuple[Params, Params]:
    """The towers' parameters, and the loss's scalars."""
    towers = {name: x for name, x in params.items() if name not in SCALARS}
    return towers, {name: x for name, x in params.items() if name in SCALARS}


def whole_batch(parts: Parts, model: CLIPConfig) -> GradientFn:
    """Loss and gradients in one go, by differentiating through everything."""

    def gradient(params: Params, batch: Batch, step: Array) -> tuple[Array, Params]:
        index = jnp.arange(len(batch["tokens"]), dtype=jnp.int32)

        def loss(changing: Params) -> Array:
            towers, scalars = split(with_trained(model, params, changing))
            features = parts.encode(parts.prepare(towers), batch | {"index": index}, step)
            return parts.loss(scalars, features)

        return jax.value_and_grad(loss)(trained(model, params))

    return gradient


def by_microbatches(parts: Parts, model: CLIPConfig, mesh: Mesh, microbatch: int) -> GradientFn:
    """The same numbers, with the activations of `microbatch` samples a device at a time."""
    cut = Cut(mesh, microbatch)

    def gradient(params: Params, batch: Batch, step: Array) -> tuple[Array, Params]:
        towers, scalars = split(params)
        towers = parts.prepare(towers)
        index = jnp.arange(len(batch["tokens"]), dtype=jnp.int32)
        pieces = jax.tree.map(cut.fold, batch | {"index": index})
        turns = jnp.arange(cut.count(len(index)), dtype=jnp.int32)

        def forward(_: None, i: Array) -> tuple[None, Features]:
            return None, parts.encode(towers, cut.take(pieces, i), step)

        _, features = lax.scan(forward, None, turns)
        features = jax.tree.map(cut.join, features)
        loss, (d_scalars, d_features) = jax.value_and_grad(parts.loss, (0, 1))(scalars, features)
        d_features = jax.tree.map(cut.fold, d_features)
        encode_trained = pullback(parts, model, towers)

        def backward(total: Params, i: Array) -> tuple[Params, None]:
            samples, cotangents = cut.take((pieces, d_features), i)
            return add(mesh, total, encode_trained(samples, step, cotangents)), None

        total = zeros(mesh, split(trained(model, params))[0])
        total, _ = lax.scan(backward, total, turns)
        return loss, total | d_scalars

    return gradient


def pullback(
    parts: Parts, model: CLIPConfig, towers: Params
) -> Callable[[Batch, Array, Features], Params]:
    """The function (samples, step, dL/dfeatures) -> gradients of the trained, prepared towers."""

    def pull(samples: Batch, step: Array, cotangents: Features) -> Params:
        _, transpose = jax.vjp(
            lambda changing: parts.encode(with_trained(model, towers, changing), samples, step),
            trained(model, towers),
        )
        return transpose(cotangents)[0]

    return pull


def zeros(mesh: Mesh, params: Params) -> Params:
    """fp32 sums of gradients to begin with, lying as the parameters do."""
    return jax.tree.map(
        lambda x: lax.with_sharding_constraint(
            jnp.zeros(x.shape, jnp.float32), state_sharding(mesh, x.shape)
        ),
        params,
    )


def add(mesh: Mesh, total: Params, gradients: Params) -> Params:
    """`total + gradients` in fp32, still lying as the parameters do."""
    return jax.tree.map(
        lambda a, g: lax.with_sharding_constraint(
            a + g.astype(jnp.float32), state_sharding(mesh, a.shape)
        ),
        total,
        gradients,
    )


class Cut:
    """How a batch is divided: each device's share into microbatches, so that nothing moves.

    Arrays `[B, ...]` are folded to `[N, k, m, ...]`: N devices, k microbatches of m samples each.
    """

    def __init__(self, mesh: Mesh, microbatch: int):
        self.devices, self.microbatch = mesh.devices.size, microbatch
        self._rows = batch_sharding(mesh)

    def count(self, batch_size: int) -> int:
        """Microbatches of a batch."""
        return batch_size // self.devices // self.microbatch

    def fold(self, x: Array) -> Array:
        """`[B, ...]` to `[N, k, m, ...]`."""
        folded = x.reshape(self.devices, -1, self.microbatch, *x.shape[1:])
        return lax.with_sharding_constraint(folded, self._rows)

    def index(self, count: int, i: Array) -> Array:
        """Places in the batch of microbatch i's samples, of `count` microbatches, int32 `[N m]`."""
        device = jnp.arange(self.devices, dtype=jnp.int32)[:, None] * count + i
        sample = jnp.arange(self.microbatch, dtype=jnp.int32)[None, :]
        flat = (device * self.microbatch + sample).reshape(-1)
        return lax.with_sharding_constraint(flat, self._rows)

    def take(self, pieces: Any, i: Array) -> Any:
        """Microbatch i, `[N m, ...]`, of a tree of folded arrays."""

        def one(x: Array) -> Array:
            piece = lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)
            flat = piece.reshape(-1, *piece.shape[2:])
            return lax.with_sharding_constraint(flat, self._rows)

        return jax.tree.map(one, pieces)

    def join(self, stacked: Array) -> Array:
        """All microbatches' outputs `[k, N m, D]`, back to the batch's order, `[B, D]`."""
        k, _, width = stacked.shape
        x = stacked.reshape(k, self.devices, self.microbatch, width)
        flat = jnp.moveaxis(x, 0, 1).reshape(-1, width)
        return lax.with_sharding_constraint(flat, self._rows)
