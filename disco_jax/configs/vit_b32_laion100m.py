"""The paper's batch sizes: ViT-B/32 on LAION-100M, a 100 M subset of LAION-2B, for 16 epochs.

    python train.py --config=vit_b32_laion100m:BATCH --workdir=DIR

BATCH is 8192, 16384, 32768 or 65536, for about 200K, 100K, 50K or 25K steps. 32768 is the paper's
headline run, around 2 days on 8 A100s. Zero-shot top-1 in % (DisCo-CLIP, appendix, section 1.3,
Table 2), which `disco_jax.report` lists next to a run's own:

    batch   ImageNet   V2      R       Sketch
     8,192  48.76      41.28   56.67   36.65
    16,384  50.95      43.07   59.24   38.74
    32,768  51.64      43.85   60.07   39.25
    65,536  51.91      44.19   60.52   39.76
"""

from ml_collections import ConfigDict

from disco_jax.configs import vit_b32_laion400m

BATCHES = (8_192, 16_384, 32_768, 65_536)
EPOCHS, SAMPLES = 16, 100_000_000


def get_config(batch: str = "32768") -> ConfigDict:
    """The main run's settings at one of the paper's batch sizes."""
    if batch not in map(str, BATCHES):
        raise ValueError(
            f"--config=...:{batch}: the batch must be one of {', '.join(map(str, BATCHES))}"
        )
    config = vit_b32_laion400m.get_config()
    config.batch_size = int(batch)
    config.num_epochs = float(EPOCHS)
    config.num_steps = EPOCHS * SAMPLES // int(batch)  # the paper gives this rounded
    config.data.num_samples = SAMPLES
    config.data.name = "laion100m/*.tar"  # the paper does not list the samples of its subset
    config.eval.every = SAMPLES // int(batch)  # one epoch
    return config
