"""Trains the demo with its samples in the orders `global` and `blocks`, and compares accuracies.

    python -m disco_jax.data.make_tars shapes --out=data/shapes-tars
    python benchmarks/order.py

The shards hold random scenes one after another, so the blocks are as random as any. The third row
is harder: the same samples sorted by caption, which makes every block a group of similar samples.

Each run is written to docs/results/order.json, or --out=FILE, as it ends; the same command
resumes with the runs that are missing.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.replicate import config_of  # noqa: E402
from benchmarks.trainer import (  # noqa: E402
    SEEDS,
    Trainer,
    batches,
    heading,
    over_seeds,
    train_missing,
)
from disco_jax.processes.backend import use_fake_devices  # noqa: E402

BLOCKS = {"order": "blocks", "block_size": 32, "window": 4, "lanes": 8}
# The fields of `config.data`, and whether the data are sorted by caption.
ORDERS: dict[str, tuple[dict[str, Any], bool]] = {
    "global": ({"order": "global"}, False),
    "blocks": (BLOCKS, False),
    "blocks, sorted data": (BLOCKS, True),
}


class Sorted:
    """A source with its samples sorted by caption."""

    def __init__(self, source: Any):
        captions = [source[i].captions for i in range(len(source))]
        self._source, self._index = source, sorted(range(len(source)), key=captions.__getitem__)
        self.fingerprint, self.problems = source.fingerprint, source.problems

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._source[self._index[index]]


def train(order: str, seed: int, steps: int) -> dict[str, Any]:
    """Returns the last loss and zero-shot top-1 of a run."""
    from disco_jax.configs.tars import get_config
    from disco_jax.data.source import Joined
    from disco_jax.data.sources import open_source

    tars, (fields, in_order) = get_config(), ORDERS[order]
    config = config_of(num_steps=steps, seed=seed)
    config.data.update(name=tars.data.name, caption_key=tars.data.caption_key, **fields)
    source = open_source(config.data, config.data.name, config.data.split)
    stream = batches(config, Joined([Sorted(source)]) if in_order else source)
    run = Trainer(config, config.fake_devices)
    for _ in range(steps):
        loss = run.step(next(stream))
    return {"loss": loss} | run.accuracy()


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Returns a Markdown row per order: mean and std of top-1 (%) over seeds."""
    return [
        f"| {name} | {' | '.join(over_seeds([row for row in rows if row['order'] == name]))} |"
        for name in ORDERS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=128_000, help="samples per run")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/order.json")
    arguments = parser.parse_args()
    use_fake_devices(8)
    runs = [{"order": name, "seed": seed} for seed in SEEDS for name in ORDERS]
    of = functools.partial(train, steps=arguments.samples // 128)
    rows = train_missing(arguments.out, heading() | {"blocks": BLOCKS}, runs, of)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
