"""The command `disco-jax`, with one word for each thing that one does with a model."""

import difflib
import importlib
import sys
from importlib.metadata import version

# Word, module, further arguments, and what it does.
COMMANDS = (
    ("train", "disco_jax.train", (), "train a model, or resume a run"),
    ("eval", "disco_jax.evaluate", (), "evaluate a run's checkpoints"),
    ("report", "disco_jax.report", (), "compare runs in a page with curves and tables"),
    ("plan", "disco_jax.plan.__main__", (), "will it fit, and how long will it take?"),
    ("inspect", "disco_jax.data.inspect", (), "what is in my data, and what is wrong with it?"),
    ("index", "disco_jax.data.index", (), "index tar shards, e.g. in a bucket"),
    ("make_tars", "disco_jax.data.make_tars", (), "write any source as tar shards"),
    ("import", "disco_jax.interop.__main__", ("import",), "import weights of another library"),
    ("export", "disco_jax.interop.__main__", ("export",), "export weights, and push them"),
    ("embed", "disco_jax.embed", (), "write the features of many images"),
    ("teach", "disco_jax.teach", (), "store a model's features, to be distilled from"),
    ("checkpoint", "disco_jax.checkpoint", (), "rewind a run to an earlier step"),
    ("accept", "disco_jax.accept.__main__", (), "do the documentation's claims hold here?"),
)
HELP = """usage: disco-jax COMMAND [--help] [...]

Trains CLIP models in JAX with an exact, distributed contrastive loss.

{commands}

Begin with `disco-jax train --config=shapes --workdir=runs/shapes`, which makes its own data, or
with `disco-jax inspect '/data/*.tar'`. Each command has a --help of its own.
"""


def main() -> None:
    """Runs the command that the first argument names. A mistake exits with 2."""
    word, *rest = sys.argv[1:] or ["--help"]
    if word in ("-h", "--help", "help"):
        width = max(len(name) for name, *_ in COMMANDS)
        lines = [f"  {name:<{width}}  {does}" for name, _, _, does in COMMANDS]
        print(HELP.format(commands="\n".join(lines)), end="")
        return
    if word == "--version":
        print(f"disco-jax {version('disco-jax')}")
        return
    for name, module, arguments, _ in COMMANDS:
        if name == word:
            program = "disco-jax" if arguments else f"disco-jax {name}"
            sys.argv = [program, *arguments, *rest]
            importlib.import_module(module).main()
            return
    names = [name for name, *_ in COMMANDS]
    near = difflib.get_close_matches(word, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(names)}"
    print(f"error: no command {word!r}; {hint}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
