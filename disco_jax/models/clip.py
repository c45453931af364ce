"""CLIP (Radford et al., 2021) and SigLIP (Zhai et al., 2023): two towers and a scale.

Parameters are fp32; `dtype` is the compute dtype of both towers. Features leave in fp32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from disco_jax.models.config import CLIP_LOGIT_SCALE, SIGLIP_LOGIT_SCALE, CLIPConfig
from disco_jax.models.text import TextTransformer
from disco_jax.models.vision import VisionTransformer

Array = jax.Array

MAX_LOGIT_SCALE = float(np.log(100.0))


def l2_normalize(x: Array) -> Array:
    """Rows of `[..., D]` scaled to unit length, in fp32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


Params = dict[str, Any]  # nested, by the names of modules


class CLIP(nnx.Module):
    """Two towers, the learnable logit_scale, kept as its logarithm, and logit_bias if wanted."""

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
        """L2-normalised fp32 features `[b, embed_dim]` of images `[b, h, w, 3]`.

        `keys` `[b]` turn dropout on: one random key a sample, so that what is dropped does not
        depend on how the batch is cut up.
        """
        return l2_normalize(self.visual(images, keys))

    def encode_text(self, tokens: Array, keys: Array | None = None) -> Array:
        """L2-normalised fp32 features `[b, embed_dim]` of token ids `[b, context_length]`."""
        return l2_normalize(self.text(tokens, keys))


def abstract_model(config: CLIPConfig) -> tuple[nnx.GraphDef, Params]:
    """The model's structure, and its parameters as shapes alone: nothing is allocated."""
    graph, params = nnx.split(nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0))), nnx.Param)
    return graph, nnx.to_pure_dict(params)
