"""The image tower: a vision transformer with CLIP's or SigLIP's pooling."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import lecun_normal, normal, variance_scaling, xavier_uniform

from disco_jax.models.config import CLIPConfig, VisionConfig
from disco_jax.models.transformer import (
    ACTIVATIONS,
    LayerNorm,
    Transformer,
    clip_vision_init,
    siglip_init,
)

Array = jax.Array


def normalize_pixels(images: Array, config: VisionConfig, dtype: jnp.dtype) -> Array:
    """Normalizes uint8 `[b, h, w, 3]` by the model's mean and deviation, and casts to `dtype`.

    Images are transferred as bytes and normalized here, on the device that uses them.
    """
    mean, std = (jnp.asarray(c, jnp.float32).reshape(1, 1, 1, 3) for c in (config.mean, config.std))
    return ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def drop_patches(x: Array, keys: Array, rate: float, kept_first: int) -> Array:
    """Keeps the first `kept_first` tokens and a random subset of the rest of `[b, n, width]`.

    `round(patches (1 - rate))` patches of each image are kept, at least one (FLIP, Li et al.,
    2023). `keys` `[b]` are one random key per sample.
    """
    n = x.shape[1] - kept_first
    kept = max(1, round(n * (1 - rate)))
    scores = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (n,)))(keys)
    chosen = jax.lax.top_k(scores, kept)[1][:, :, None]
    patches = jnp.take_along_axis(x[:, kept_first:], chosen, axis=1)
    return jnp.concatenate([x[:, :kept_first], patches], axis=1)


class AttentionPool(nnx.Module):
    """SigLIP's pooling: a learned query attends to all patches, followed by a residual MLP.

    This is the "MAP head" of Scaling Vision Transformers (Zhai et al., 2022), as in big_vision.
    """

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        c, dtype = config.vision, jnp.dtype(config.dtype)
        width = c.width
        self.heads, self.dtype = c.heads, dtype
        self.activation = ACTIVATIONS[c.activation]
        kernel = xavier_uniform()
        self.probe = nnx.Param(kernel(rngs.params(), (1, width), jnp.float32))

        def linear(n_in: int, n_out: int) -> nnx.Linear:
            return nnx.Linear(n_in, n_out, kernel_init=kernel, dtype=dtype, rngs=rngs)

        self.in_proj, self.out_proj = linear(width, 3 * width), linear(width, width)
        self.ln = LayerNorm(c, rngs=rngs)
        self.mlp_in, self.mlp_out = linear(width, c.mlp_width), linear(c.mlp_width, width)

    def __call__(self, x: Array) -> Array:
        """Maps `[b, n, width]` to `[b, width]`."""
        b, n, width = x.shape
        kernel, bias = (p[...].astype(self.dtype) for p in (self.in_proj.kernel, self.in_proj.bias))
        query = self.probe[...].astype(self.dtype) @ kernel[:, :width] + bias[None, :width]
        query = jnp.broadcast_to(query[None], (b, 1, width)).reshape(b, 1, self.heads, -1)
        pairs = x.reshape(b * n, width) @ kernel[:, width:] + bias[None, width:]
        pairs = pairs.reshape(b, n, 2, self.heads, -1)
        # Always XLA's attention: other kernels, which blocks may use, expect more queries than one.
        mixed = jax.nn.dot_product_attention(
            query, pairs[:, :, 0], pairs[:, :, 1], implementation="xla"
        )
        x = self.out_proj(mixed.reshape(b, width))
        return x + self.mlp_out(self.activation(self.mlp_in(self.ln(x))))


class VisionTransformer(nnx.Module):
    """ViT with learned position embeddings, pooled and projected as `config.vision.pool` says."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        c, dtype = config.vision, jnp.dtype(config.dtype)
        if c.image_size % c.patch_size:
            raise ValueError(
                f"vision.image_size {c.image_size} is not a multiple of patch_size {c.patch_size}"
            )
        self.config, self.dtype = c, dtype
        scale, by_class = normal(c.width**-0.5), c.pool == "class"
        patches = (c.image_size // c.patch_size) ** 2
        self.patch_embed = nnx.Linear(
            c.patch_size**2 * 3,
            c.width,
            use_bias=not by_class,
            kernel_init=variance_scaling(1 / 3, "fan_in", "uniform")
            if by_class
            else lecun_normal(),
            dtype=dtype,
            rngs=rngs,
        )
        if by_class:
            self.class_embedding = nnx.Param(scale(rngs.params(), (c.width,), jnp.float32))
        self.positional_embedding = nnx.Param(
            scale(rngs.params(), (patches + by_class, c.width), jnp.float32)
        )
        if by_class:
            self.ln_pre = LayerNorm(c, rngs=rngs)
        init = clip_vision_init(c.width, c.mlp_width) if by_class else siglip_init()
        self.transformer = Transformer(c, config, causal=False, init=init, rngs=rngs)
        self.ln_post = LayerNorm(c, rngs=rngs)
        if by_class:
            self.proj = nnx.Param(scale(rngs.params(), (c.width, config.embed_dim), jnp.float32))
        else:
            if c.width != config.embed_dim:
                raise ValueError(
                    f"embed_dim {config.embed_dim} must equal vision.width {c.width}: attention "
                    "pooling has no projection"
                )
            self.pool = AttentionPool(config, rngs=rngs)

    def __call__(self, images: Array, keys: Array | None = None) -> Array:
        """Returns unnormalized fp32 features `[b, embed_dim]`.

        `images` are `[b, image_size, image_size, 3]`. uint8 images are normalized with the model's
        mean and deviation; float images are used unchanged. `keys` `[b]`, one random key per
        sample, enable dropout.
        """
        embed = self._embed
        if self.config.remat != "none" or self.config.remat_blocks:
            embed = jax.checkpoint(embed)  # saves the bytes for the backward pass, not the patches
        x = embed(images)
        b, _, width = x.shape
        by_class = self.config.pool == "class"
        if by_class:
            cls = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (b, 1, width))
            x = jnp.concatenate([cls, x], axis=1)
        x = x + self.positional_embedding[...].astype(self.dtype)[None]
        if keys is not None and self.config.patch_dropout:
            x = drop_patches(x, keys, self.config.patch_dropout, kept_first=int(by_class))
        x = self.transformer(self.ln_pre(x) if by_class else x, keys)
        if not by_class:
            return self.pool(self.ln_post(x)).astype(jnp.float32)
        return (self.ln_post(x[:, 0]) @ self.proj[...].astype(self.dtype)).astype(jnp.float32)

    def _embed(self, images: Array) -> Array:
        """Embeds `[b, h, w, 3]` as `[b, patches, width]`, row by row."""
        if images.dtype == jnp.uint8:
            images = normalize_pixels(images, self.config, self.dtype)
        images = images.astype(self.dtype)
        b, h, w, channels = images.shape
        p, size = self.config.patch_size, self.config.image_size
        if (h, w) != (size, size):
            raise ValueError(f"images are {h} x {w}; the model takes {size} x {size}")
        x = images.reshape(b, h // p, p, w // p, p, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * channels)
        return self.patch_embed(x)
