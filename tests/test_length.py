"""Tests how the length of a run is set and how its progress is reported."""

import io
import json
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from disco_jax.config import default
from disco_jax.config.validation import problems_of
from disco_jax.data.source import Joined
from disco_jax.display.terminal import PlainConsole
from disco_jax.errors import UserError
from disco_jax.evaluation import main as evaluation
from disco_jax.runs.checkpoint import Checkpoints
from disco_jax.runs.home import Home
from disco_jax.runs.workdir import check_same
from disco_jax.step.state import TrainState
from disco_jax.training import loop, progress, setup
from disco_jax.training.length import check_length, warm_up_note, with_steps
from disco_jax.training.progress import TrainProgress
from tests.small_config import get_config
from tests.small_run import rows


def of(*sizes: int) -> Joined:
    class Sized(SimpleNamespace):
        def __len__(self):
            return self.size

    return Joined([Sized(size=n, fingerprint="", problems=Counter()) for n in sizes])


def config(**fields):
    c = default()
    c.batch_size, c.num_steps, c.data.name = 16, 100, "a"
    for name, value in fields.items():
        c[name] = value
    return c


@pytest.mark.parametrize("size", [1, 5, 15])
def test_data_smaller_than_a_batch_are_refused(size):
    expected = (
        rf"data\.name: the data have {size} samples, fewer than a batch, 16, which would hold"
    )
    with pytest.raises(UserError, match=expected):
        check_length(config(), of(size))
    with pytest.raises(UserError, match=expected):
        check_length(config(), of(size - 1, 1))
    check_length(config(), of(16))
    check_length(config(), of(9, 7))


def test_a_mixtures_sources_fill_their_shares():
    """Weights of 3 : 1 take 12 and 4 of 16 samples, and each source has separate epochs."""
    c = config()
    c.data.name, c.data.weights = "a.csv::b.csv", (3.0, 1.0)
    check_length(c, of(12, 4))
    expected = r"data\.name: b\.csv has 3 samples, fewer than its share of a batch, 4, which"
    with pytest.raises(UserError, match=expected):
        check_length(c, of(1000, 3))
    with pytest.raises(UserError, match=r"a\.csv has 11 samples, fewer than its share of a batch"):
        check_length(c, of(11, 1000))


@pytest.mark.parametrize(
    ("samples", "epochs", "steps", "right"),
    [
        (1600, 1.0, 100, True),
        (1600, 1.0, 104, True),
        (1600, 1.0, 106, False),
        (1600, 2.0, 100, False),
        (160, 10.0, 100, True),
        (16, 0.25, 1, True),
        (16, 0.25, 2, False),
    ],
)
def test_epochs_are_of_the_data_that_are_there(samples, epochs, steps, right):
    c = config(num_steps=steps, num_epochs=epochs)
    if right:
        check_length(c, of(samples))
        return
    wanted = max(round(epochs * samples / 16), 1)
    expected = (
        rf"of the {samples:,} samples in data\.name, not num_epochs {epochs:g}; {wanted} steps"
    )
    with pytest.raises(UserError, match=expected):
        check_length(c, of(samples))


@pytest.mark.parametrize(
    ("samples", "epochs", "steps"), [(1600, 1.0, 100), (1610, 2.0, 201), (48, 0.1, 1), (17, 3.0, 3)]
)
def test_steps_follow_from_epochs(samples, epochs, steps):
    c = config(num_steps=0, num_epochs=epochs)
    assert problems_of(c) == []
    found = with_steps(c, samples)
    assert (found.num_steps, c.num_steps) == (steps, 0)
    check_length(found, of(samples))
    given = config(num_epochs=epochs)
    assert with_steps(given, samples).num_steps == 100
    assert problems_of(config(num_steps=0)) == [
        "num_steps is 0; it must be at least 1, unless num_epochs is set"
    ]


def test_a_warm_up_longer_than_the_run_is_told():
    c = config()
    c.optimizer.warmup_steps = 2_000
    assert warm_up_note(c) == (
        "note: optimizer.warmup_steps 2,000 is longer than the run, 100 steps: the learning rate "
        "reaches 5.0% of its peak"
    )
    for warm_up in (0, 99, 100):
        c.optimizer.warmup_steps = warm_up
        assert warm_up_note(c) == ""


@pytest.mark.parametrize("field", ["num_steps", "num_epochs"])
def test_a_longer_run_is_told_how_to_go_on(field, tmp_path):
    stored = json.loads(config().to_json())
    longer = config(**{field: 200})
    expected = (
        rf"{field} \(.*\).*; to train on, begin a run in another workdir with init_from={tmp_path}$"
    )
    with pytest.raises(UserError, match=expected):
        check_same(stored, longer, tmp_path)
    for other in (config(num_steps=50), config(seed=3)):
        with pytest.raises(UserError, match=r"or use that run's config$"):
            check_same(stored, other, tmp_path)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test advances."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def lefts(text: str) -> list[int]:
    return [60 * int(m) + int(s) for m, s in re.findall(r"(\d+):(\d\d) left", text)]


@pytest.mark.parametrize("every", [1, 5, 10])
def test_the_time_left_does_not_jump(every, clock, capsys):
    """A step takes 2 s, an evaluation 60 s, a save 20 s, and the compilation at the start 100 s."""
    bar = TrainProgress(0, 100, 16)
    clock.seconds += 100
    speeds = []
    for step in range(1, 101):
        clock.seconds += 2
        if step == 1 or step % every == 0:
            speeds.append(bar.update(step, 1.0, 1.0)["train/images_per_second"])
        for each, seconds in ((7, 60), (10, 20)):
            if step % each == 0:
                with bar.paused():
                    clock.seconds += seconds
    assert speeds[1:] == [pytest.approx(8)] * (len(speeds) - 1)
    shown = lefts(capsys.readouterr().out)
    logged = [step for step in range(2, 101) if step % every == 0]
    assert shown == [2 * (100 - step) for step in logged]


def test_the_time_left_is_of_several_updates(clock, capsys):
    """One update that takes ten times as long changes it by less than a factor of three."""
    bar = TrainProgress(0, 1000, 16)
    for step in range(1, 30):
        clock.seconds += 2 if step == 20 else 0.2
        bar.update(step, 1.0, 1.0)
    shown = np.array(lefts(capsys.readouterr().out))
    assert shown.max() < 3 * shown.min()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_progress_takes_one_line_of_a_terminal(width):
    bar = TrainProgress(0, 195_312, 32_768)
    bar.update(1, 10.0, 14.29)
    bar.update(2, 10.0, 14.29)
    out = io.StringIO()
    terminal = PlainConsole(file=out, width=width, force_terminal=True, color_system=None)
    terminal.print(bar._bar.get_renderable())
    (line,) = out.getvalue().splitlines()
    assert len(line) <= width
    assert "step 2/195312" in line


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A config with 48 images and captions, and a model that is never created."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["image,caption"]
    for i in range(48):
        Image.new("RGB", (16, 16), (i, i, i)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,number {i}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    config = get_config()
    config.data.name, config.model.name = f"{folder}/pairs.csv", "tiny"
    return config


class Evaluations:
    """A stand-in for `Evaluator` without labeled sets, whose first evaluation finds nothing."""

    def __init__(self, *_):
        self.sets = {}
        found = {"retrieval/image_to_text_recall@1": 0.25, "retrieval/image_to_text_recall@5": 0.5}
        self.found = iter([{}, found, found | {"mine/top1": 0.125, "mine/top5": 0.75}])

    def run(self, params):
        return next(self.found)


def counting_step(*_):
    """A stand-in for `make_train_step` whose steps only count."""
    values = dict.fromkeys(("loss", "logit_scale", "grad_norm"), 1.0) | {"skipped": 0.0}
    metrics = {f"train/{name}": value for name, value in values.items()}
    return lambda state, batch: (state._replace(step=state.step + 1), metrics)


def test_a_run_of_epochs(pairs, tmp_path, monkeypatch, capsys):
    """Steps follow from epochs, in training, in its output, and when resuming and evaluating."""
    saved, config = [], pairs.copy_and_resolve_references()
    monkeypatch.setattr(loop, "Evaluator", Evaluations)
    monkeypatch.setattr(loop, "make_train_step", counting_step)
    monkeypatch.setattr(loop, "plot_curves", lambda *_: None)
    monkeypatch.setattr(setup, "init_state", lambda *_: TrainState(0, {}, ()))
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *_: saved.append(step))
    config.num_steps, config.num_epochs, config.eval.every = 0, 2.0, 2
    config.log_every, config.checkpoint_every, config.optimizer.warmup_steps = 4, 5, 50
    loop.train(config, tmp_path)
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["num_steps"] == 6
    assert [row["step"] for row in rows(tmp_path)] == [1, 4, 6]
    assert saved == [5, 6]
    assert "50 is longer than the run, 6 steps: the learning rate reaches 12.0%" in printed
    evaluated = [line for line in printed.splitlines() if re.match(r"step \d+ ", line)]
    recall = "retrieval/image_to_text_recall@1 25.0%"
    assert evaluated == [f"step 4  {recall}", f"step 6  {recall}  mine/top1 12.5%"]
    assert setup.set_up(config, Home(tmp_path, tmp_path)).config.num_steps == 6
    config.num_epochs = 4.0
    with pytest.raises(UserError, match=rf"num_steps \(6 there, 12 here\).* init_from={tmp_path}$"):
        setup.set_up(config, Home(tmp_path, tmp_path))
    config.num_epochs, steps = 2.0, []
    monkeypatch.setattr(evaluation, "Evaluator", Evaluations)
    monkeypatch.setattr(evaluation, "_steps", lambda _, last, **__: [last])
    monkeypatch.setattr(evaluation, "_restore", lambda *_: {})
    monkeypatch.setattr(evaluation, "_evaluate", lambda *given: steps.append(given[3]))
    evaluation.evaluate(config, tmp_path)
    assert steps == [6]


def test_a_run_of_too_few_samples_does_not_begin(pairs, tmp_path):
    config = pairs.copy_and_resolve_references()
    config.batch_size = 64
    with pytest.raises(UserError, match=r"the data have 48 samples, fewer than a batch, 64"):
        setup.set_up(config, Home(tmp_path / "run", tmp_path / "run"))
    config.batch_size, config.num_epochs = 16, 1.0
    with pytest.raises(UserError, match=r"is 2\.67 epochs of the 48 samples in data\.name"):
        setup.set_up(config, Home(tmp_path / "run", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
