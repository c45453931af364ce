"""Tests the towers against OpenCLIP's outputs and their initial values against CLIP's code."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from disco_jax.config import default
from disco_jax.config.remat import parse_remat
from disco_jax.errors import UserError
from disco_jax.models import (
    CLIP,
    PRESETS,
    CLIPConfig,
    TextConfig,
    VisionConfig,
    abstract_model,
    preset,
)
from disco_jax.models.attention import TOKEN_MULTIPLE, project
from disco_jax.models.build import model_config
from disco_jax.models.transformer import LayerNorm, gelu
from disco_jax.step.gradients import make_model_fns, split
from tests.conftest import mesh_of


def openclip_config(spec: dict, **changes) -> CLIPConfig:
    vision, text = spec["vision_cfg"], spec["text_cfg"]
    activation = "quick_gelu" if spec["quick_gelu"] else "gelu"
    return CLIPConfig(
        embed_dim=spec["embed_dim"],
        vision=VisionConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["width"],
            layers=vision["layers"],
            heads=vision["width"] // vision["head_width"],
            mlp_ratio=vision.get("mlp_ratio", 4.0),
            activation=activation,
        ),
        text=TextConfig(
            context_length=text["context_length"],
            vocab_size=text["vocab_size"],
            width=text["width"],
            layers=text["layers"],
            heads=text["heads"],
            mlp_ratio=text.get("mlp_ratio", 4.0),
            activation=activation,
        ),
        **changes,
    )


def openclip_params(weights: dict[str, np.ndarray], layers: dict[str, int]) -> dict:
    """Converts OpenCLIP's state dict to our parameters: kernels transposed, layers stacked."""

    def norm(name):
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def blocks(prefix, count):
        def stack(name, transpose=False):
            arrays = [weights[f"{prefix}transformer.resblocks.{i}.{name}"] for i in range(count)]
            return np.stack([a.T if transpose else a for a in arrays])

        def linear(name, weight=".weight", bias=".bias"):
            return {"kernel": stack(name + weight, True), "bias": stack(name + bias)}

        return {
            "blocks": {
                "ln_1": {"scale": stack("ln_1.weight"), "bias": stack("ln_1.bias")},
                "ln_2": {"scale": stack("ln_2.weight"), "bias": stack("ln_2.bias")},
                "in_proj": linear("attn.in_proj", "_weight", "_bias"),
                "out_proj": linear("attn.out_proj"),
                "mlp_in": linear("mlp.c_fc"),
                "mlp_out": linear("mlp.c_proj"),
            }
        }

    conv = weights["visual.conv1.weight"]  # [width, 3, p, p]
    return {
        "visual": {
            "patch_embed": {"kernel": conv.transpose(2, 3, 1, 0).reshape(-1, len(conv))},
            "class_embedding": weights["visual.class_embedding"],
            "positional_embedding": weights["visual.positional_embedding"],
            "ln_pre": norm("visual.ln_pre"),
            "ln_post": norm("visual.ln_post"),
            "proj": weights["visual.proj"],
            "transformer": blocks("visual.", layers["visual"]),
        },
        "text": {
            "token_embedding": {"embedding": weights["token_embedding.weight"]},
            "positional_embedding": weights["positional_embedding"],
            "ln_final": norm("ln_final"),
            "proj": weights["text_projection"],
            "transformer": blocks("", layers["text"]),
        },
        "logit_scale": weights["logit_scale"],
    }


@pytest.mark.parametrize("changes", [{}, {"unroll": 2}], ids=str)
@pytest.mark.parametrize("name", ["openclip_tiny_gelu", "openclip_tiny_quickgelu"])
def test_features_equal_openclips(name, changes, golden):
    spec = json.loads((golden / f"{name}.json").read_text())
    config = openclip_config(spec, **changes)
    layers = {"visual": config.vision.layers, "text": config.text.layers}
    params = openclip_params(load_file(golden / f"{name}.weights.safetensors"), layers)
    io = load_file(golden / f"{name}.io.safetensors")
    graph, own = nnx.split(CLIP(config, rngs=nnx.Rngs(0)), nnx.Param)
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(own))
    assert jax.tree.map(np.shape, params) == shapes  # no parameter is missing or left over
    clip = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
    image = jax.jit(clip.visual)(io["images_nchw"].transpose(0, 2, 3, 1))
    text = jax.jit(clip.text)(io["tokens"])
    np.testing.assert_allclose(image, io["image_features"], atol=1e-4)
    np.testing.assert_allclose(text, io["text_features"], atol=1e-4)


def test_gelu_and_its_gradient():
    """Compares with `x Φ(x)` by math.erf, and the gradient with central differences in float64."""
    from math import erf, sqrt

    x = np.linspace(-6, 6, 101)
    expected = np.array([v * 0.5 * (1 + erf(v / sqrt(2))) for v in x])
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), expected, atol=1e-6)
    h = 1e-5
    slope = np.array(
        [
            (
                (v + h) * 0.5 * (1 + erf((v + h) / sqrt(2)))
                - (v - h) * 0.5 * (1 + erf((v - h) / sqrt(2)))
            )
            / (2 * h)
            for v in x
        ]
    )
    got = jax.vmap(jax.grad(gelu))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, slope, atol=1e-5)


def tiny(**changes) -> CLIPConfig:
    return dataclasses.replace(
        CLIPConfig(
            embed_dim=24,
            vision=VisionConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2),
            text=TextConfig(context_length=8, vocab_size=64, width=32, layers=2, heads=2),
        ),
        **changes,
    )


@jax.numpy_dtype_promotion("standard")  # Flax's LayerNorm takes its statistics in fp32
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    clip = CLIP(tiny(dtype="bfloat16"), rngs=nnx.Rngs(0))
    exact = CLIP(tiny(), rngs=nnx.Rngs(0))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(clip, nnx.Param))} == {jnp.dtype("float32")}
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    features = clip.encode_image(images)
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features, exact.encode_image(images), atol=0.03)
    jaxpr = str(jax.make_jaxpr(nnx.split(clip)[0] and (lambda x: clip.visual(x)))(images))
    assert "bf16[20,96]" in jaxpr  # 4 images of 5 tokens, through the first projection


def test_a_norms_gain_keeps_its_digits_in_bfloat16():
    """1.0 and 1.0019 are equal in bf16. The result is rounded only once, after the norm."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.bfloat16)
    norm = LayerNorm(tiny().vision, rngs=nnx.Rngs(0))
    norm.bias[...] = jnp.full(32, 1e-3, jnp.float32)
    for gain in (1.0, 1.0019):
        norm.scale[...] = jnp.full(32, gain, jnp.float32)
        exact = np.asarray(x, np.float64)
        exact = exact - exact.mean(axis=1, keepdims=True)
        exact *= gain / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5)
        got = norm(x)
        assert got.dtype == jnp.bfloat16
        rounded = (exact + 1e-3).astype(jnp.bfloat16)
        assert np.mean(np.asarray(got) == rounded) > 0.999  # except for ties that fp32 broke


@pytest.mark.slow
def test_remat_gives_the_same_gradients_for_less_memory():
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3)).astype(np.uint8)

    def gradients_and_bytes(remat):
        policy, blocks = parse_remat(remat)
        vision = dataclasses.replace(tiny().vision, layers=8, remat=policy, remat_blocks=blocks)
        graph, params = nnx.split(CLIP(tiny(vision=vision), rngs=nnx.Rngs(0)), nnx.Param)

        def total(p):
            return jnp.sum(jnp.sin(9 * nnx.merge(graph, p).encode_image(images)))

        program = jax.jit(jax.grad(total)).lower(params).compile()
        return program(params), program.memory_analysis().temp_size_in_bytes

    expected, most = gradients_and_bytes("none")
    used = {"none": most}
    for remat in ("dots", "branches", "full", "offload", "dots:4", "none:2"):
        got, used[remat] = gradients_and_bytes(remat)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    assert used["full"] < used["branches"] < used["dots"] < 0.9 * most
    assert used["full"] < used["dots:4"] < used["dots"]
    assert used["full"] < used["none:2"] < 0.6 * most
    assert used["offload"] < 0.9 * most


@pytest.mark.parametrize("tower", ["image", "text"])
def test_padding_for_attention_changes_nothing(tower, monkeypatch):
    """cuDNN needs an even number of tokens. XLA's attention stands in for it here.

    cuDNN may leave anything in the gradients of padded keys and values, here NaN.
    """
    inputs = {
        "image": np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8),
        "text": np.array([[62, 5, 6, 63, 0], [62, 63, 0, 0, 0], [62, 5, 6, 7, 63]], np.int32),
    }[tower]
    graph, params = nnx.split(CLIP(tiny(), rngs=nnx.Rngs(0)), nnx.Param)

    def total(p):
        model = nnx.merge(graph, p)
        return jnp.sum(jnp.sin(9 * getattr(model, f"encode_{tower}")(inputs)))

    expected = jax.value_and_grad(total)(params)
    seen = []

    def attention(q, k, v, *, key_value_seq_lengths, implementation, **options):
        seen.append(q.shape[1])
        assert implementation == "xla"
        causal = options["is_causal"]
        lengths = None if causal else key_value_seq_lengths
        if not causal:
            k, v = (nan_gradient_beyond(x, lengths) for x in (k, v))
        return known(q, k, v, key_value_seq_lengths=lengths, **options)

    known = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    monkeypatch.setitem(TOKEN_MULTIPLE, "xla", 2)
    got = jax.value_and_grad(total)(params)
    assert set(seen) == {6}  # 5 tokens and one of padding
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    "remat", ["dots:1", *(pytest.param(x, marks=pytest.mark.slow) for x in ("none:2", "full"))]
)
@pytest.mark.parametrize("trained", [-1, 2])
def test_blocks_frozen_padded_or_rematerialized_give_the_same(trained, remat, monkeypatch):
    """Texts of several lengths, with dropout, in a tower of which some blocks may be frozen."""
    policy, blocks = parse_remat(remat)

    def value_and_gradients(**fields):
        text = dataclasses.replace(tiny().text, layers=3, dropout=0.3, **fields)
        graph, params = nnx.split(CLIP(tiny(text=text), rngs=nnx.Rngs(0)), nnx.Param)
        keys = jax.random.split(jax.random.key(0), 5)

        def total(p):
            features = nnx.merge(graph, p).text.of_pieces(pieces, keys)
            return jnp.sum(jnp.sin(9 * features))

        return jax.jit(jax.value_and_grad(total))(params)

    rows = np.array([[62, 63, 0, 0, 0], [62, 5, 63, 0, 0], [62, 5, 6, 7, 63]], np.int32)
    pieces = (rows[:2, :3], rows[:3, :5])
    expected = value_and_gradients(trained_blocks=trained)
    monkeypatch.setitem(TOKEN_MULTIPLE, "xla", 2)
    got = value_and_gradients(trained_blocks=trained, remat=policy, remat_blocks=blocks)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_cudnn_gets_queries_keys_and_values_without_copies():
    """Three matmuls give what one gives, and no matmul's output is split, forward or backward."""
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((6, 4), (4, 12), (12,)))

    def total(attention, x):
        return sum(jnp.sum(jnp.sin(y)) for y in project(x, kernel, bias, attention))

    gradient = jax.grad(total, 1)
    np.testing.assert_allclose(gradient("cudnn", x), gradient("xla", x), rtol=1e-5)
    jaxpr = jax.make_jaxpr(gradient, static_argnums=0)("cudnn", x)
    results = [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert results == [(6, 4)] * 6


@pytest.mark.parametrize(
    "field", ["image_trained_blocks", "text_trained_blocks", "image_remat", "text_remat"]
)
def test_more_blocks_than_a_tower_has_are_refused(field):
    config = default()
    config.model.name = "ViT-B-32"
    config.model[field] = "dots:13" if field.endswith("remat") else 13
    with pytest.raises(UserError, match=rf"model\.{field} is .*13; it must be at most 12 blocks"):
        model_config(config)


@jax.custom_vjp
def nan_gradient_beyond(x, lengths):
    """Identity on `[b, n, heads, head_dim]`, with NaN gradients beyond each sample's length."""
    del lengths
    return x


def _nan_backward(lengths, g):
    beyond = jnp.arange(g.shape[1])[None] >= lengths[:, None]
    return jnp.where(beyond[:, :, None, None], jnp.nan, g), None


nan_gradient_beyond.defvjp(lambda x, lengths: (x, lengths), _nan_backward)


def test_text_is_causal_and_pooled_at_the_end_token():
    clip = CLIP(tiny(), rngs=nnx.Rngs(0))
    tokens = np.array([[62, 5, 6, 63, 0, 0, 0, 0]], np.int32)
    changed = tokens.copy()
    changed[0, 4:] = [7, 8, 9, 10]  # after the end token (the highest id): no effect
    np.testing.assert_array_equal(clip.encode_text(tokens), clip.encode_text(changed))
    changed[0, 1] = 7
    assert np.abs(clip.encode_text(tokens) - clip.encode_text(changed)).max() > 1e-3


def test_initial_values_are_clips():
    config = preset("ViT-B-32")
    small = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, layers=2),
        text=dataclasses.replace(config.text, layers=2),
    )
    params = nnx.to_pure_dict(nnx.state(CLIP(small, rngs=nnx.Rngs(0)), nnx.Param))
    text, visual = params["text"], params["visual"]
    blocks = text["transformer"]["blocks"]
    w = 512
    for array, std in (
        (text["token_embedding"]["embedding"], 0.02),
        (text["positional_embedding"], 0.01),
        (text["proj"], w**-0.5),
        (blocks["in_proj"]["kernel"], w**-0.5),
        (blocks["out_proj"]["kernel"], w**-0.5 * (2 * 2) ** -0.5),
        (blocks["mlp_in"]["kernel"], (2 * w) ** -0.5),
        (blocks["mlp_out"]["kernel"], w**-0.5 * (2 * 2) ** -0.5),
        (visual["class_embedding"], 768**-0.5),
        (visual["positional_embedding"], 768**-0.5),
        (visual["proj"], 768**-0.5),
        # PyTorch's defaults: Xavier-uniform, and uniform in ±1/sqrt(fan_in).
        (visual["transformer"]["blocks"]["in_proj"]["kernel"], (2 / (4 * 768)) ** 0.5),
        (visual["transformer"]["blocks"]["mlp_in"]["kernel"], (1 / (3 * 768)) ** 0.5),
        (visual["transformer"]["blocks"]["mlp_out"]["kernel"], (1 / (3 * 3072)) ** 0.5),
        (visual["patch_embed"]["kernel"], (1 / (3 * 3 * 32 * 32)) ** 0.5),
        (blocks["mlp_in"]["bias"], (1 / (3 * w)) ** 0.5),
        (blocks["mlp_out"]["bias"], (1 / (3 * 4 * w)) ** 0.5),
    ):
        assert np.std(array) == pytest.approx(std, rel=0.1)
    assert np.exp(params["logit_scale"]) == pytest.approx(1 / 0.07, rel=1e-5)


# Millions of parameters of OpenCLIP's models of these names, from its model_profile.csv.
@pytest.mark.parametrize(
    ("name", "millions"), [("ViT-B-32", 151.28), ("ViT-B-16", 149.62), ("ViT-L-14", 427.62)]
)
def test_presets_have_openclips_sizes(name, millions):
    shapes = nnx.state(nnx.eval_shape(lambda: CLIP(PRESETS[name], rngs=nnx.Rngs(0))), nnx.Param)
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_mistakes_in_sizes_are_named():
    with pytest.raises(ValueError, match="unknown model 'ViT-B-64'; known are ViT-B-32"):
        preset("ViT-B-64")
    with pytest.raises(ValueError, match="image_size 20 is not a multiple of patch_size 8"):
        CLIP(tiny(vision=VisionConfig(image_size=20, patch_size=8)), rngs=nnx.Rngs(0))
    clip = CLIP(tiny(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="images are 8 x 8; the model takes 16 x 16"):
        clip.encode_image(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="texts have 9 tokens; the model takes 8"):
        clip.encode_text(np.zeros((1, 9), np.int32))


@pytest.mark.parametrize("name", PRESETS)
def test_norms_and_scalars_stay_in_fp32(name):
    """They are not cast, even if the towers compute in bf16. Flax calls a norm's gain `scale`."""
    config = dataclasses.replace(preset(name), dtype="bfloat16")
    towers, _ = split(abstract_model(config)[1])
    fns = make_model_fns(default(), config, mesh_of(1))
    cast = jax.tree_util.tree_leaves_with_path(jax.eval_shape(fns.cast_params, towers))
    norms = {path[:-1] for path, _ in cast if path[-1].key == "scale"}
    assert len(norms) == 7  # 2 in each tower's blocks, 2 more for images, 1 more for texts
    for path, x in cast:
        assert x.dtype == ("float32" if path[:-1] in norms else "bfloat16"), path
