"""Config of a run that takes seconds: no labeled sets, a model of a few thousand parameters."""

from ml_collections import ConfigDict

from disco_jax.config import default


def get_config() -> ConfigDict:
    config = default()
    config.batch_size = 16
    config.num_steps = 8
    config.model.dtype = "float32"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 2
    config.data.num_workers = 0
    config.data.caption_key = "caption"
    config.eval.every = 0
    config.log_every = 1
    config.checkpoint_every = 2
    config.checkpoint_keep = 8
    config.stall_timeout = 0.0  # no watcher next to a single process
    return config
