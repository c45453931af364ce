"""What a CLIP consists of: sizes and choices, as plain data."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

# Mean and standard deviation of CLIP's training images, RGB in [0, 1] (OpenAI CLIP, `clip.py`).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)  # pixels to [-1, 1]
CLIP_LOGIT_SCALE = float(np.log(1 / 0.07))  # CLIP, section 2.5
SIGLIP_LOGIT_SCALE = float(np.log(10.0))  # SigLIP (Zhai et al., 2023), section 3.2


Attention = Literal["xla", "cudnn"]  # cuDNN's is flash attention, for 16 bits


@dataclass(frozen=True)
class TowerConfig:
    """What both towers have."""

    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"  # of transformer.ACTIVATIONS
    norm_eps: float = 1e-5
    remat: str = "none"  # what the backward pass recomputes: transformer.REMAT
    dropout: float = 0.0  # of what each residual branch adds
    trained_blocks: int = -1  # the last so many, with what follows them; -1: all; 0: nothing

    @property
    def mlp_width(self) -> int:
        """Width of a block's hidden layer, rounded down, as OpenCLIP does."""
        return int(self.width * self.mlp_ratio + 1e-6)  # 1152 · (4304 / 1152) is to be 4304


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The image tower; sizes in pixels."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    # `class`: CLIP's class token, norms before and after, a projection. `map`: SigLIP's pooling by
    # attention, of the patches alone, without a projection.
    pool: str = "class"
    mean: tuple[float, ...] = CLIP_MEAN  # subtracted of RGB in [0, 1]
    std: tuple[float, ...] = CLIP_STD
    squash: bool = False  # evaluation squeezes images into the square, instead of cutting
    patch_dropout: float = 0.0  # share of an image's patches left out in training


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    """The text tower."""

    width: int = 512
    layers: int = 12
    heads: int = 8
    context_length: int = 77
    vocab_size: int = 49408
    # `argmax`: CLIP's causal tower, pooled at the token with the highest id, its end of text.
    # `last`: SigLIP's, in which every token sees all, pooled at the last place.
    pool: str = "argmax"
    tokenizer: str = ""  # path of a tokenizer.json, as SigLIP has; "": CLIP's own


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers, the width of the shared space, and what they have in common."""

    embed_dim: int = 512
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    dtype: str = "float32"  # compute dtype of the towers
    logit_bias: float | None = None  # initial value of a learnable bias, as SigLIP has; None: none
    attention: Attention = "xla"  # or cudnn: flash attention, bf16 on NVIDIA's Ampere and later
    unroll: int = 1  # blocks compiled in line at a time: quicker on a CPU, slower to compile
