"""From a config to what is trained, and on what: no data, checkpoint or logging."""

import dataclasses

from ml_collections import ConfigDict

from disco_jax.errors import UserError
from disco_jax.models import CLIPConfig, preset

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
