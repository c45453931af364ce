"""Will it fit, and how long will it take? Compiles the training step for absent accelerators.

  disco-jax plan --config=vit_b32_laion400m --topology=a100-40gb:8
  disco-jax plan --config=pairs --topology=l4:1 --find_max_batch --config.model.name=ViT-B-16
  disco-jax plan --loss_only --dim=512 --topology=h100-80gb:8 --compare=auto,default

Needs `pip install -r requirements-plan.txt` (or disco-jax[plan]) and Linux, but no accelerator.
"""

import json
import re
import sys
from pathlib import Path

from absl import flags

from disco_jax.config.validation import METHODS
from disco_jax.display.terminal import PlainConsole
from disco_jax.errors import UserError
from disco_jax.plan.accelerators import ACCELERATORS, parse_topology
from disco_jax.plan.charts import draw_memory, draw_time
from disco_jax.plan.plans import (
    KEEPING,
    LINEAR,
    find_max_batch,
    flags_of,
    plan_all,
    plan_fastest,
)
from disco_jax.plan.show import show_fastest, show_many, show_one
from disco_jax.processes import cli

FLAGS = flags.FLAGS
flags.declare_key_flag("config")
flags.DEFINE_string("topology", None, f"NAME:COUNT; NAME is {', '.join(ACCELERATORS)} or cpu.")
flags.DEFINE_integer("hosts", None, "Number of hosts; default: 8 GPUs or 4 TPU chips per host.")
flags.DEFINE_list("batch_size", [], "Global batch sizes, comma-separated.")
flags.DEFINE_list("compare", [], "Loss methods, comma-separated, instead of the config's method.")
flags.DEFINE_bool("find_max_batch", False, "Search for the largest batch that fits.")
flags.DEFINE_bool("find_fastest", False, "Search for the fastest settings that fit the batch.")
flags.DEFINE_bool("loss_only", False, "Plan only the loss and its gradients; needs no --config.")
flags.DEFINE_integer("dim", None, "Feature width for --loss_only.")
flags.DEFINE_string("chart", None, "PNG file for a plot of peak memory against batch size.")
flags.DEFINE_string("time_chart", None, "PNG file for a plot of where a step's time goes.")
flags.DEFINE_bool("json", False, "Print the rows as JSON on the last line of standard output.")


def main() -> None:
    """Parses the flags and plans; a mistake exits with 2."""
    cli.guard(_plan)


def _plan() -> None:
    """Parses the flags, compiles, and prints the results."""
    loss_only = any(re.fullmatch(r"--?loss_only(=true|=1)?", arg, re.I) for arg in sys.argv)
    config = cli.parse(sys.argv, __name__, __doc__ or "", config_needed=not loss_only)
    if FLAGS.topology is None:
        raise UserError("--topology=NAME:COUNT is missing; pass e.g. --topology=a100-40gb:8")
    topology = parse_topology(FLAGS.topology, FLAGS.hosts)
    check_flags(topology.name)
    batches = [int(text) for text in FLAGS.batch_size] or [config.batch_size]
    console = PlainConsole(width=110)
    if FLAGS.find_fastest:
        rows = plan_fastest(config, topology, batches[0])
        show_fastest(rows, flags_of(config, rows[0]), console)
    else:
        methods = FLAGS.compare or [config.loss.method]
        search = find_max_batch if FLAGS.find_max_batch else plan_all
        rows = search(config, topology, batches, methods, loss_only=FLAGS.loss_only, dim=FLAGS.dim)
        (show_one if len(rows) == 1 else show_many)(rows, console)
    if FLAGS.chart:
        draw_memory(rows, Path(FLAGS.chart))
        console.print(f"Wrote {FLAGS.chart}")
    if FLAGS.time_chart:
        draw_time(rows[0], Path(FLAGS.time_chart))
        console.print(f"Wrote {FLAGS.time_chart}")
    if FLAGS.json:
        print(json.dumps(rows))


def check_flags(device: str) -> None:
    """Raises UserError for values and combinations of flags that can't be used."""
    if not all(text.isdecimal() and int(text) > 0 for text in FLAGS.batch_size):
        raise UserError(
            f"--batch_size: {','.join(FLAGS.batch_size)} is not a list of positive integers"
        )
    for method in FLAGS.compare:
        known = [*METHODS, *(f"{name}{LINEAR}" for name in KEEPING)]
        if method not in known:
            raise UserError(f"--compare: {method!r} is not one of {', '.join(known)}")
    searches = ("find_max_batch", "find_fastest")
    for flag in (name for name in searches if FLAGS[name].value and len(FLAGS.batch_size) > 1):
        raise UserError(f"--{flag} starts from one --batch_size, not several")
    if FLAGS.find_fastest and (FLAGS.find_max_batch or FLAGS.loss_only or FLAGS.compare):
        raise UserError(
            "--find_fastest plans whole steps at one batch and chooses the loss itself; "
            "leave out --find_max_batch, --loss_only and --compare"
        )
    if device == "cpu" and (FLAGS.find_fastest or FLAGS.time_chart):
        raise UserError("--topology=cpu: no time can be estimated; name a GPU or TPU")


if __name__ == "__main__":
    main()
