"""CLIP (Radford et al., 2021): a vision transformer and a causal text transformer.

Parameters are fp32; `dtype` is the compute dtype of both towers. Features leave in fp32.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal, variance_scaling

from disco_jax.models.transformer import (
    Attention,
    Transformer,
    clip_text_init,
    clip_vision_init,
    gelu,
    layer_norm,
    quick_gelu,
)

Array = jax.Array

# Mean and standard deviation of CLIP's training images, RGB in [0, 1] (OpenAI CLIP, `clip.py`).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
INITIAL_LOGIT_SCALE = float(np.log(1 / 0.07))
MAX_LOGIT_SCALE = float(np.log(100.0))


@dataclass(frozen=True)
class VisionConfig:
    """The image tower; sizes in pixels."""

    image_size: int = 224
    patch_size: int = 32
    patch_dropout: float = 0.0  # share of an image's patches left out in training
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    remat: str = "none"  # what the backward pass recomputes: transformer.REMAT
    dropout: float = 0.0  # of what each residual branch adds


@dataclass(frozen=True)
class TextConfig:
    """The text tower. The pooled token is the one with the highest id: CLIP's end of text."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    remat: str = "none"  # what the backward pass recomputes: transformer.REMAT
    dropout: float = 0.0  # of what each residual branch adds


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers, the width of the shared space, and what they have in common."""

    embed_dim: int = 512
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    quick_gelu: bool = False
    dtype: str = "float32"  # compute dtype of the towers
    lock_image: bool = False  # the image tower is not trained (LiT, Zhai et al., 2022)
    logit_bias: float | None = None  # initial value of a learnable bias, as SigLIP has; None: none
    attention: Attention = "xla"  # or cudnn: flash attention, bf16 on NVIDIA's Ampere and later
    unroll: int = 1  # blocks compiled in line at a time: quicker on a CPU, slower to compile


def l2_normalize(x: Array) -> Array:
    """Rows of `[..., D]` scaled to unit length, in fp32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def normalize_pixels(images: Array, dtype: jnp.dtype) -> Array:
    """uint8 `[b, h, w, 3]` to `dtype`, less CLIP's mean, over its deviation.

    Images travel as bytes and are normalised here, on the device that uses them.
    """
    mean, std = (jnp.asarray(c, jnp.float32).reshape(1, 1, 1, 3) for c in (PIXEL_MEAN, PIXEL_STD))
    return ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def drop_patches(x: Array, keys: Array, rate: float) -> Array:
    """Keeps the class token and a random choice of patches of `[b, 1 + n, width]` (FLIP).

    `round(n (1 - rate))` patches are left of each image, at least one. `keys` `[b]`.
    """
    n = x.shape[1] - 1
    kept = max(1, round(n * (1 - rate)))
    scores = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (n,)))(keys)
    chosen = jax.lax.top_k(scores, kept)[1][:, :, None]
    return jnp.concatenate([x[:, :1], jnp.take_along_axis(x[:, 1:], chosen, axis=1)], axis=1)


class VisionTransformer(nnx.Module):
    """ViT with a class token, learned positions, ln_pre, ln_post and a projection."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        c, dtype = config.vision, jnp.dtype(config.dtype)
        if c.image_size % c.patch_size:
            raise ValueError(
                f"vision.image_size {c.image_size} is not a multiple of patch_size {c.patch_size}"
            )
        self.config, self.dtype = c, dtype
        scale = normal(c.width**-0.5)
        patches = (c.image_size // c.patch_size) ** 2
        self.patch_embed = nnx.Linear(
            c.patch_size**2 * 3,
            c.width,
            use_bias=False,
            kernel_init=variance_scaling(1 / 3, "fan_in", "uniform"),
            dtype=dtype,
            rngs=rngs,
        )
        self.class_embedding = nnx.Param(scale(rngs.params(), (c.width,), jnp.float32))
        self.positional_embedding = nnx.Param(
            scale(rngs.params(), (patches + 1, c.width), jnp.float32)
        )
        self.ln_pre = layer_norm(c.width, dtype, rngs)
        mlp_width = int(c.width * c.mlp_ratio)
        self.transformer = Transformer(
            c.width,
            c.layers,
            c.heads,
            mlp_width,
            causal=False,
            activation=quick_gelu if config.quick_gelu else gelu,
            init=clip_vision_init(c.width, mlp_width),
            remat=c.remat,
            dropout=c.dropout,
            unroll=config.unroll,
            attention=config.attention,
            dtype=dtype,
            rngs=rngs,
        )
        self.ln_post = layer_norm(c.width, dtype, rngs)
        self.proj = nnx.Param(scale(rngs.params(), (c.width, config.embed_dim), jnp.float32))

    def __call__(self, images: Array, keys: Array | None = None) -> Array:
        """Un-normalised fp32 features `[b, embed_dim]` of `[b, image_size, image_size, 3]`.

        uint8 images are normalised with CLIP's mean and deviation; floats are taken as they are.
        `keys` `[b]`, a sample's own random key each, turn dropout on.
        """
        embed = self._embed
        if self.config.remat != "none":  # keeps the bytes for the backward pass, not the patches
            embed = jax.checkpoint(embed)
        x = embed(images)
        b, _, width = x.shape
        cls = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (b, 1, width))
        x = jnp.concatenate([cls, x], axis=1)
        x = x + self.positional_embedding[...].astype(self.dtype)[None]
        if keys is not None and self.config.patch_dropout:
            x = drop_patches(x, keys, self.config.patch_dropout)
        x = self.transformer(self.ln_pre(x), keys)
        return (self.ln_post(x[:, 0]) @ self.proj[...].astype(self.dtype)).astype(jnp.float32)

    def _embed(self, images: Array) -> Array:
        """`[b, h, w, 3]` to `[b, patches, width]`, row by row."""
        if images.dtype == jnp.uint8:
            images = normalize_pixels(images, self.dtype)
        images = images.astype(self.dtype)
        b, h, w, channels = images.shape
        p, size = self.config.patch_size, self.config.image_size
        if (h, w) != (size, size):
            raise ValueError(f"images are {h} x {w}, the model takes {size} x {size}")
        x = images.reshape(b, h // p, p, w // p, p, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * channels)
        return self.patch_embed(x)


class TextTransformer(nnx.Module):
    """Causal transformer over byte-pair tokens, pooled at the end of text, and a projection."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        c, dtype = config.text, jnp.dtype(config.dtype)
        self.config, self.dtype = c, dtype
        self.token_embedding = nnx.Embed(
            c.vocab_size, c.width, embedding_init=normal(0.02), dtype=dtype, rngs=rngs
        )
        self.positional_embedding = nnx.Param(
            normal(0.01)(rngs.params(), (c.context_length, c.width), jnp.float32)
        )
        self.transformer = Transformer(
            c.width,
            c.layers,
            c.heads,
            int(c.width * c.mlp_ratio),
            causal=True,
            activation=quick_gelu if config.quick_gelu else gelu,
            init=clip_text_init(c.width, c.layers),
            remat=c.remat,
            dropout=c.dropout,
            unroll=config.unroll,
            attention=config.attention,
            dtype=dtype,
            rngs=rngs,
        )
        self.ln_final = layer_norm(c.width, dtype, rngs)
        self.proj = nnx.Param(
            normal(c.width**-0.5)(rngs.params(), (c.width, config.embed_dim), jnp.float32)
        )

    def __call__(self, tokens: Array, keys: Array | None = None) -> Array:
        """Un-normalised fp32 features `[b, embed_dim]` of int32 token ids `[b, context_length]`.

        `keys` `[b]`, a sample's own random key each, turn dropout on.
        """
        b, n = tokens.shape
        if n != self.config.context_length:
            raise ValueError(f"texts are {n} tokens, the model takes {self.config.context_length}")
        x = self.token_embedding(tokens)
        x = x + self.positional_embedding[...].astype(self.dtype)[None]
        x = self.transformer(x, keys)
        pooled = x[jnp.arange(b), jnp.argmax(tokens, axis=-1)]
        pooled = self.ln_final(pooled)
        return (pooled @ self.proj[...].astype(self.dtype)).astype(jnp.float32)


class CLIP(nnx.Module):
    """Two towers, the learnable logit_scale, kept as its logarithm, and logit_bias if wanted."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.visual = VisionTransformer(config, rngs=rngs)
        self.text = TextTransformer(config, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.float32(INITIAL_LOGIT_SCALE))
        if config.logit_bias is not None:
            self.logit_bias = nnx.Param(jnp.float32(config.logit_bias))

    def encode_image(self, images: Array, keys: Array | None = None) -> Array:
        """L2-normalised fp32 features `[b, embed_dim]` of images `[b, h, w, 3]`.

        `keys` `[b]` turn dropout on: one random key a sample, so that what is dropped does not
        depend on how the batch is cut up.
        """
        return l2_normalize(self.visual(images, keys))

    def encode_text(self, tokens: Array, keys: Array | None = None) -> Array:
        """L2-normalised fp32 features `[b, embed_dim]` of token ids `[b, context_length]`."""
        return l2_normalize(self.text(tokens, keys))
