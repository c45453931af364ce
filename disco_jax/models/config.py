"""Model configuration: the sizes and options of a CLIP, as plain data."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

# Mean and standard deviation of CLIP's training images, RGB in [0, 1] (OpenAI CLIP, `clip.py`).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)  # maps pixels to [-1, 1]
CLIP_LOGIT_SCALE = float(np.log(1 / 0.07))  # CLIP, section 2.5
SIGLIP_LOGIT_SCALE = float(np.log(10.0))  # SigLIP (Zhai et al., 2023), section 3.2


Attention = Literal["xla", "cudnn"]  # `cudnn` is flash attention, 16-bit only


@dataclass(frozen=True)
class TowerConfig:
    """Fields that both towers share."""

    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"  # a key of transformer.ACTIVATIONS
    norm_eps: float = 1e-5
    remat: str = "none"  # what the backward pass recomputes: a policy of models/remat.py
    remat_blocks: int = 0  # the last N follow the policy, those before are recomputed; 0: all
    dropout: float = 0.0  # rate, on the output of each residual branch
    trained_blocks: int = -1  # the last N and the layers after them; -1: all; 0: nothing

    @property
    def mlp_width(self) -> int:
        """Width of a block's hidden layer, rounded down as in OpenCLIP."""
        return int(self.width * self.mlp_ratio + 1e-6)  # 1152 · (4304 / 1152) must give 4304


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The image tower. Sizes are in pixels."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    # `class`: CLIP's class token, with norms before and after the blocks and a projection. `map`:
    # SigLIP's attention pooling, over the patches only and without a projection.
    pool: str = "class"
    mean: tuple[float, ...] = CLIP_MEAN  # subtracted from RGB in [0, 1]
    std: tuple[float, ...] = CLIP_STD
    squash: bool = False  # evaluation squashes images to a square instead of cropping
    resample: str = "bicubic"  # how images are resized; or bilinear
    patch_dropout: float = 0.0  # fraction of an image's patches dropped in training


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    """The text tower."""

    width: int = 512
    layers: int = 12
    heads: int = 8
    context_length: int = 77
    vocab_size: int = 49408
    # `argmax`: CLIP's causal tower, pooled at the token with the highest ID, the end of text.
    # `last`: SigLIP's tower, in which every token attends to all, pooled at the last position.
    pool: str = "argmax"
    tokenizer: str = ""  # path of a tokenizer.json, e.g. SigLIP's; "": CLIP's own


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers, the width of the shared embedding space, and common settings."""

    embed_dim: int = 512
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    dtype: str = "float32"  # compute dtype of the towers
    logit_bias: float | None = None  # initial learnable bias, as in SigLIP; None: no bias
    attention: Attention = "xla"  # or cudnn: flash attention, bf16 on NVIDIA Ampere or later
    unroll: int = 1  # blocks unrolled per step of the scan: faster on CPUs, slower to compile
