"""Your own images and captions: where to begin.

    python train.py --config=configs/pairs.py --workdir=runs/pairs --config.data.name='/data/*.tar'

Fits one GPU of 24 GB; other sizes: python -m disco_jax.plan --config=configs/pairs.py ...
Fields that are not here have the defaults of disco_jax/config/defaults.py, where each is explained.
"""

from ml_collections import ConfigDict

from disco_jax.config import default


def get_config() -> ConfigDict:
    """ViT-B/32 from nothing; to fine-tune, init_from, and a learning rate of 1e-5 or so."""
    config = default()
    config.batch_size = 1_024  # beyond what memory takes: microbatch = 256, say, and any size
    config.num_steps = 20_000  # samples times epochs, by batch_size
    config.model.name = "ViT-B-32"  # a preset, or a model folder
    config.model.dtype = "bfloat16"
    config.model.image_remat = "full"  # computed again instead of kept: a third more work, and
    config.model.text_remat = "full"  # a ninth of the memory
    config.loss.method = "ring"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 1_000
    config.data.caption_key = "txt"  # of tar shards; a column of a table
    config.data.num_workers = 6  # for each GPU; time/data in the metrics should be near zero
    config.eval.every = 0  # labelled sets: docs/evaluation.md
    config.checkpoint_every = 1_000
    return config
