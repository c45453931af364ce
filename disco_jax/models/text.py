"""The text tower: a transformer over tokens with CLIP's or SigLIP's pooling."""

from collections.abc import Sequence

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

        `tokens` are int32 token IDs `[b, context_length]`. CLIP's tower also accepts fewer tokens,
        as long as each text's end is among them. `keys` `[b]`, one random key per sample, enable
        dropout.

        Raises:
          ValueError: if there are too many tokens or, for SigLIP's tower, too few.
        """
        return self.of_pieces((tokens,), keys)

    def of_pieces(self, pieces: Sequence[Array], keys: Array | None = None) -> Array:
        """Like `__call__`, for texts of several lengths at once: pieces `[b_i, n_i]` of a batch."""
        for tokens in pieces:
            self._check(tokens.shape[1])
        x = self.token_embedding(jnp.concatenate([tokens.reshape(-1) for tokens in pieces]))
        x = x + jnp.concatenate([self._positions(*tokens.shape) for tokens in pieces])
        shapes = [(len(tokens), tokens.shape[1]) for tokens in pieces]
        x = self.transformer.flat(x, shapes, keys)
        parts = jax.lax.split(x, [b * n for b, n in shapes])
        x = self.ln_final(jnp.concatenate([*map(self._pool, parts, pieces)]))
        x = x @ self.proj[...].astype(self.dtype)
        if self.config.pool == "last":
            x = x + self.proj_bias[...].astype(self.dtype)[None]
        return x.astype(jnp.float32)

    def _check(self, n: int) -> None:
        most = self.config.context_length
        if n > most or (n < most and self.config.pool == "last"):
            fewer = "" if self.config.pool == "last" else " or fewer"
            raise ValueError(f"texts have {n} tokens; the model takes {most}{fewer}")

    def _positions(self, b: int, n: int) -> Array:
        """Returns the positional embeddings of b texts of n tokens, `[b*n, width]`."""
        positions = self.positional_embedding[...].astype(self.dtype)[:n]
        return jnp.broadcast_to(positions, (b, *positions.shape)).reshape(b * n, -1)

    def _pool(self, x: Array, tokens: Array) -> Array:
        """Returns `[b, width]` of a piece's flattened tokens `[b*n, width]`."""
        x = x.reshape(*tokens.shape, -1)
        if self.config.pool == "last":
            return x[:, -1]
        # Gather along the axis: indexing by pairs would communicate across the batch's devices.
        return jnp.take_along_axis(x, jnp.argmax(tokens, axis=-1)[:, None, None], axis=1)[:, 0]
