"""FLIP: half of the image patches are dropped in training, which halves the image tower's work.

    python train.py --config=flip:PART --workdir=runs/flip
    python train.py --config=flip:tune --workdir=runs/tuned --config.init_from=runs/flip

PART is train, with patches dropped, or tune, a short run without dropping that closes the gap
between training and evaluation (Li et al., 2023, "Scaling Language-Image Pre-training via
Masking", which uses masking ratios of 50 and 75 % and an unmasked tuning of 0.32 epochs). The
other settings are those of vit_b16_laion400m.py; the paper's ViT-B/16 result differs in data
order, batch and text tower.
"""

from ml_collections import ConfigDict

from disco_jax.configs import vit_b16_laion400m

PARTS = ("train", "tune")
TUNING = 128_000_000  # samples: 0.32 epochs of LAION-400M


def get_config(part: str = "train") -> ConfigDict:
    """Training with dropped patches, or the tuning after it."""
    if part not in PARTS:
        raise ValueError(f"--config=...:{part}: the part must be {' or '.join(PARTS)}")
    config = vit_b16_laion400m.get_config()
    if part == "train":
        config.model.patch_dropout = 0.5
    else:
        config.num_epochs, config.num_steps = 0.0, TUNING // config.batch_size
        config.optimizer.learning_rate = 5e-5
        config.optimizer.warmup_steps = 200
    return config
