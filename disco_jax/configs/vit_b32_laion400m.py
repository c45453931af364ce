"""The paper's main run: ViT-B/32 on LAION-400M, batch 65,536, 32 epochs (DisCo-CLIP).

Where the paper gives no value, OpenCLIP's for its LAION-400M ViT-B/32 is used and marked as such.
All other fields have the defaults of disco_jax/config/defaults.py, where each is explained.
"""

from ml_collections import ConfigDict

from disco_jax.config import default, zeroshot_set


def get_config() -> ConfigDict:
    """For 64 GPUs of 40 GB, or as few as 8; see docs/cluster.md."""
    config = default()
    config.batch_size = 65_536  # the paper's
    config.num_epochs = 32.0  # the paper's
    config.num_steps = 195_312  # 32 passes over 400 M samples; checked against the two above

    config.model.name = "ViT-B-32"  # the paper's
    config.model.dtype = "bfloat16"  # the paper computes in 16 bits too
    config.model.image_remat = "full"  # so that 65,536 samples fit on 8 GPUs of 40 GB
    config.model.text_remat = "full"

    config.optimizer.name = "adamw"  # the paper's
    config.optimizer.learning_rate = 5e-4  # OpenCLIP
    config.optimizer.warmup_steps = 2_000  # OpenCLIP
    config.optimizer.weight_decay = 0.2  # OpenCLIP
    config.optimizer.b1 = 0.9  # OpenCLIP, for ViT
    config.optimizer.b2 = 0.98  # OpenCLIP, for ViT
    config.optimizer.eps = 1e-6  # OpenCLIP, for ViT

    config.data.name = "laion400m/{00000..41407}.tar"  # shards written by img2dataset
    config.data.caption_key = "caption"  # a key of the .json files
    config.data.num_samples = 400_000_000  # nominal; fewer can be downloaded today
    config.data.crop_scale = 0.9  # OpenCLIP

    # The paper's four sets, with CLIP's 80 prompts, as TFDS datasets. Folders and shards work as
    # well (docs/evaluation.md).
    config.eval.every = 6_104  # one epoch
    config.eval.sets.imagenet = zeroshot_set("imagenet2012", "validation")
    config.eval.sets.imagenet_v2 = zeroshot_set("imagenet_v2")
    config.eval.sets.imagenet_r = zeroshot_set("imagenet_r", subset="imagenet_r")
    config.eval.sets.imagenet_sketch = zeroshot_set("imagenet_sketch")
    return config
