"""ViT-L/14 on LAION-400M, with the batch size, epochs and eval sets of the paper's ViT-B/32.

The paper has no such run. The model sizes are OpenCLIP's; the rest is from vit_b32_laion400m.py.
"""

from ml_collections import ConfigDict

from disco_jax.configs import vit_b32_laion400m


def get_config() -> ConfigDict:
    """Uses microbatches, so that a batch of 65,536 fits on 8 GPUs; see docs/cluster.md."""
    config = vit_b32_laion400m.get_config()
    config.model.name = "ViT-L-14"
    config.microbatch = 256  # samples per device; the loss still covers the whole batch
    return config
