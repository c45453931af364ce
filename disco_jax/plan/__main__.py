"""Will it fit? python -m disco_jax.plan --config=FILE --topology=a100-40gb:8 [--help]."""

import json
import re
import sys
from pathlib import Path

from absl import flags

from disco_jax.config.validation import METHODS
from disco_jax.display.terminal import PlainConsole
from disco_jax.errors import UserError
from disco_jax.plan.accelerators import ACCELERATORS, parse_topology
from disco_jax.plan.plans import find_max_batch, plan_all
from disco_jax.plan.show import draw, show_many, show_one
from disco_jax.processes import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("topology", None, f"{', '.join(ACCELERATORS)} or cpu, and how many: NAME:8")
flags.DEFINE_integer("hosts", None, "Hosts; eight GPUs or four TPU chips to each by default.")
flags.DEFINE_list("batch_size", [], "Global batch, or several with commas.")
flags.DEFINE_list("compare", [], "Loss methods with commas, instead of the config's.")
flags.DEFINE_bool("find_max_batch", False, "Search the largest batch that fits.")
flags.DEFINE_bool("loss_only", False, "The loss and its gradients alone; needs no --config.")
flags.DEFINE_integer("dim", None, "Width of the features, with --loss_only.")
flags.DEFINE_string("chart", None, "PNG of peak memory against batch.")
flags.DEFINE_bool("json", False, "Rows as JSON, the last line of standard output.")

USAGE = """python -m disco_jax.plan --config=configs/vit_b32_laion400m.py --topology=a100-40gb:8
       [--hosts=N] [--batch_size=N,...] [--compare=METHOD,...] [--find_max_batch]
       [--loss_only --dim=512] [--chart=FILE.png] [--json]"""


def main() -> None:
    """Parses, compiles, shows."""
    loss_only = any(re.fullmatch(r"--?loss_only(=true|=1)?", arg, re.I) for arg in sys.argv)
    config = cli.parse(sys.argv, USAGE, config_needed=not loss_only)
    if FLAGS.topology is None:
        raise UserError("--topology=NAME:COUNT is missing, a100-40gb:8 say")
    topology = parse_topology(FLAGS.topology, FLAGS.hosts)
    if not all(text.isdecimal() and int(text) > 0 for text in FLAGS.batch_size):
        raise UserError(f"--batch_size: {','.join(FLAGS.batch_size)} is not a list of numbers")
    for method in FLAGS.compare:
        if method not in METHODS:
            raise UserError(f"--compare: {method!r} is not one of {', '.join(METHODS)}")
    if FLAGS.find_max_batch and len(FLAGS.batch_size) > 1:
        raise UserError("--find_max_batch begins at one --batch_size, not at several")
    batches = [int(text) for text in FLAGS.batch_size] or [config.batch_size]
    methods = FLAGS.compare or [config.loss.method]
    scope = {"loss_only": FLAGS.loss_only, "dim": FLAGS.dim}
    search = find_max_batch if FLAGS.find_max_batch else plan_all
    rows = search(config, topology, batches, methods, **scope)
    console = PlainConsole(width=110)
    if len(rows) == 1:
        show_one(rows[0], console)
    else:
        show_many(rows, console)
    if FLAGS.chart:
        draw(rows, Path(FLAGS.chart))
        console.print(f"drawn: {FLAGS.chart}")
    if FLAGS.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    cli.guard(main)
