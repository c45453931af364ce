"""A starting point for your own images and captions.

    python train.py --config=pairs --workdir=runs/pairs --config.data.name='/data/*.tar'
    python train.py --config=pairs --workdir=runs/pairs --config.data.name=/data/list.csv

Fits on one 24 GB GPU; for other sizes, run python -m disco_jax.plan --config=pairs ...
All other fields have the defaults of disco_jax/config/defaults.py, where each is explained.
"""

from ml_collections import ConfigDict

from disco_jax.config import default


def get_config() -> ConfigDict:
    """ViT-B/32 from scratch. To fine-tune, set init_from and a learning rate of about 1e-5."""
    config = default()
    config.batch_size = 1_024  # if too large for memory, set microbatch, e.g. to 256
    config.num_steps = 20_000  # samples * epochs / batch_size
    config.model.name = "ViT-B-32"  # a preset or a model folder
    config.model.dtype = "bfloat16"
    config.model.image_remat = "full"  # recompute activations: a third more compute,
    config.model.text_remat = "full"  # a ninth of the memory
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 1_000
    # For tar shards "txt", for a table a column with a common name; else set them.
    config.data.image_key = config.data.caption_key = "auto"
    config.data.num_workers = 6  # per GPU; enough if time/data in the metrics is near zero
    config.eval.every = 0  # only after the last step; for labeled sets, see docs/evaluation.md
    config.checkpoint_every = 1_000
    return config
