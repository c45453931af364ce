"""CLIPA: most of the training on small images and short texts, the rest at full size.

    python train.py --config=clipa:1 --workdir=runs/clipa1
    python train.py --config=clipa:2 --workdir=runs/clipa2 --config.init_from=runs/clipa1

Stage 1 trains a ViT-B/16 on 112 pixels and 32 tokens; stage 2 begins from it, with its positions
interpolated to 224 pixels, at a tenth of the learning rate. Batch, rates, warm-up, weight decay,
b2 and sizes are those of CLIPA's configs/model_b (112_32_pre_training.py and unmask_tuning.py,
UCSC-VLAA/CLIPA). Unlike CLIPA's, the towers are CLIP's: learned positions, CLIP's tokenizer, a
causal text tower.

CLIPA (Li et al., 2023, abstract) reports zero-shot top-1 on ImageNet of 63.2 % after 2 days on 8
A100s, 67.8 % after 3 and 69.3 % after 4, the latter two with larger models and shorter inputs.
"""

from ml_collections import ConfigDict

from disco_jax.configs import vit_b32_laion400m

STAGES = ("1", "2")


def get_config(stage: str = "1") -> ConfigDict:
    """One of the two stages, each a run of its own."""
    if stage not in STAGES:
        raise ValueError(f"--config=...:{stage}: the stage must be {' or '.join(STAGES)}")
    config = vit_b32_laion400m.get_config()
    config.model.name = "ViT-B-16"
    config.model.context_length = 32
    config.batch_size = 32_768
    config.num_epochs = 0.0
    config.optimizer.weight_decay = 0.2
    config.optimizer.b2 = 0.95
    config.data.crop_scale = 0.4
    if stage == "1":
        config.model.image_size = 112
        config.num_steps = 7 * 400_000_000 // config.batch_size  # CLIPA's 7 epochs of LAION-400M
        config.optimizer.learning_rate = 1.024e-3
        config.optimizer.warmup_steps = 1_600
    else:
        config.model.image_size = 224
        config.num_steps = 4_000
        config.optimizer.learning_rate = 1.024e-4
        config.optimizer.warmup_steps = 800
        config.microbatch = 512  # of larger images, per device
    return config
