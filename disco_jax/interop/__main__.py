"""Imports and exports weights.

python -m disco_jax.interop import --from openclip|openai|hf PATH_OR_REPO --out DIR
python -m disco_jax.interop export --to openclip|hf MODEL_OR_RUN --out DIR [--push REPO]
"""

import argparse
from pathlib import Path

from disco_jax.display.terminal import say
from disco_jax.processes.cli import guard
from disco_jax.runs.places import run_place


def parse_arguments() -> argparse.Namespace:
    """Parses the subcommand and its arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    taken = commands.add_parser("import", help="import another library's weights")
    taken.add_argument("source", help="a file, a folder, or a repository on the Hugging Face Hub")
    taken.add_argument(
        "--from", dest="library", choices=("openclip", "openai", "hf"), required=True
    )
    taken.add_argument("--model", help="a preset, for weights without a configuration")
    taken.add_argument("--image_size", type=int, help="new image size; resizes the positions")
    taken.add_argument("--tokenizer", type=Path, help="tokenizer.json of a SigLIP model")
    given = commands.add_parser("export", help="export to another library's format")
    given.add_argument("source", help="a model folder or a run's workdir, or the URL of one")
    given.add_argument("--to", dest="library", choices=("openclip", "hf"), required=True)
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
