"""Drawings of emojis: learns names from three artists' styles, and names those of a fourth.

    make emoji

Trains on some 4,200 drawings. Evaluation names drawings in a style that is never trained on, among
the 1,177 names that all four artists draw. Of these, 103 are held out: they are not trained on in
any style. Settings were chosen by the set `validation`, which has other names. See docs/data.md.
"""

from ml_collections import ConfigDict

from disco_jax.config import default, zeroshot_set

SHARDS, LISTS = "data/emoji", "data_sets/emoji"


def get_config() -> ConfigDict:
    """Some fifteen minutes on two CPU cores."""
    config = default()
    config.batch_size = 256
    config.num_steps = 2_000
    config.fake_devices = 2
    config.model.name = "tiny-32"
    config.model.dtype = "float32"
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.1
    config.optimizer.grad_clip_norm = 1.0
    config.data.name = f"{SHARDS}/{{noto,noto-v1,twemoji}}.tar"
    config.data.caption_key = "captions"  # several per drawing, of which one is drawn each time
    config.data.num_workers = 1
    # Strong augmentation, so that little but the shapes and rough colors can be learned by heart.
    config.data.crop_scale = 0.5
    config.data.color_jitter_prob = 0.8
    config.data.gray_scale_prob = 0.1
    config.eval.every = 500
    names, prompts = f"{LISTS}/names.txt", f"{LISTS}/prompts.txt"
    for name, classes, subset in (
        ("test", names, ""),
        ("heldout", names, f"{LISTS}/heldout.txt"),
        ("validation", f"{LISTS}/validation.txt", ""),
    ):
        config.eval.sets[name] = zeroshot_set(
            f"{SHARDS}/{name}.tar", classes=classes, templates=prompts, subset=subset
        )
    config.log_every = 20
    config.checkpoint_every = 500
    return config
