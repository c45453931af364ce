"""CC3M and CC12M: three or twelve million captioned images, for experiments that take a day.

    python train.py --config=conceptual:DATA --workdir=DIR

DATA is cc3m or cc12m, followed by a model if it is not ViT-B-32, e.g. cc12m,ViT-B-16. What others
reached differs from these settings; zero-shot top-1 on ImageNet in %:

    data    model      batch   epochs   top-1   by
    CC3M    ViT-B-16   4,096   40       17.1    SLIP's CLIP (README of facebookresearch/SLIP)
    CC12M   ViT-B-16   4,096   35       36.5    the same; learning rate 5e-4, weight decay 0.5
    CC12M   RN50       -       -        36.45   OpenCLIP (release 0.2.1, rn50-quickgelu-cc12m)

OpenCLIP's README trains a ResNet-50 on such data for 30 epochs with learning rate 1e-3 and weight
decay 0.1, which are used here, at a batch of 1,024 in all. ResNets are not supported.
"""

from ml_collections import ConfigDict

from disco_jax.configs import vit_b32_laion400m

# samples: those of CC12M that OpenCLIP's README counts, and CC3M's training set as published
SAMPLES = {"cc3m": 3_318_333, "cc12m": 10_968_539}
MODELS = ("ViT-B-32", "ViT-B-16")


def get_config(choice: str = "cc12m") -> ConfigDict:
    """Thirty epochs at a batch of 1,024."""
    data, _, model = choice.partition(",")
    if data not in SAMPLES or (model or MODELS[0]) not in MODELS:
        raise ValueError(
            f"--config=...:{choice}: it must be {' or '.join(SAMPLES)}, and after a comma "
            f"{' or '.join(MODELS)}"
        )
    config = vit_b32_laion400m.get_config()
    config.model.name = model or MODELS[0]
    config.model.image_remat = config.model.text_remat = "none"
    config.batch_size = 1_024
    config.num_epochs, config.num_steps = 30.0, 0  # the steps follow from the samples found
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup_steps = 10_000  # OpenCLIP's README
    config.data.name = f"{data}/*.tar"  # shards written by img2dataset
    config.data.caption_key = "txt"
    config.data.num_samples = 0  # many links are dead today
    config.eval.every = SAMPLES[data] // config.batch_size  # an epoch
    return config
