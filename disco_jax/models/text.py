"""The text tower: a transformer over tokens with CLIP's or SigLIP's pooling."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal

from disco_jax.models.config import CLIPConfig
from disco_jax.models.transformer import (
    LayerNorm,
    Transformer,
    clip_text_init,
    siglip_init,
)

Array = jax.Array


class TextTransformer(nnx.Module):
    """Maps tokens to features, pooled as `config.text.pool` says and then projected."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        c, dtype = config.text, jnp.dtype(config.dtype)
        self.config, self.dtype = c, dtype
        clips = c.pool == "argmax"
        width_std = c.width**-0.5
        self.token_embedding = nnx.Embed(
            c.vocab_size,
            c.width,
            embedding_init=normal(0.02 if clips else width_std),
            dtype=dtype,
            rngs=rngs,
        )
        self.positional_embedding = nnx.Param(
            normal(0.01 if clips else width_std)(
                rngs.params(), (c.context_length, c.width), jnp.float32
            )
        )
        init = clip_text_init(c.width, c.mlp_width, c.layers) if clips else siglip_init()
        self.transformer = Transformer(c, config, causal=clips, init=init, rngs=rngs)
        self.ln_final = LayerNorm(c, rngs=rngs)
        self.proj = nnx.Param(
            normal(width_std)(rngs.params(), (c.width, config.embed_dim), jnp.float32)
        )
        if not clips:
            self.proj_bias = nnx.Param(jnp.zeros(config.embed_dim, jnp.float32))

    def __call__(self, tokens: Array, keys: Array | None = None) -> Array:
        """Returns unnormalized fp32 features `[b, embed_dim]`.

        `tokens` are int32 token IDs `[b, context_length]`. `keys` `[b]`, one random key per sample,
        enable dropout.
        """
        n = tokens.shape[1]
        if n != self.config.context_length:
            raise ValueError(f"texts have {n} tokens; the model takes {self.config.context_length}")
        x = self.token_embedding(tokens)
        x = x + self.positional_embedding[...].astype(self.dtype)[None]
        x = self.transformer(x, keys)
        if self.config.pool == "argmax":
            # Gather along the axis: indexing by pairs would communicate across the batch's devices.
            place = jnp.argmax(tokens, axis=-1)[:, None, None]
            pooled = self.ln_final(jnp.take_along_axis(x, place, axis=1)[:, 0])
            return (pooled @ self.proj[...].astype(self.dtype)).astype(jnp.float32)
        projected = self.ln_final(x[:, -1]) @ self.proj[...].astype(self.dtype)
        bias = self.proj_bias[...].astype(self.dtype)[None]
        return (projected + bias).astype(jnp.float32)
