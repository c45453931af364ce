"""DataComp's small, medium and large scales: fixed training, any choice of the pool's samples.

    python train.py --config=datacomp:SCALE --workdir=DIR --config.data.subset=UIDS.npy

SCALE is small, medium or large. UIDS.npy is a file of uids as DataComp's baselines.py writes it;
without it, all of the pool is used. Settings are those of DataComp's scale_configs.py, the others
OpenCLIP's. Zero-shot top-1 on ImageNet in % of the published baselines (OpenCLIP,
docs/datacomp_models.md; DataComp, Gadre et al., 2023, Table 3):

    filter                          small   medium   large
    none                            2.5     17.6     45.9
    basic                           3.0     22.6     51.6
    LAION-2B's                      3.1     23.0     55.3
    text-based                      4.6     25.5     56.1
    image-based                     4.3     26.8     57.2
    CLIP score (L/14, 30 %)         5.1     27.3     57.8
    image-based and CLIP score      3.9     29.7     63.1
"""

from ml_collections import ConfigDict

from disco_jax.configs import vit_b32_laion400m

# model, batch size, samples seen
SCALES = {
    "small": ("ViT-B-32", 4_096, 12_800_000),
    "medium": ("ViT-B-32", 4_096, 128_000_000),
    "large": ("ViT-B-16", 8_192, 1_280_000_000),
}


def get_config(scale: str = "small") -> ConfigDict:
    """The training of one of DataComp's scales; the number of steps does not depend on the data."""
    if scale not in SCALES:
        raise ValueError(f"--config=...:{scale}: the scale must be one of {', '.join(SCALES)}")
    config = vit_b32_laion400m.get_config()
    config.model.name, config.batch_size, samples = SCALES[scale]
    config.num_epochs, config.num_steps = 0.0, samples // config.batch_size
    config.optimizer.warmup_steps = 500
    config.data.name = f"datacomp_{scale}/shards/*.tar"  # as download_upstream.py writes them
    config.data.caption_key = "txt"
    config.data.num_samples = 0  # depends on what can still be downloaded, and on the subset
    config.eval.every = config.num_steps // 8
    return config
