"""Tests that each mistake in a config is reported in one line, with the field and what is valid."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from disco_jax import losses
from disco_jax.config import default, flatten, zeroshot_set
from disco_jax.config.remat import REMAT
from disco_jax.config.validation import CHOICES, problems_of
from disco_jax.models.remat import rematerialize
from disco_jax.models.transformer import ACTIVATIONS
from disco_jax.step.optimizer import make_optimizer
from tests.conftest import ENV

ROOT = Path(__file__).parent.parent

# Each setting that follows `--config.`, and a part of its error message.
CASES = [
    ("batchsize=16", "unknown config field batchsize; did you mean batch_size?"),
    ("bach_size=16", "unknown config field bach_size; did you mean batch_size?"),
    ("optimizer.lr=1", "unknown config field optimizer.lr"),
    ("optimiser.learning_rate=1", "did you mean optimizer.learning_rate?"),
    ("model.quick_gelu=1", "unknown config field model.quick_gelu"),
    ("data.worker=1", "unknown config field data.worker; did you mean data."),
    ("loss=ring", "unknown config field loss"),
    ("batch_size=many", "batch_size is 'many'; it must be an integer"),
    ("batch_size=1e3", "batch_size is '1e3'; it must be an integer"),
    ("batch_size=0", "batch_size is 0; it must be at least 1"),
    ("batch_size=-8", "batch_size is -8; it must be at least 1"),
    ("num_steps=0", "num_steps is 0; it must be at least 1"),
    ("num_steps=1.5", "num_steps is '1.5'; it must be an integer"),
    ("seed=-1", "seed is -1; it must be at least 0"),
    ("seed=5000000000", "seed is 5000000000; it must be at most 4,294,967,295"),
    ("batch_size=12345678901234567890", "; it must be at most 2,147,483,647"),
    ("optimizer.eps=nan", "optimizer.eps is nan; it must be a finite number"),
    ("data.weights=1e999", "data.weights is (inf,); it must be a finite number"),
    ("data.weights=1e-320", "data.weights must be at least 1e-06 and differ by at most a factor"),
    ("data.timeout=1e30", "data.timeout is 1e+30; it must be at most 100,000,000"),
    ("eval.sets.new.source=x", "eval.sets has no set 'new'; define it in the config file"),
    ("eval.sets.zeroshot.sauce=x", "unknown config field eval.sets.zeroshot.sauce"),
    ("seed=x", "seed is 'x'; it must be an integer"),
    ("microbatch=-1", "microbatch is -1; it must be at least 0"),
    ("microbatch_mode=gpu", "microbatch_mode is 'gpu'; it must be one of scan, host"),
    ("microbatch_mode=host", "microbatch_mode 'host' requires microbatch"),
    ("fsdp=0", "fsdp is 0; it must be at least 1"),
    ("fake_devices=-2", "fake_devices is -2; it must be at least 0"),
    ("log_every=0", "log_every is 0; it must be at least 1"),
    ("checkpoint_every=0", "checkpoint_every is 0; it must be at least 1"),
    ("checkpoint_keep=0", "checkpoint_keep is 0; it must be at least 1"),
    ("max_bad_steps=0", "max_bad_steps is 0; it must be at least 1"),
    ("peer_timeout=0", "peer_timeout is 0.0; it must be greater than 0"),
    ("start_timeout=-1", "start_timeout is -1.0; it must be greater than 0"),
    ("peer_timeout=soon", "peer_timeout is 'soon'; it must be a number"),
    ("profile_steps=10", "profile_steps is '10'; it must be FIRST:LAST"),
    (f"profile_steps={'9' * 5000}:{'9' * 5001}", "it must be FIRST:LAST"),
    ("profile_steps=20:10", "profile_steps is '20:10'; it must be FIRST:LAST"),
    ("model.name=", "model.name is empty"),
    ("model.dtype=float16", "model.dtype is 'float16'; it must be one of float32, bfloat16"),
    ("model.dtype=bfloat", "did you mean bfloat16?"),
    ("model.attention=flash", "model.attention is 'flash'; it must be one of auto, xla, cudnn"),
    ("model.activation=relu", "model.activation is 'relu'; it must be one of"),
    ("model.image_remat=all", "model.image_remat is all; it must be one of none, dots, branches"),
    ("model.text_remat=fulll", "model.text_remat is fulll; it must be one of"),
    ("model.text_remat=full:2", "model.text_remat is full:2; it must be one of"),
    ("model.image_remat=dosts:2", "it must be one of none, dots, branches, full, offload, or"),
    ("model.image_remat=dosts:2", "did you mean dots?"),
    ("model.image_remat=dots:+1", "model.image_remat is dots:+1; it must be one of"),
    ("model.image_remat=dots:0", "model.image_remat is dots:0; it must be one of"),
    ("model.image_remat=dots:x", "model.image_remat is dots:x; it must be one of"),
    ("model.patch_dropout=1", "model.patch_dropout is 1.0; it must be at least 0 and less than 1"),
    ("model.dropout=-0.1", "model.dropout is -0.1; it must be at least 0 and less than 1"),
    ("model.image_trained_blocks=-2", "model.image_trained_blocks is -2; it must be at least -1"),
    ("loss.kind=triplet", "loss.kind is 'triplet'; it must be one of softmax, sigmoid"),
    ("loss.method=rng", "loss.method is 'rng'; it must be one of default, auto, reference"),
    ("optimizer.name=adam", "optimizer.name is 'adam'; it must be one of adamw, lion"),
    ("optimizer.learning_rate=0", "optimizer.learning_rate is 0.0; it must be greater than 0"),
    ("optimizer.learning_rate=inf", "optimizer.learning_rate is inf; it must be a finite number"),
    ("optimizer.b2=1", "optimizer.b2 is 1.0; it must be at least 0 and less than 1"),
    ("optimizer.eps=0", "optimizer.eps is 0.0; it must be greater than 0"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay is -1.0; it must be at least 0"),
    ("optimizer.warmup_steps=-1", "optimizer.warmup_steps is -1; it must be at least 0"),
    ("data.name=", "data.name is empty"),
    ("data.weights=(1.0,2.0)", "data.weights must be 1 positive numbers"),
    ("data.dir=~nobody-here/x", "; it must be a path in the home folder of an existing user"),
    ("data.weights=a", "data.weights is 'a'; it must be a tuple of numbers"),
    ("data.crop_scale=0", "data.crop_scale is 0.0; it must be greater than 0 and at most 1"),
    ("data.color_jitter=(0.4, 0.4)", "data.color_jitter is (0.4, 0.4); it must be four numbers of"),
    ("data.color_jitter=(0., 0., 0., 0.6)", "and hue, the last at most 0.5"),
    ("data.gray_scale_prob=2", "data.gray_scale_prob is 2.0; it must be at least 0 and at most 1"),
    ("data.num_workers=-1", "data.num_workers is -1; it must be at least 0"),
    ("data.max_bad_fraction=2", "data.max_bad_fraction is 2.0; it must be greater than 0 and at"),
    ("data.record_keys=perhaps", "data.record_keys is 'perhaps'; it must be true or false"),
    ("eval.batch_size=0", "eval.batch_size is 0; it must be at least 1"),
    ("eval.every=-1", "eval.every is -1; it must be at least 0"),
]


# Values for fields of any type: wrong types, extremes, non-finite numbers and Unicode.
WRONG = ["", "x", "é😀", "\u202etxet", "\x1b[31mred", "[/bold]", "None", "a" * 4096, "((((", "1,2"]
NUMBERS = ["-1", "0", "1e3", "1.5", "nan", "inf", "-inf", "1e999", "1e-320", "-0.0", "00", "1_0"]
HUGE = ["9" * 20, "9" * 5000, "-" + "9" * 20, "4294967296", "2147483648", "0x10", "1e308"]
TUPLES = ["()", "(1,)", "(0,)", "(-1.0,)", "(nan,)", "(1,2,3)", "[1]", "('a',)", "(1e999,)"]


def run(*arguments: str, program: Sequence[str] = ("train.py",)) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *program, *arguments], cwd=ROOT, env=ENV, capture_output=True, text=True
    )


def starts(folder: Path, given: list[str], *options: str) -> list[tuple[int, str]]:
    """Returns the exit code and standard error of a start with each setting."""
    common = ["--config=shapes", f"--workdir={folder / 'run'}"]
    (folder / "cases.json").write_text(json.dumps([[*common, f"--config.{x}"] for x in given]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.many_starts", folder / "cases.json", *options],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_every_mistake_is_one_line(tmp_path):
    assert len(CASES) >= 40
    found = starts(tmp_path, [given for given, _ in CASES])
    for (given, message), (code, errors) in zip(CASES, found, strict=True):
        assert code == 2, (given, errors)
        assert errors.startswith("error: "), (given, errors)
        assert errors.count("\n") == 1, (given, errors)
        assert message in errors, (given, errors)
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_reported_before_jax_is_imported(tmp_path):
    """Importing JAX takes seconds."""
    code = """
import runpy, sys
try:
    runpy.run_path("train.py", run_name="__main__")
finally:
    print("jax" in sys.modules)
"""
    given = ["--config=shapes", f"--workdir={tmp_path / 'run'}", "--config.seed=x"]
    result = run(*given, program=("-c", code))
    assert result.returncode == 2
    assert result.stderr == "error: seed is 'x'; it must be an integer\n"
    assert result.stdout == "False\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_any_value_of_any_field_is_right_or_told(tmp_path):
    """With any value, a run starts or ends with one printable line that names the field."""
    given = [
        f"{field}={value}"
        for field in (*flatten(default()), "eval.sets.new.source", "eval.sets.zeroshot.split")
        for value in (*WRONG, *NUMBERS, *HUGE, *TUPLES)
        if len(value) < 100 or field in ("batch_size", "data.weights", "model.name")
    ][::3]
    assert len(given) >= 700
    found = starts(tmp_path, given)
    right = 0
    for setting, (code, errors) in zip(given, found, strict=True):
        assert code in (0, 2), (setting, errors)
        right += code == 0
        if code:
            name = "eval.sets" if setting.startswith("eval.sets") else setting.partition("=")[0]
            assert name in errors, (setting, errors)
            assert errors.count("\n") == 1, (setting, errors)
            assert errors.rstrip("\n").isprintable(), (setting, errors)
    assert right >= 150


def test_all_mistakes_are_told_at_once(tmp_path):
    wrong = ("batchsize=3", "num_steps=x", "fsdp=0", "loss.method=rng", "optimizer.eps=0")
    given = [f"--config.{case}" for case in wrong]
    result = run("--config=shapes", f"--workdir={tmp_path}", *given, "--process_cont=2")
    assert result.returncode == 2
    assert "unknown flag --process_cont; did you mean process_count?" in result.stderr
    for field in ("batchsize", "num_steps", "fsdp", "loss.method", "optimizer.eps"):
        assert f"{field} is" in result.stderr or f"field {field}" in result.stderr
    assert result.stderr.count("; ") >= 4


def test_the_defaults_and_a_labelled_set_are_right():
    config = default()
    config.eval.sets.mine = zeroshot_set("mine")
    assert problems_of(config) == []
    config.eval.sets.mine.tempaltes = "x"
    assert problems_of(config) == ["unknown config field eval.sets.mine.tempaltes"]


@pytest.mark.parametrize(("steps", "right"), [(97_656, True), (100_000, True), (50_000, False)])
def test_steps_epochs_and_samples_agree(steps, right):
    """16 epochs of 100 M samples at batch size 16,384, which the paper rounds to 100K steps."""
    config = default()
    config.num_epochs, config.data.num_samples = 16.0, 100_000_000
    config.batch_size, config.num_steps = 16_384, steps
    problems = problems_of(config)
    assert problems == ([] if right else problems)
    if not right:
        assert "97,656 steps would" in problems[0]


def test_choices_are_those_of_the_code():
    """Validation does not import JAX, so it has separate lists of the choices."""
    assert CHOICES["loss.method"] == losses.METHODS
    assert CHOICES["loss.precision"] == losses.arguments.PRECISIONS
    assert CHOICES["loss.kind"] == losses.KINDS
    assert set(CHOICES["model.activation"]) == {"", *ACTIVATIONS}
    for remat in REMAT:
        rematerialize(abs, remat)
    config = default()
    for name in CHOICES["optimizer.name"]:
        config.optimizer.name = name
        make_optimizer(config)
