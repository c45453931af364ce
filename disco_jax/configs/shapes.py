"""The demo: a tiny CLIP on the bundled dataset `shapes`, in minutes on two CPU cores."""

from ml_collections import ConfigDict

from disco_jax.config import default, zeroshot_set


def get_config() -> ConfigDict:
    """Runs on two fake CPU devices, so that the loss is really distributed."""
    config = default()
    config.batch_size = 128
    config.num_steps = 1_000
    config.fake_devices = 2
    config.model.name = "tiny"
    config.model.dtype = "float32"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 40
    config.optimizer.weight_decay = 0.05
    config.optimizer.grad_clip_norm = 1.0
    config.data.num_workers = 1
    config.data.crop_scale = 1.0  # no random crop: captions mention where a shape is
    config.eval.every = 200
    for name, split in (("zeroshot", "test"), ("zeroshot_heldout", "heldout")):
        config.eval.sets[name] = zeroshot_set("shapes", split, classes="shapes", templates="shapes")
    config.eval.baseline_name = "shapes"
    config.eval.retrieval_split = "validation"
    config.log_every = 10
    config.checkpoint_every = 200
    return config
