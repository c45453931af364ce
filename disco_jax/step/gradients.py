"""The loss of a batch and its gradients: in a single pass, or exactly by microbatches.

Contrastive gradients need all features at once, but not all activations. With microbatches
(GradCache, Gao et al., 2021), a step first encodes every microbatch and keeps only its features.
One loss over all features gives dL/dfeatures. The step then encodes each microbatch again, pulls
its dL/dfeatures back and accumulates the gradients. Random keys are derived from a sample's place
in the batch, so both passes, and any division of the batch, apply the same dropout.

Each device encodes its own samples and accumulates its own gradients of the towers. They are summed
over the devices only once per step (`sum_over_devices`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from disco_jax.losses import contrastive_loss
from disco_jax.losses.collectives import to_varying
from disco_jax.mesh import BATCH_AXES, batch_sharding, state_sharding
from disco_jax.models import CLIPConfig, Params, abstract_model
from disco_jax.models.group_choice import groups_of
from disco_jax.models.text_groups import Groups, too_long
from disco_jax.step import scopes
from disco_jax.step.labels import NO_LABELS, Labels
from disco_jax.step.state import trained, with_trained

Array = jax.Array
Batch = dict[str, Array]
Features = tuple[Array, Array]  # of images and of texts, fp32 `[n, D]` each
GradientFn = Callable[..., tuple[Array, Params]]  # (parameters, samples, step, labels)

SCALARS = ("logit_scale", "logit_bias")
ROWS = P(BATCH_AXES)


class ModelFns(NamedTuple):
    """The functions that gradients are built from, for one config, model and mesh."""

    # fp32 parameters of the towers, sharded or not -> in their compute dtype, replicated
    cast_params: Callable[[Params], Params]
    # (cast parameters, samples, their places in the batch, step) -> features
    encode: Callable[[Params, Batch, Array, Array], Features]
    # (scalar parameters, features of the whole batch, its labels) -> loss
    loss: Callable[[Params, Features, Labels], Array]
    # of the texts that a device encodes at once; empty if they are encoded at full length
    groups: Groups


def make_model_fns(config: ConfigDict, model: CLIPConfig, mesh: Mesh) -> ModelFns:
    """Returns the functions that `whole_batch`, `by_microbatches` and `HostStep` build on."""
    graph, abstract = abstract_model(model)
    root = jax.random.key(config.seed)
    random = bool(config.model.dropout or config.model.patch_dropout)
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def groups(count: int) -> Groups:
        return groups_of(config.model.text_groups, count, model.text)

    def cast_params(params: Params) -> Params:
        cast = jax.tree_util.tree_map_with_path(
            lambda path, x: x.astype(model.dtype) if _computes_in_dtype(path) else x, params
        )
        return jax.tree.map(lambda x: gather_parameter(mesh, x), cast)

    def keys(tower: int, trained_blocks: int, places: Array, step: Array) -> Array | None:
        """Returns one key per sample, from one stream per tower; None if nothing is dropped."""
        if not random or not trained_blocks:
            return None
        key = jax.random.fold_in(jax.random.fold_in(root, step), tower)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, places)

    def encode(params: Params, samples: Batch, places: Array, step: Array) -> Features:
        scalars = {name: x for name, x in abstract.items() if name in SCALARS}  # unused here
        clip = nnx.merge(graph, params | scalars)
        with jax.named_scope(scopes.IMAGE_TOWER):
            image = clip.encode_image(
                samples["images"], keys(0, model.vision.trained_blocks, places, step)
            )
        if on_cpu:  # one tower at a time: in parallel they compete for cores and caches
            # Not through frozen parameters: a barrier would differentiate with respect to them.
            image, changing = lax.optimization_barrier((image, trained(model, params)))
            params = with_trained(model, params, changing)
        tokens = samples["tokens"]
        with jax.named_scope(scopes.TEXT_TOWER):
            return image, nnx.merge(graph, params | scalars).encode_text(
                tokens, keys(1, model.text.trained_blocks, places, step), groups(len(tokens))
            )

    def loss(scalars: Params, features: Features, labels: Labels) -> Array:
        return batch_loss(config, mesh, scalars, features, labels)

    return ModelFns(cast_params, encode, loss, groups(texts_at_once(config, mesh.devices.size)))


@jax.named_scope(scopes.LOSS)
def batch_loss(
    config: ConfigDict,
    mesh: Mesh,
    scalars: Params,
    features: Features,
    labels: Labels = NO_LABELS,
) -> Array:
    """Returns the loss of a whole batch, as `config.loss` says."""
    image, text = (x.astype(config.loss.dtype) for x in features)
    return contrastive_loss(
        image,
        text,
        jnp.exp(scalars["logit_scale"]),
        scalars.get("logit_bias"),
        mesh=mesh,
        kind=config.loss.kind,
        method=config.loss.method,
        keep_bytes=config.loss.keep_bytes,
        precision=config.loss.precision,
        **labels._asdict(),
    )


def _computes_in_dtype(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is used in the compute dtype; norms and the scalars stay in fp32."""
    names = [entry.key for entry in path]
    return names[0] not in SCALARS and not any(n == "ln" or n.startswith("ln_") for n in names)


def gather_parameter(mesh: Mesh, x: Array) -> Array:
    """Gathers a parameter on every device in its dtype; XLA might gather it before the cast."""
    spec = state_sharding(mesh, x.shape).spec
    axis = _split_axis(spec)
    if axis is None:
        return x

    def local(x: Array) -> Array:
        return lax.all_gather(x, "fsdp", axis=axis, tiled=True)

    # check_vma can't infer that the gathered array is the same on all devices.
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=P(), check_vma=False)(x)


def _split_axis(spec: P) -> int | None:
    """Returns the dimension that `fsdp` splits, or None."""
    return tuple(spec).index("fsdp") if "fsdp" in tuple(spec) else None


def split(params: Params) -> tuple[Params, Params]:
    """Splits parameters into those of the towers and the scalars of the loss."""
    towers = {name: x for name, x in params.items() if name not in SCALARS}
    return towers, {name: x for name, x in params.items() if name in SCALARS}


def whole_batch(config: ConfigDict, fns: ModelFns, model: CLIPConfig, mesh: Mesh) -> GradientFn:
    """Returns a function that computes loss and gradients in a single pass."""

    def encode(towers: Params, own: Params, samples: Batch, step: Array) -> Features:
        """Returns this device's features, given its own copy `[1, ...]` of trained parameters."""
        changing = jax.tree.map(lambda x: x[0], own)
        places = own_places(len(samples["tokens"]))
        return fns.encode(with_trained(model, towers, changing), samples, places, step)

    encode_all = jax.shard_map(encode, mesh=mesh, in_specs=(P(), ROWS, ROWS, P()), out_specs=ROWS)

    def gradient(
        params: Params, batch: Batch, step: Array, labels: Labels = NO_LABELS
    ) -> tuple[Array, Params]:
        towers, scalars = split(params)
        towers = fns.cast_params(towers)

        def loss(copies: Params, scalars: Params) -> Array:
            return fns.loss(scalars, encode_all(towers, copies, batch, step), labels)

        copies = one_each(mesh, trained(model, towers))
        value, (own, d_scalars) = jax.value_and_grad(loss, (0, 1))(copies, scalars)
        return value, sum_over_devices(mesh, own, config.reduce_dtype) | d_scalars

    return gradient


def by_microbatches(config: ConfigDict, fns: ModelFns, model: CLIPConfig, mesh: Mesh) -> GradientFn:
    """Like `whole_batch`, with activations of only `config.microbatch` samples a device at once."""

    def fold(x: Array) -> Array:
        """Reshapes a device's `[b, ...]` to `[k, m, ...]`: k microbatches of m samples."""
        return x.reshape(-1, config.microbatch, *x.shape[1:])

    def forward(towers: Params, samples: Batch, step: Array) -> Features:
        def turn(_: None, piece: tuple[Batch, Array]) -> tuple[None, Features]:
            return None, fns.encode(towers, *piece, step)

        pieces = jax.tree.map(fold, (samples, own_places(len(samples["tokens"]))))
        _, features = lax.scan(turn, None, pieces)
        return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), features)

    def backward(towers: Params, samples: Batch, d_features: Features, step: Array) -> Params:
        pull = pullback(fns, model, towers)

        def turn(total: Params, piece: tuple[Batch, Array, Features]) -> tuple[Params, None]:
            return add(total, pull(*piece, step)), None

        places = own_places(len(samples["tokens"]))
        pieces = jax.tree.map(fold, (samples, places, d_features))
        total, _ = lax.scan(turn, zeros(trained(model, towers)), pieces)
        return total

    forward_all = jax.shard_map(forward, mesh=mesh, in_specs=(P(), ROWS, P()), out_specs=ROWS)
    backward_all = jax.shard_map(
        backward, mesh=mesh, in_specs=(P(), ROWS, ROWS, P()), out_specs=ROWS
    )

    def gradient(
        params: Params, batch: Batch, step: Array, labels: Labels = NO_LABELS
    ) -> tuple[Array, Params]:
        towers, scalars = split(params)
        towers = fns.cast_params(towers)
        features = forward_all(towers, batch, step)
        loss = jax.value_and_grad(fns.loss, (0, 1))
        value, (d_scalars, d_features) = loss(scalars, features, labels)
        own = backward_all(towers, batch, d_features, step)
        return value, sum_over_devices(mesh, own, config.reduce_dtype) | d_scalars

    return gradient


def texts_at_once(config: ConfigDict, devices: int) -> int:
    """Returns how many texts a device encodes at once."""
    return config.microbatch or config.batch_size // devices


def share_too_long(groups: Groups, batch: Batch, mesh: Mesh) -> Array:
    """Returns the share of a batch's texts that don't fit their groups, as an fp32 scalar."""
    at_once = sum(count for _, count in groups)

    def share(tokens: Array) -> Array:
        pieces = tokens.reshape(-1, at_once, tokens.shape[-1])
        return jnp.mean(lax.map(lambda piece: too_long(piece, groups), pieces), keepdims=True)

    return jnp.mean(jax.shard_map(share, mesh=mesh, in_specs=ROWS, out_specs=ROWS)(batch["tokens"]))


def own_places(count: int) -> Array:
    """Returns int32 `[count]`: the places of this device's samples in the batch."""
    start = lax.axis_index(BATCH_AXES) * count
    return start + jnp.arange(count, dtype=jnp.int32)


def pullback(
    fns: ModelFns, model: CLIPConfig, towers: Params
) -> Callable[[Batch, Array, Features, Array], Params]:
    """Returns (samples, places, dL/dfeatures, step) -> gradients of what is trained, per device."""
    # Each device has its own copy: gradients of a shared one would be summed immediately.
    changing = jax.tree.map(lambda x: to_varying(x, BATCH_AXES), trained(model, towers))

    def pull(samples: Batch, places: Array, cotangents: Features, step: Array) -> Params:
        def encode(changing: Params) -> Features:
            return fns.encode(with_trained(model, towers, changing), samples, places, step)

        _, transpose = jax.vjp(encode, changing)
        return transpose(cotangents)[0]

    return pull


def one_each(mesh: Mesh, params: Params) -> Params:
    """Returns a copy of replicated parameters for each device, `[N, ...]`, at no memory cost.

    The gradients of these copies are each device's own. Gradients of the parameters themselves
    would be summed over the devices where they arise, in the parameters' dtype.
    """
    shape = (mesh.devices.size,)
    return jax.tree.map(
        lambda x: lax.with_sharding_constraint(
            jnp.broadcast_to(x, shape + x.shape), batch_sharding(mesh)
        ),
        params,
    )


def zeros(params: Params) -> Params:
    """Zero fp32 gradient accumulators on one device, `[1, ...]`."""
    return jax.tree.map(
        lambda x: to_varying(jnp.zeros((1, *x.shape), jnp.float32), BATCH_AXES), params
    )


def add(total: Params, gradients: Params) -> Params:
    """Returns `total + gradients` on one device, in fp32."""
    return jax.tree.map(lambda a, g: a + g.astype(jnp.float32)[None], total, gradients)


@jax.named_scope(scopes.GRADIENTS)
def sum_over_devices(mesh: Mesh, own: Params, dtype: str) -> Params:
    """Sums all devices' gradients `[N, ...]` in `dtype`; returns fp32, sharded like parameters.

    Parameters split over `fsdp` take one psum_scatter over `fsdp` and one psum over `data`; all
    others take one psum over both.
    """

    def reduce(x: Array) -> Array:
        spec = state_sharding(mesh, x.shape[1:]).spec
        axis = _split_axis(spec)

        def local(x: Array) -> Array:
            x = x[0].astype(dtype)
            if axis is None:
                return lax.psum(x, BATCH_AXES).astype(jnp.float32)
            x = lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True)
            return lax.psum(x, "data").astype(jnp.float32)

        return jax.shard_map(local, mesh=mesh, in_specs=ROWS, out_specs=spec)(x)

    return jax.tree.map(reduce, own)
