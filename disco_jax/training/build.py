"""From a config to what is trained, and on what: no data, checkpoint or logging."""

import dataclasses

import jax
from ml_collections import ConfigDict

from disco_jax.errors import UserError
from disco_jax.models import CLIPConfig, preset
from disco_jax.models.transformer import Attention

INITIAL_LOGIT_BIAS = -10.0  # most pairs are negatives, and begin as such (SigLIP, section 3.2)


def model_config(config: ConfigDict) -> CLIPConfig:
    """The preset that the config names, with the config's choices."""
    try:
        base = preset(config.model.name)
    except ValueError as error:
        raise UserError(f"model.name: {error}") from error
    return dataclasses.replace(
        base,
        quick_gelu=config.model.quick_gelu,
        dtype=config.model.dtype,
        attention=_attention(config.model.attention, config.model.dtype),
        lock_image=config.model.lock_image,
        vision=dataclasses.replace(
            base.vision,
            remat=config.model.image_remat,
            patch_dropout=config.model.patch_dropout,
            dropout=config.model.dropout,
        ),
        text=dataclasses.replace(
            base.text, remat=config.model.text_remat, dropout=config.model.dropout
        ),
        logit_bias=INITIAL_LOGIT_BIAS if config.loss.kind == "sigmoid" else None,
    )


def _attention(wanted: str, dtype: str) -> Attention:
    """`xla` or `cudnn`: the flash attention that cuDNN has for 16 bits from Ampere on."""
    if wanted != "auto":
        return "cudnn" if wanted == "cudnn" else "xla"
    device = jax.devices()[0]
    capability = float(getattr(device, "compute_capability", None) or 0)
    is_cuda = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    return "cudnn" if is_cuda and capability >= 8 and dtype == "bfloat16" else "xla"
