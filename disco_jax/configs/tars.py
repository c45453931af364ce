"""The demo, trained from tar shards instead of the TFDS dataset, with the same result.

    python -m disco_jax.data.make_tars shapes --out=data/shapes-tars
    python train.py --config=tars --workdir=runs/tars

For your own shards, set --config.data.name='/data/{00000..00999}.tar' and adapt the eval section.
"""

from ml_collections import ConfigDict

from disco_jax.configs import shapes


def get_config() -> ConfigDict:
    """As `shapes`; evaluation still reads its labeled TFDS splits."""
    config = shapes.get_config()
    config.data.name = "data/shapes-tars/{00000..00039}.tar"
    config.data.caption_key = "txt"
    config.eval.retrieval_name = "shapes"
    return config
