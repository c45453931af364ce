"""Writes docs/recipes.md from the configs of the recipes and the planner's results for them.

    python scripts/recipes.py           # after a change of a config
    python scripts/recipes.py --plan    # also compiles each recipe again

A recipe's text is its config's docstring. The planner's results are in docs/results/recipes.json;
`--plan` needs requirements-plan.txt.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs/recipes.md", ROOT / "docs/results/recipes.json"
sys.path.insert(0, str(ROOT))

HEAD = """# Recipes

Configs with fixed settings, and what others have published for them. This page is written by
`python scripts/recipes.py` from the configs, whose docstrings name the source of each number.
None of these runs has been done with this repository, except where it says so. Memory and time
are the planner's: the step compiled for GPUs that were not there. Published runs of other
programs took 1.5 to 3.6 times as long as our estimates for them
([speed.md](speed.md#compared-with-published-times)), so read hours as lower bounds.
"""


class Recipe(NamedTuple):
    """A config, its arguments that are planned, and on what."""

    config: str
    arguments: tuple[str, ...]  # what follows the colon
    topology: str = "a100-40gb:8"
    flags: tuple[
        str, ...
    ] = ()  # of the planner, for what depends on the data or on imported models


RECIPES = (
    Recipe("vit_b32_laion100m", ("8192", "16384", "32768", "65536")),
    Recipe("datacomp", ("small", "medium", "large")),
    Recipe(
        "conceptual", ("cc3m", "cc12m", "cc3m,ViT-B-16", "cc12m,ViT-B-16"), flags=("num_steps=",)
    ),
    Recipe("clipa", ("1", "2")),
    Recipe("flip", ("train", "tune")),
    Recipe("lit", ("",), "l4:1", ("model.name=ViT-B-32", "init_from=")),
    Recipe("siglip2", ("",), "l4:1", ("model.name=ViT-B-16-SigLIP2", "init_from=")),
)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="compile each recipe again")
    parser.add_argument("--only", default="", help="with --plan: compile these configs only")
    return parser.parse_args()


def config_of(recipe: Recipe, argument: str) -> Any:
    """Returns the config of a recipe, with the steps of its epochs if they depend on the data."""
    module = importlib.import_module(f"disco_jax.configs.{recipe.config}")
    config = module.get_config(argument) if argument else module.get_config()
    if not config.num_steps:
        samples = module.SAMPLES[argument.partition(",")[0]]
        config.num_steps = int(config.num_epochs * samples / config.batch_size)
    return config


def command_of(recipe: Recipe, argument: str) -> list[str]:
    """Returns the arguments of `python -m disco_jax.plan`."""
    name = recipe.config + (f":{argument}" if argument else "")
    flags = [
        f"{flag}{config_of(recipe, argument).num_steps}" if flag == "num_steps=" else flag
        for flag in recipe.flags
    ]
    fields = [f"--config.{flag}" for flag in flags]
    if "num_steps=" in recipe.flags:
        fields.append("--config.num_epochs=0")
    return [f"--config={name}", f"--topology={recipe.topology}", *fields]


def plan(recipe: Recipe, argument: str) -> dict[str, Any]:
    """Compiles a recipe and returns what the page shows of it."""
    command = command_of(recipe, argument)
    done = subprocess.run(
        [sys.executable, "-m", "disco_jax.plan", *command, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    row = json.loads(done.stdout.splitlines()[-1])[0]
    kept = ("peak_bytes", "fits", "estimated_seconds", "estimated_hours")
    return {key: row[key] for key in kept}


def settings_table(recipe: Recipe) -> list[str]:
    """Returns a Markdown table of the settings, a row per argument."""
    head = "| config | model | batch | steps | learning rate | warm-up | weight decay |"
    lines = [head, re.sub(r"[^|]+", "---", head)]
    for argument in recipe.arguments:
        c = config_of(recipe, argument)
        sizes = [f"{c.model.image_size} px"] if c.model.image_size else []
        sizes += [f"{c.model.context_length} tokens"] if c.model.context_length else []
        cells = [
            f"`{recipe.config}{':' + argument if argument else ''}`",
            ", ".join([c.model.name, *sizes]),
            f"{c.batch_size:,}",
            f"{c.num_steps:,}",
            f"{c.optimizer.learning_rate:g}",
            f"{c.optimizer.warmup_steps:,}",
            f"{c.optimizer.weight_decay:g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plan_table(recipe: Recipe, found: dict[str, Any]) -> list[str]:
    """Returns a Markdown table of the planner's results, and the command of its first row."""
    name, _, count = recipe.topology.partition(":")
    head = f"| config | memory on each {name}, of {count} | fits | estimated s per step | hours |"
    lines = [head, re.sub(r"[^|]+", "---", head)]
    for argument in recipe.arguments:
        row = found[key(recipe, argument)]
        cells = [
            f"`{recipe.config}{':' + argument if argument else ''}`",
            f"{row['peak_bytes'] / 2**30:.1f} GiB",
            "yes" if row["fits"] else "no",
            f"{row['estimated_seconds']:.3f}",
            f"{row['estimated_hours']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    command = " ".join(command_of(recipe, recipe.arguments[0]))
    return [*lines, "", f"    python -m disco_jax.plan {command}"]


def key(recipe: Recipe, argument: str) -> str:
    """Returns the name of a recipe in the file of results."""
    return f"{recipe.config}:{argument}"


def page(found: dict[str, Any]) -> str:
    """Returns docs/recipes.md."""
    parts = [HEAD]
    for recipe in RECIPES:
        doc = importlib.import_module(f"disco_jax.configs.{recipe.config}").__doc__ or ""
        title, _, text = doc.strip().partition("\n\n")
        title = title.rstrip(".")
        parts += [f"## {title}\n", text + "\n", "\n".join(settings_table(recipe)) + "\n"]
        parts.append("\n".join(plan_table(recipe, found)) + "\n")
    return "\n".join(parts)


def main() -> None:
    """Writes the page."""
    arguments = parse_arguments()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if arguments.plan:
        for recipe in RECIPES:
            for argument in recipe.arguments:
                if arguments.only in recipe.config:
                    found[key(recipe, argument)] = plan(recipe, argument)
                    print(key(recipe, argument), found[key(recipe, argument)], flush=True)
                    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))
    print(f"Wrote {PAGE}")


if __name__ == "__main__":
    main()
