"""CLIP (Radford et al., 2021) and SigLIP (Zhai et al., 2023): two towers and a logit scale.

Parameters are fp32; `dtype` is the compute dtype of both towers. Features are returned in fp32.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from disco_jax.models.config import CLIP_LOGIT_SCALE, SIGLIP_LOGIT_SCALE, CLIPConfig
from disco_jax.models.text import TextTransformer
from disco_jax.models.text_groups import Groups, encode_in_groups
from disco_jax.models.vision import VisionTransformer

Array = jax.Array

MAX_LOGIT_SCALE = float(np.log(100.0))


def l2_normalize(x: Array) -> Array:
    """Scales the rows of `[..., D]` to unit length, in fp32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


Params = dict[str, Any]  # nested, keyed by module names


class CLIP(nnx.Module):
    """Two towers, a learnable logit_scale, stored as its logarithm, and an optional logit_bias."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.visual = VisionTransformer(config, rngs=rngs)
        self.text = TextTransformer(config, rngs=rngs)
        biased = config.logit_bias is not None
        self.logit_scale = nnx.Param(
            jnp.float32(SIGLIP_LOGIT_SCALE if biased else CLIP_LOGIT_SCALE)
        )
        if biased:
            self.logit_bias = nnx.Param(jnp.float32(config.logit_bias))

    def encode_image(self, images: Array, keys: Array | None = None) -> Array:
        """Returns L2-normalized fp32 features `[b, embed_dim]` of images `[b, h, w, 3]`.

        `keys` `[b]` enable dropout. Each sample has its own random key, so that what is dropped
        does not depend on how the batch is divided.
        """
        return l2_normalize(self.visual(images, keys))

    def encode_text(self, tokens: Array, keys: Array | None = None, groups: Groups = ()) -> Array:
        """Returns L2-normalized fp32 features `[b, embed_dim]` of tokens `[b, context_length]`.

        CLIP's tower, but not SigLIP's, accepts `groups`: see `text_groups.encode_in_groups`.
        """
        if not groups:
            return l2_normalize(self.text(tokens, keys))
        if self.text.config.pool != "argmax":
            raise ValueError("text groups need a tower that is pooled at the end of the text")
        graph, params = nnx.split(self.text)

        def encode(params: nnx.State, pieces: Sequence[Array], keys: Array | None) -> Array:
            return nnx.merge(graph, params).of_pieces(pieces, keys)

        return l2_normalize(encode_in_groups(encode, groups, params, tokens, keys))


def abstract_model(config: CLIPConfig) -> tuple[nnx.GraphDef, Params]:
    """Returns the model's structure and its parameters as shapes, allocating nothing."""
    graph, params = nnx.split(nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0))), nnx.Param)
    return graph, nnx.to_pure_dict(params)
