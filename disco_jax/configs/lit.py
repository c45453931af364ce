"""LiT: a new text tower for a trained image tower, which stays as it is.

    python -m disco_jax.interop import --from=openclip PATH_OR_REPO --out=models/b32
    python train.py --config=lit --workdir=runs/lit --config.data.name='/data/*.tar'

With a frozen image tower (Zhai et al., 2022, "LiT"), images need no backward pass and no
activations. The text tower begins as the model's own; its blocks are all trained. The published
LiT models reach 72.07 % (B/16) and 75.68 % (L/16) zero-shot on ImageNet (README of
google-research/vision_transformer), with other data and image towers trained with labels.
"""

from ml_collections import ConfigDict

from disco_jax.configs import pairs


def get_config() -> ConfigDict:
    """The config `pairs` with the image tower frozen."""
    config = pairs.get_config()
    config.model.name = config.init_from = "models/b32"
    config.batch_size = 4_096
    config.model.image_trained_blocks = 0
    config.model.image_remat = "none"  # nothing of it is kept
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 1e-4
    return config
