"""Runs the commands in README.md and docs/*.md, in a fresh clone of the repository.

    python scripts/check_docs.py [--only=TEXT] [--list]

A command is an indented line that starts with a known program (PROGRAMS); consecutive commands form
one script. Commands that would take hours are shortened (SHORTER). Commands that need a cluster, an
account or another library are replaced by another check (ELSEWHERE). The output reports both.
Python blocks run too (NAMES). Needs requirements-dev.txt, and checks only what is committed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAMS = (
    "python ",
    "make ",
    "pip ",
    "sbatch ",
    "kubectl ",
    "PLAN=",
    "$PLAN ",
    "PYTHONPATH=",
    "disco-jax ",
)
# FILES creates stand-ins for repositories on the Hub and for the user's own files.
OPENCLIP = "stand_ins/openclip"
FILES = f"""
import io, json, shutil, tarfile
from pathlib import Path
import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from disco_jax.interop import export_model, import_model
golden, folder = Path("tests/golden"), Path("{OPENCLIP}")
folder.mkdir(parents=True)
weights, sizes = (golden / f"openclip_tiny_gelu.{{end}}" for end in ("weights.safetensors", "json"))
tensors, model = load_file(weights), json.loads(sizes.read_text())
model["text_cfg"]["vocab_size"] = 49408  # CLIP's tokenizer must fit the model
embedding = tensors["token_embedding.weight"]
tensors["token_embedding.weight"] = np.resize(embedding, (49408, embedding.shape[1]))
save_file(tensors, folder / "open_clip_model.safetensors")
spec = {{"model_cfg": model, "preprocess_cfg": {{}}}}
(folder / "open_clip_config.json").write_text(json.dumps(spec))
import_model(str(folder), "openclip", Path("stand_ins/ours"))
export_model(Path("stand_ins/ours"), "hf", Path("stand_ins/hf"))
Path("photos").mkdir()
for name in ("cat.jpg", "dog.jpg", "photos/cat.jpg"):
    shutil.copy(golden / "preprocess_0_in.png", name.replace(".jpg", ".png"))
    Image.open(golden / "preprocess_0_in.png").convert("RGB").save(name)
rows = "".join(f"../cat.jpg,a cat number {{i}}\\n" for i in range(8))
Path("stand_ins/list.csv").write_text("image,caption\\n" + rows)
shutil.copytree(golden / "siglip_tiny", "stand_ins/siglip2")
words = ("<pad>", "</s>", "<unk>", "a", "cat")
pieces = Tokenizer(models.WordLevel({{word: i for i, word in enumerate(words)}}, "<unk>"))
pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
pieces.save("stand_ins/siglip2/tokenizer.json")
with tarfile.open("stand_ins/00000.tar", "w") as tar:
    for i in range(64):
        data = Path("cat.jpg").read_bytes()
        for end, member in (("jpg", data), ("txt", b"a cat"), ("json", b'{{"caption": "a cat"}}')):
            info = tarfile.TarInfo(f"{{i:05d}}.{{end}}")
            info.size = len(member)
            tar.addfile(info, io.BytesIO(member))
"""
SHORT = " ".join(
    f"--config.{field}"
    for field in ("num_steps=4", "batch_size=16", "eval.every=0", "checkpoint_every=2")
)
# Substitutions that shorten commands. They apply in order, each to the result of those before it.
SHORTER = (
    (r"^disco-jax (train|eval)", r"python \1.py"),
    (r"^make demo.*", "python train.py --config=shapes --workdir=runs/shapes"),
    (
        r"^make emoji.*",
        "make emoji-data && python train.py --config=emoji --workdir=runs/emoji",
    ),
    (r"(nearest_pixels\.py)", r"\1 --sizes=8 --out=runs/nearest_pixels.json"),
    (r"^make test.*", "python -m pytest tests/test_collectives.py"),
    (r"^make plan.*", "make -n plan"),
    (r"--config=\.\.\.", "--config=shapes --workdir=runs/finetuned"),
    (r"'?/data/\{00000\.\.00999\}\.tar'?|'?/data/\*\.tar'?", "stand_ins/00000.tar"),
    (r"'s3://bucket/\S*\.tar'", "stand_ins/00000.tar"),
    (r"gs://BUCKET/runs/mine", "runs/not_in_a_bucket"),
    (r"benchmarks/bucket\.py", "benchmarks/bucket.py --pairs=1 --steps=20 --every=10"),
    (r"--part=3/32 --out=\S*", "--out=stand_ins/index"),
    (r"(data\.name=stand_ins\S*)", r"\1 --config.data.num_workers=0 --config.model.dtype=float32"),
    (r"( train\.py.*?| eval\.py.*?)( &)?$", rf"\1 {SHORT}\2"),
    (r"(train\.py --config=pairs(?!.*model\.name).*)", r"\1 --config.model.name=tiny"),
    (r"openai/clip-vit-base-patch32", "stand_ins/hf"),
    (r"PATH_OR_REPO --out=models/siglip2", "stand_ins/siglip2 --out=models/siglip2"),
    (r"PATH_OR_REPO", OPENCLIP),
    (r"((?:train|eval)\.py --config=siglip2 .*)", r"\1 --config.microbatch=0"),
    (r"/data/list\.csv --out=/data/shards", "stand_ins/list.csv --out=stand_ins/shards"),
    (r"(chaos\.py) --kills=\d+( --steps=\d+)?", r"\1 --kills=2 --steps=20"),
    (r"input\.py --remote", "input.py --remote --images=512 --repeats=1"),
    (r"(replicate\.py equivalence)", r"\1 --steps=2 --every=2 --out=runs/results"),
    (r"(replicate\.py (batch_size|negatives))", r"\1 --help"),  # many runs
    (r"(benchmarks/order\.py)", r"\1 --samples=512 --out=runs/order.json"),
    (r"(replicate\.py memory)", r"\1 --batches=8192 --out=runs/results"),
    (r"(replicate\.py time)", r"\1 --batches=512 --out=runs/results"),
    (r"(loss\.py .*)--batch[= ][0-9,]+", r"\1--batch 512"),
    (r"(step\.py .*)--batch 1024 --microbatch 128", r"\1--batch 64 --microbatch 8"),
    (r"benchmarks/eval\.py", "benchmarks/eval.py --classes=8 --images=100"),
    (r"input\.py --index=1000 --entries=10000", "input.py --index=2 --entries=100"),
    (r"(disco_jax\.plan.*--batch_size=[0-9]+),[0-9,]+", r"\1"),
    (r"--go_back_to=STEP", "--go_back_to=2"),
    (r"checkpoint WORKDIR", "checkpoint runs/shapes"),
)
FRESH = ("runs/mine", "runs/pairs", "runs/own", "models")
YAML = "import sys, yaml; list(yaml.safe_load_all(sys.stdin))"
# Commands that can't run on every machine, and what to run instead.
ELSEWHERE = (
    (r"^sbatch (\S+)", r"bash -n \1"),
    (r"^kubectl apply -f (\S+)", rf"python -c '{YAML}' < \1"),
    (r"^pip install", "true"),
    (r"emoji/make\.py", "true"),  # needs npm
    # Recipes need GPUs and data of their own; tests build their configs, and the planner's commands
    # run. What they import is a stand-in elsewhere.
    (r"train\.py --config=(vit_b32_laion100m:[A-Z]|datacomp:|conceptual:|clipa:|flip:)", "true"),
    (r"train\.py --config=lit ", "true"),
    (r"--peer openclip|parity\.py", "true"),  # needs requirements-bench.txt
)  # fmt: skip
# Names that the Python examples may use without defining them.
NAMES = """
import jax, numpy as np
from disco_jax.config import default
from disco_jax.processes.backend import use_fake_devices
from disco_jax.mesh import make_mesh
config = default()
use_fake_devices(2)
mesh = make_mesh(jax.devices())
rows = np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32)
image, text = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
logit_scale = np.float32(10)
"""


def blocks(text: str) -> tuple[list[list[str]], list[str]]:
    """Extracts the shell scripts and the Python blocks of one document."""
    python = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    shell: list[list[str]] = []
    inside = False
    for line in re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).splitlines():
        command = line[4:].split("   #")[0].rstrip() if line.startswith("    ") else ""
        if command.startswith(PROGRAMS):
            shell.append([*shell.pop(), command] if inside else [command])
        inside = command.startswith(PROGRAMS)
    return shell, python


def runnable(command: str) -> tuple[str, str]:
    """Returns what to run for a command, and a label for the output."""
    for pattern, instead in ELSEWHERE:
        if found := re.search(pattern, command):
            return found.expand(instead), "elsewhere"
    short = command
    for pattern, instead in SHORTER:
        short = re.sub(pattern, instead, short)
    return short, "as written" if short == command else "shortened"


def run(script: str, where: Path) -> str:
    """Runs a script; returns the end of its output if it failed, else an empty string."""
    path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
    job = subprocess.run(
        ["bash", "-ec", script],
        cwd=where,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(where), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    return "" if job.returncode == 0 else f"{job.stdout[-1500:]}\n{job.stderr[-3000:]}"


def main() -> None:
    """Runs the scripts; exits with 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run only the commands that contain this text")
    parser.add_argument("--list", action="store_true", help="list what would run")
    arguments = parser.parse_args()
    done: set[str] = set()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "copy"
        subprocess.run(["git", "clone", "--quiet", ROOT, where], check=True)
        (where / "data").mkdir()
        if (ROOT / "data/shapes").is_dir():  # otherwise the first command draws it
            (where / "data/shapes").symlink_to(ROOT / "data/shapes")
        if not arguments.list and (output := run(f"python - <<'END'{FILES}END", where)):
            sys.exit(output)
        for document in (where / "README.md", *sorted((where / "docs").glob("*.md"))):
            for left in FRESH:  # each document starts without them
                shutil.rmtree(where / left, ignore_errors=True)
            shell, python = blocks(document.read_text())
            scripts = [("\n".join(c), [runnable(line) for line in c]) for c in shell]
            scripts += [
                (code, [(f"python - <<'END'{NAMES}{code}END", "as written")]) for code in python
            ]
            for shown, lines in scripts:
                script = "\n".join(command for command, _ in lines)
                script += "\nfor job in $(jobs -p); do wait $job; done"  # a bare `wait` never fails
                # Always run the first script: it trains the model that others evaluate and export.
                if script in done or (done and arguments.only not in shown):
                    continue
                done.add(script)
                how = ", ".join(dict.fromkeys(how for _, how in lines))
                print(f"{document.name}: {shown}\n  [{how}]", flush=True)
                if arguments.list:
                    print("  " + "\n  ".join(command for command, _ in lines))
                    continue
                begun = time.monotonic()
                if output := run(script, where):
                    failed += 1
                    print(f"  FAILED: {script}\n{output}")
                print(f"  {time.monotonic() - begun:.0f} s", flush=True)
    print(f"{len(done)} scripts, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
