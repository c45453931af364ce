"""Imports and exports weights: disco-jax import, disco-jax export."""

import argparse
from pathlib import Path

from disco_jax.display.terminal import say
from disco_jax.processes.arguments import Parser
from disco_jax.processes.cli import guard
from disco_jax.runs.places import run_place

IMPORT = """Imports the weights and the config of a CLIP or SigLIP model of another library.

  disco-jax import --from=openclip laion/CLIP-ViT-B-32-laion2B-s34B-b79K --out=models/b32
  disco-jax import --from=openai ViT-B-32.pt --out=models/b32

To begin a run from them, train with --config.model.name=models/b32 --config.init_from=models/b32.
"""
EXPORT = """Exports a model or a run's newest checkpoint to another library, with a model card.

  disco-jax export --to=openclip runs/shapes --out=models/shapes
  disco-jax export --to=hf runs/shapes --out=models/shapes --push=NAME/shapes --private
"""


def parse_arguments() -> argparse.Namespace:
    """Parses the subcommand and its arguments."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    taken = commands.add_parser(
        "import", help="import another library's weights", description=IMPORT
    )
    taken.add_argument("source", help="a file, a folder, or a repository on the Hugging Face Hub")
    taken.add_argument(
        "--from",
        dest="library",
        choices=("openclip", "openai", "hf"),
        required=True,
        help="the library that wrote the weights",
    )
    taken.add_argument("--model", help="a preset, for weights without a configuration")
    taken.add_argument("--image_size", type=int, help="new image size; resizes the positions")
    taken.add_argument("--tokenizer", type=Path, help="tokenizer.json of a SigLIP model")
    given = commands.add_parser(
        "export", help="export to another library's format", description=EXPORT
    )
    given.add_argument("source", help="a model folder or a run's workdir, or the URL of one")
    given.add_argument(
        "--to",
        dest="library",
        choices=("openclip", "hf"),
        required=True,
        help="the library that will read them",
    )
    given.add_argument("--push", metavar="REPO", default="", help="also upload it to the Hub")
    given.add_argument("--private", action="store_true", help="if --push creates the repository")
    for command in (taken, given):
        command.add_argument("--out", type=Path, required=True, help="folder to create")
    return parser.parse_args()


def main() -> None:
    """Runs the command; a mistake exits with 2."""
    guard(_main)


def _main() -> None:
    """Runs the command.

    Raises:
      UserError: if something cannot be read, converted or written.
    """
    arguments = parse_arguments()
    from disco_jax.interop import export_model, import_model  # imported late: --help needs no JAX

    if arguments.command == "import":
        import_model(
            arguments.source,
            arguments.library,
            arguments.out,
            preset_name=arguments.model,
            image_size=arguments.image_size,
            tokenizer=arguments.tokenizer,
        )
    else:
        source = run_place(arguments.source, "MODEL_OR_RUN")
        export_model(source, arguments.library, arguments.out, arguments.push)
    say(f"Wrote {arguments.out}")
    if arguments.command == "export" and arguments.push:
        from disco_jax.interop.card import push

        say(f"Pushed {push(arguments.out, arguments.push, arguments.private)}")


if __name__ == "__main__":
    main()
