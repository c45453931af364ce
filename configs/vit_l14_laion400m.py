"""ViT-L/14 on LAION-400M, as the paper's ViT-B/32: same batch, epochs and sets.

The paper has no such run: sizes are OpenCLIP's, all else as in vit_b32_laion400m.py.
"""

from ml_collections import ConfigDict

from configs import vit_b32_laion400m


def get_config() -> ConfigDict:
    """By microbatches, which let the batch of 65,536 fit on 8 GPUs: see docs/cluster.md."""
    config = vit_b32_laion400m.get_config()
    config.model.name = "ViT-L-14"
    config.microbatch = (
        256  # samples a device at a time; the loss is of the whole batch all the same
    )
    return config
