"""The paper's main run: ViT-B/32 on LAION-400M, batch 65,536, 32 epochs (DisCo-CLIP, section 5).

Where the paper is silent, OpenCLIP's settings for its LAION-400M ViT-B/32 are taken, and marked so.
"""

from ml_collections import ConfigDict

from disco_jax.config import default, zeroshot_set

SAMPLES = 400_000_000  # of LAION-400M, nominally


def get_config() -> ConfigDict:
    """For 64 GPUs of 40 GB, or as few as 8: see docs/memory.md."""
    config = default()
    config.batch_size = 65_536
    config.num_steps = 32 * SAMPLES // config.batch_size
    config.model.name = "ViT-B-32"
    config.model.dtype = "bfloat16"
    config.model.image_remat = "full"
    config.model.text_remat = "full"
    config.loss.method = "ring"
    config.optimizer.learning_rate = 5e-4  # OpenCLIP
    config.optimizer.warmup_steps = 2_000  # OpenCLIP
    config.optimizer.weight_decay = 0.2  # OpenCLIP
    config.optimizer.b1 = 0.9  # OpenCLIP, for ViT
    config.optimizer.b2 = 0.98  # OpenCLIP, for ViT
    config.optimizer.eps = 1e-6  # OpenCLIP, for ViT
    # As TFDS data sets; or folders and shards of your own, see docs/evaluation.md.
    config.eval.sets.imagenet = zeroshot_set("imagenet2012", "validation")
    config.eval.sets.imagenet_v2 = zeroshot_set("imagenet_v2")
    config.eval.sets.imagenet_r = zeroshot_set("imagenet_r", subset="imagenet_r")
    config.eval.sets.imagenet_sketch = zeroshot_set("imagenet_sketch")
    return config
