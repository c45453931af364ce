"""Fine-tune SigLIP 2 on your own pairs.

    python -m disco_jax.interop import --from=hf PATH_OR_REPO --out=models/siglip2
    python train.py --config=siglip2 --workdir=runs/own --config.data.name='/data/*.tar'
    python -m disco_jax.interop export --to=hf runs/own --out=models/siglip2-tuned

PATH_OR_REPO is a fixed-resolution SigLIP 2 such as google/siglip2-base-patch16-224. The loss is
SigLIP's sigmoid loss; its scale and bias begin as the model's own. Rates fall towards the input
by 0.8 per layer, and what is evaluated and exported is an average over the last few hundred
steps. There is no published number to compare with: evaluate the imported model first, on a held-
out part of your pairs.
"""

from ml_collections import ConfigDict

from disco_jax.configs import pairs


def get_config() -> ConfigDict:
    """For one GPU of 24 GB with microbatches; more GPUs take a larger batch."""
    config = pairs.get_config()
    config.model.name = config.init_from = "models/siglip2"
    config.loss.kind = "sigmoid"
    config.batch_size = 1_024
    config.microbatch = 128
    config.num_steps = 2_000
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 1e-4
    config.optimizer.layer_decay = 0.8
    config.optimizer.ema_decay = 0.998
    config.checkpoint_every = 500
    return config
