"""Tests every method, kind and number of devices against the dense reference, to 1e-5 in fp32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from disco_jax.losses import KINDS, contrastive_loss, local_contrastive_loss
from tests.conftest import mesh_of
from tests.losses_common import (
    KINDS_AND_PATHS,
    PATHS,
    arguments,
    dense,
    features,
    labels,
    relative_errors,
    value_and_grads,
)

DISTRIBUTED = ("reference", "disco", "stream", "ring")
EVERY = ("auto", *DISTRIBUTED)  # `default` is one of these


def sharded(args: tuple, mesh, **kwargs) -> list[np.ndarray]:
    return value_and_grads(lambda *a: contrastive_loss(*a, mesh=mesh, **kwargs), args)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize(("kind", "path"), KINDS_AND_PATHS)
def test_equals_reference(kind, path, devices):
    args = arguments(kind)
    got = sharded(args, mesh_of(devices), kind=kind, **PATHS[path])
    assert max(relative_errors(got, dense(kind, args))) < 1e-5


@pytest.mark.parametrize("devices", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "path"), KINDS_AND_PATHS)
def test_weights_and_groups(kind, path, devices):
    args, extra = arguments(kind), labels(48)
    got = sharded(args, mesh_of(devices), kind=kind, **PATHS[path], **extra)
    assert max(relative_errors(got, dense(kind, args, **extra))) < 1e-5


@pytest.mark.parametrize("method", DISTRIBUTED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_zero_is_a_sample_that_is_not_there(kind, method):
    """Padding rows change neither the loss nor the gradients of the other rows."""
    args = arguments(kind, batch=16)
    real = np.delete(np.arange(16), [3, 9, 10, 15])
    weights = np.zeros(16, np.float32)
    weights[real] = 1
    got = sharded(args, mesh_of(4), kind=kind, method=method, weights=weights)
    expected = dense(kind, (args[0][real], args[1][real], *args[2:]))
    assert not got[1][[3, 9]].any()
    got[1], got[2] = got[1][real], got[2][real]
    assert max(relative_errors(got, expected)) < 1e-5


@pytest.mark.parametrize(
    ("method", "placed"),
    [(method, P("data")) for method in EVERY]
    + [(method, p) for method in ("auto", "ring") for p in (None, P(), P(None, "data"))],
)
def test_meshes_with_explicit_axes(method, placed):
    """Explicit axes are the default of `jax.make_mesh`. Features may have any sharding or none."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    assert mesh.axis_types == (AxisType.Explicit,)
    image, text, scale = arguments("softmax")
    expected = dense("softmax", (image, text, scale), **(extra := labels(48)))
    if placed is not None:
        image, text = jax.device_put((image, text), NamedSharding(mesh, placed))
    with jax.set_mesh(mesh):
        got = sharded((image, text, scale), mesh, method=method, **extra)
    assert max(relative_errors(got, expected)) < 1e-5


@pytest.mark.parametrize(
    ("method", "kind"), [*((method, "softmax") for method in EVERY), ("auto", "sigmoid")]
)
def test_explicit_axes_in_a_jit_of_inputs_on_one_device(method, kind):
    """Without `jax.set_mesh`, the devices are known only from the `mesh` argument."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    args, extra = arguments(kind), labels(48)

    def loss(*args):
        return contrastive_loss(*args, mesh=mesh, kind=kind, method=method, **extra)

    assert max(relative_errors(value_and_grads(loss, args), dense(kind, args, **extra))) < 1e-5


@pytest.mark.parametrize("axis_name", [None, "data", "fsdp"])
def test_meshes_with_axes_of_both_types(axis_name):
    types = (AxisType.Auto, AxisType.Explicit)
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), types, devices=jax.devices()[:4])
    args = arguments("softmax")
    with jax.set_mesh(mesh):
        got = sharded(args, mesh, axis_name=axis_name)
    assert max(relative_errors(got, dense("softmax", args))) < 1e-5
    with pytest.raises(ValueError, match="'auto' needs mesh axes of one type"):
        contrastive_loss(*args, mesh=mesh, method="auto")


@pytest.mark.parametrize("method", EVERY)
def test_all_weights_zero_is_a_loss_of_zero(method):
    got = sharded(arguments("softmax"), mesh_of(4), method=method, weights=np.zeros(48, np.float32))
    assert all(np.all(x == 0) for x in got)


@pytest.mark.parametrize("tile", [1, 5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["stream", "ring"])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_need_divide_nothing(kind, method, tile):
    args, extra = arguments(kind), labels(48)
    got = sharded(args, mesh_of(4), kind=kind, method=method, tile=tile, **extra)
    assert max(relative_errors(got, dense(kind, args, **extra))) < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ["softmax", "softmax_hot", "sigmoid"])
def test_equals_openclip(case, path, golden):
    """Compares with ClipLoss and SigLipLoss of OpenCLIP 3.3.0, including all gradients."""
    data = load_file(golden / "losses.safetensors")
    kind = case.removesuffix("_hot")
    names = ["scale", "bias"] if kind == "sigmoid" else ["scale"]
    args = (data["image"], data["text"], *(data[f"{case}.{name}"].reshape(()) for name in names))
    got = sharded(args, mesh_of(8), kind=kind, **PATHS[path])
    expected = [data[f"{case}.{name}"] for name in ["loss", "d_image", "d_text"]]
    expected += [data[f"{case}.d_{name}"] for name in names]
    expected = [x.reshape(y.shape) for x, y in zip(expected, got, strict=True)]
    assert max(relative_errors(got, expected)) < 1e-5


def float64_loss(kind: str, image, text, scale, bias=0.0) -> float:
    """Returns the loss by its definition, in NumPy and float64, with no code from the library."""
    logits = scale * image @ text.T + bias
    if kind == "sigmoid":
        signs = 2 * np.eye(len(image)) - 1
        return float(np.sum(np.log1p(np.exp(-signs * logits)))) / len(image)
    rows, columns = (np.log(np.exp(logits).sum(axis=axis)) for axis in (1, 0))
    return float(np.mean(rows + columns - 2 * np.diagonal(logits))) / 2


@pytest.mark.parametrize(("kind", "path"), KINDS_AND_PATHS)
def test_gradients_equal_finite_differences_in_float64(kind, path):
    """Checks every entry of every gradient against central differences of the definition."""
    args = arguments(kind, batch=8, dim=6, scale=3.0)
    exact = [np.asarray(x, np.float64) for x in args]
    expected = [np.asarray(float64_loss(kind, *exact))]
    for i, x in enumerate(exact):
        gradient = np.zeros(x.shape)
        for index in np.ndindex(x.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [y.copy() for y in exact]
                moved[i][index] += step
                ends.append(float64_loss(kind, *moved))
            gradient[index] = (ends[0] - ends[1]) / 2e-5
        expected.append(gradient)
    got = sharded(args, mesh_of(2), kind=kind, **PATHS[path])
    assert max(relative_errors(got, expected)) < 1e-5


@pytest.mark.parametrize(("kind", "path"), KINDS_AND_PATHS)
def test_extreme_logits(kind, path):
    """A scale of 10,000, identical rows and opposite pairs cause neither overflow nor NaN."""
    image, text = features(16, 8)
    for image_, text_ in ((image, text), (image, -image), (np.repeat(image[:1], 16, 0),) * 2):
        args = (image_, text_, jnp.float32(1e4), *arguments(kind)[3:])
        got = sharded(args, mesh_of(4), kind=kind, **PATHS[path])
        assert all(np.isfinite(x).all() for x in got)
        expected = dense(kind, args)
        # Logits of 1e4 are rounded to 1e-3 before they are used.
        assert got[0] == pytest.approx(expected[0], rel=1e-5, abs=4 * 1e4 * 2**-23)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "tile"), [(method, None) for method in EVERY] + [("stream", 5), ("ring", 5)]
)
def test_a_confident_pair_costs_nothing(method, tile, dtype):
    """Its logit is exactly the number in the log-sum-exp, however it was rounded.

    No negative comes within 50 of it, so the loss is log(1 + exp(-50)), which is 0 in fp32. Only
    the product with the scale may be rounded in one place and fused with a subtraction in another.
    Elementwise sums of bf16 features would give 3e-5 here.
    """
    image, _ = features(16, 300)
    cosines = image @ image.T - 2 * np.eye(16)
    assert cosines.max() < 0.5
    image = jnp.asarray(image, dtype)
    loss = jax.jit(
        lambda x, s: contrastive_loss(x, x, s, mesh=mesh_of(4), method=method, tile=tile)
    )
    assert abs(float(loss(image, jnp.float32(100.0)))) < 1e-6


@pytest.mark.parametrize(("kind", "path"), KINDS_AND_PATHS)
def test_bfloat16_features_accumulate_in_float32(kind, path):
    args = arguments(kind, batch=64, dim=64)
    rounded = tuple(jnp.asarray(x, jnp.bfloat16) for x in args[:2])
    got = sharded((*rounded, *args[2:]), mesh_of(4), kind=kind, **PATHS[path])
    exact = tuple(np.asarray(x, np.float32) for x in rounded)
    errors = relative_errors([x.astype(np.float32) for x in got], dense(kind, (*exact, *args[2:])))
    assert got[0].dtype == np.float32
    assert got[1].dtype == jnp.bfloat16
    assert errors[0] < 1e-5  # only the inputs of the loss are bf16
    assert max(errors) < 1e-2  # gradients are returned in bf16, which has 8 bits


@pytest.mark.parametrize("method", DISTRIBUTED)
def test_batch_split_over_two_mesh_axes(method):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    args = arguments("softmax")
    got = sharded(args, mesh, method=method)
    assert max(relative_errors(got, dense("softmax", args))) < 1e-5


@pytest.mark.parametrize("method", DISTRIBUTED)
def test_batch_split_over_one_of_two_mesh_axes(method):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    args = arguments("softmax")
    got = sharded(args, mesh, method=method, axis_name="data")
    assert max(relative_errors(got, dense("softmax", args))) < 1e-5


@pytest.mark.parametrize("spec", [P(), P(None, "data")])
@pytest.mark.parametrize("method", EVERY)
def test_inputs_may_lie_anywhere_on_the_mesh(method, spec):
    """Inputs may be replicated or split along D."""
    mesh = mesh_of(4)
    args = arguments("softmax")
    placed = tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x in args[:2])
    got = sharded((*placed, args[2]), mesh, method=method)
    assert max(relative_errors(got, dense("softmax", args))) < 1e-5


@pytest.mark.parametrize("method", DISTRIBUTED)
@pytest.mark.parametrize("kind", KINDS)
def test_inside_a_larger_shard_map(kind, method):
    """Towers and loss run in one shard_map, rematerialized, under jit and grad."""
    mesh = mesh_of(4)
    image, text, *scalars = arguments(kind)
    weight = np.random.default_rng(2).normal(size=(16, 16)).astype(np.float32)

    def tower(x, weight):
        y = jnp.tanh(x @ weight)
        return y / jnp.linalg.norm(y, axis=1, keepdims=True)

    @jax.checkpoint
    def local(weight, image, text, *scalars):
        loss = local_contrastive_loss(
            tower(image, weight), text, *scalars, axis_name="data", kind=kind, method=method
        )
        return 3 * loss**2

    step = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data"), *(P() for _ in scalars)),
        out_specs=P(),
    )
    got = value_and_grads(step, (weight, image, text, *scalars))
    expected = value_and_grads(
        lambda w, i, t, *s: (
            3 * contrastive_loss(tower(i, w), t, *s, mesh=mesh, kind=kind, method="auto") ** 2
        ),
        (weight, image, text, *scalars),
    )
    assert max(relative_errors(got, expected)) < 1e-5


def test_replicated_features_inside_shard_map_are_an_error():
    image, text, scale = arguments("softmax")

    def local(image, text, scale):
        return local_contrastive_loss(image, text, scale, axis_name="data")

    step = jax.shard_map(local, mesh=mesh_of(4), in_specs=(P(), P("data"), P()), out_specs=P())
    with pytest.raises(ValueError, match="image is replicated over axis_name 'data'"):
        step(image, np.tile(text, (4, 1)), scale)


IMAGE, TEXT, SCALE = arguments("softmax")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text": TEXT[:, :8]}, "image .* and text .* differ in shape"),
        ({"text": TEXT[:24]}, "image .* and text .* differ in shape"),
        ({"image": IMAGE[0]}, "image must have shape"),
        ({"image": IMAGE.astype(np.int32)}, "image must be float32 or bfloat16, not int32"),
        ({"image": IMAGE.astype(np.float16)}, "image must be float32 or bfloat16, not float16"),
        ({"text": TEXT.astype(np.float64)}, "text must be float32 or bfloat16, not float64"),
        ({"text": TEXT.astype(jnp.bfloat16)}, "differ in dtype"),
        ({"image": IMAGE[:45], "text": TEXT[:45]}, "image has 45 rows"),
        ({"logit_scale": jnp.ones(2)}, "logit_scale must be"),
        ({"logit_scale": jnp.int32(3)}, "logit_scale must be"),
        ({"logit_bias": jnp.float32(1)}, "logit_bias is for the sigmoid"),
        ({"kind": "sigmoid"}, "logit_bias is missing"),
        ({"kind": "hinge"}, "kind 'hinge' is not one of"),
        ({"method": "rings"}, "method 'rings' is not one of .* did you mean 'ring'"),
        ({"axis_name": "model"}, "axis_name 'model' is not an axis"),
        ({"tile": 0}, "tile must be"),
        ({"tile": 2.5}, "tile must be"),
        ({"weights": np.ones(47, np.float32)}, "weights must have shape"),
        ({"group_ids": np.ones(48, np.float32)}, "group_ids must be integers"),
        ({"image": IMAGE[:0], "text": TEXT[:0]}, r"image must have shape \[batch, D\], not \(0, "),
        ({"image": [[1.0, 0.0]]}, "image must be an array, not a list"),
        ({"weights": [1.0] * 48}, "weights must be an array, not a list"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    given = {"image": IMAGE, "text": TEXT, "logit_scale": SCALE, "mesh": mesh_of(4)} | changed
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**given)
