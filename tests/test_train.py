"""Tests train.py and eval.py as a user runs them: files, interruptions and mistakes."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import grain
import pytest

from disco_jax.models import CLIPConfig, TextConfig, VisionConfig
from tests.conftest import ENV
from tests.small_run import save_initial

ROOT = Path(__file__).parent.parent
SMALL = (
    "--config.batch_size=16",
    "--config.num_steps=6",
    "--config.eval.every=3",
    "--config.log_every=1",
    "--config.checkpoint_every=2",
    "--config.optimizer.warmup_steps=2",
)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """The folder of a small `shapes` data set, built by the real builder, and a small model."""
    folder = tmp_path_factory.mktemp("data")
    code = (
        "from disco_jax.data.shapes import builder\n"
        "builder.SPLITS = {'train': 300, 'validation': 40, 'test': 52, 'heldout': 24}\n"
        "from disco_jax.data.tfds_source import load_builder\n"
        "if __name__ == '__main__': load_builder('shapes', __import__('sys').argv[1])\n"
    )
    script = folder / "build.py"
    script.write_text(code)
    subprocess.run([sys.executable, script, folder], cwd=ROOT, env=ENV, check=True)
    sizes = CLIPConfig(  # takes images and captions like the demo's model, and compiles faster
        embed_dim=16,
        vision=VisionConfig(image_size=48, patch_size=16, width=32, layers=1, heads=2),
        text=TextConfig(context_length=32, width=16, layers=1, heads=2),
    )
    save_initial(folder / "model", sizes)
    return folder


def command(
    script: str, workdir: Path, data_dir: Path, *extra: str, config: str = "shapes"
) -> list[str]:
    return [
        sys.executable,
        script,
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.data.dir={data_dir}",
        f"--config.model.name={data_dir}/model",
        *SMALL,
        *extra,
    ]


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(args, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)


def rows(workdir: Path) -> list[dict]:
    """Returns the metrics without those that depend on time and without retrieval.

    The run on shards has no retrieval.
    """
    return [
        {
            k: v
            for k, v in row.items()
            if not k.endswith("per_second") and not k.startswith(("time/", "retrieval"))
        }
        for row in lines_of(workdir / "metrics.jsonl")
    ]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data_dir) -> Path:
    """The workdir of an undisturbed run on 4 devices."""
    workdir = tmp_path_factory.mktemp("run")
    result = run(*command("train.py", workdir, data_dir, "--config.fake_devices=4"))
    assert result.returncode == 0, result.stderr
    assert "step 6/6" in result.stdout
    assert "4 cpu devices" in result.stdout
    return workdir


def test_a_run_leaves_its_files(finished):
    steps = rows(finished)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all(row["train/loss"] > 0 for row in steps)
    assert "zeroshot/top1" in steps[2]
    assert "zeroshot_heldout/top1" in steps[5]
    assert json.loads((finished / "config.json").read_text())["batch_size"] == 16
    assert (finished / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((finished / "tensorboard").iterdir())


@pytest.mark.slow
def test_all_checkpoints_are_evaluated_and_watching_ends_with_the_last(finished, data_dir):
    """Evaluation on 2 devices gives the same accuracy as training logged on 4."""
    result = run(*command("eval.py", finished, data_dir, "--all", "--watch"))
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [metrics["step"] for metrics in found] == [2, 4, 6]
    metrics = json.loads(result.stdout.splitlines()[-1])
    assert metrics == found[-1]
    assert metrics["zeroshot/chance"] == pytest.approx(1 / 64)
    names = {f"zeroshot{held}/{m}" for held in ("", "_heldout") for m in ("top1", "top5")}
    names |= {"zeroshot/bag_of_colours", "zeroshot/mean_per_class"}
    ways = ("image_to_text", "text_to_image")
    names |= {f"retrieval/{way}_recall@{k}" for way in ways for k in (1, 5, 10)}
    assert names <= metrics.keys()
    assert metrics["zeroshot/top1"] == rows(finished)[-1]["zeroshot/top1"]
    assert json.loads((finished / "eval" / "6.json").read_text()) == metrics
    assert (finished / "predictions.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture(scope="session")
def shards(tmp_path_factory, data_dir) -> str:
    """Tar shards of the same samples and a duplicate, which the index leaves out."""
    folder = tmp_path_factory.mktemp("tars")
    module = "disco_jax.data.make_tars"
    options = (f"--dir={data_dir}", f"--out={folder}", "--samples=64")
    result = run(sys.executable, "-m", module, "shapes", *options)
    assert result.returncode == 0, result.stderr
    assert "300 samples in 5 shards" in result.stdout
    with tarfile.open(folder / "00002.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("000000130.png"))
    return f"{folder}/{{00000..00004}}.tar"


@pytest.mark.slow
def test_killed_and_started_again_it_gives_the_same_numbers(finished, tmp_path, data_dir, shards):
    """A run on shards is killed with SIGKILL and resumed with a different number of workers.

    Its metrics equal those of the undisturbed run on the same samples from TFDS.
    """
    args = command("train.py", tmp_path, data_dir, "--config.fake_devices=4", config="tars")
    args += [f"--config.data.name={shards}", "--config.data.record_keys"]
    args += ["--config.data.num_workers=4"]
    with subprocess.Popen(
        args,
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 5/"):
                process.send_signal(signal.SIGKILL)
                break
    assert not (tmp_path / "curves.png").exists()
    wait_for_the_end_of_all(process.pid)
    done = sorted(p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert int(done[-1].name) < 6
    result = run(*args, "--config.data.num_workers=0")
    keys = lines_of(tmp_path / "keys.jsonl")
    assert [row["step"] for row in keys] == [1, 2, 3, 4, 5, 6]
    seen = [int(key.rsplit("/", 1)[1]) for row in keys for key in row["keys"]]
    assert len(set(seen)) == 96  # less than an epoch, so no sample repeats
    expected = grain.MapDataset.range(300).shuffle(seed=0)
    assert seen == [expected[i] for i in range(96)]
    assert "left out of the index: 1 duplicate_key" in result.stdout
    assert result.returncode == 0, result.stderr
    assert f"resuming from step {int(done[-1].name)}" in result.stdout
    assert rows(tmp_path) == rows(finished)


def wait_for_the_end_of_all(group: int) -> None:
    """Fails if data workers outlive the run that was killed."""
    for _ in range(300):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("processes of a killed run are still there after 30 s")


MISTAKES = [
    (["--config.batch_size=17"], "batch_size 17 is not divisible by the 2 devices"),
    (["--config.batchsize=16"], "unknown config field batchsize; did you mean batch_size?"),
    (["--config.optimizer.lr=1"], "unknown config field optimizer.lr"),
    (["--config.batch_size=many"], "batch_size"),
    (["--config=configs/missing.py"], "file not found: configs/missing.py"),
    (["--config.data.name=no_such_set"], "unknown dataset 'no_such_set'"),
    (["--config.data.split=tset"], "has no split 'tset'"),
    (["--config.data.caption_key=txt"], "has no feature 'txt'"),
    (["--config.model.name=ViT"], "model.name: unknown model 'ViT'"),
    (["--config.loss.method=rng"], "loss.method is 'rng'; it must be one of"),
    (["--config.data.name=LAION-400M"], "unknown dataset 'LAION-400M'"),
    (["--config.data.name=docs"], "data.name: docs is a folder"),
    (["--config.data.name=docs/*.tar"], "data.name: no file matches docs/*.tar"),
    (["--config.eval.batch_size=0"], "eval.batch_size is 0; it must be at least 1"),
    (["--config.num_steps=0"], "num_steps is 0; it must be at least 1"),
    (["stray"], "unexpected argument 'stray'"),
    (["--config.model.name=" + "a" * 4096], "aaaa: File name too long"),
]


def test_mistakes_get_one_line(tmp_path, data_dir):
    cases = []
    for extra, _ in MISTAKES:
        arguments = command("train.py", tmp_path / "run", data_dir, *extra)[2:]
        if extra[0].startswith("--config="):
            arguments.remove("--config=shapes")
        cases.append(arguments)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    starts = [sys.executable, "-m", "tests.many_starts", str(tmp_path / "cases.json"), "--whole"]
    found = [json.loads(line) for line in run(*starts).stdout.splitlines()]
    for (extra, message), (code, errors) in zip(MISTAKES, found, strict=True):
        assert code == 2, (extra, errors)
        assert errors.startswith("error: "), (extra, errors)
        assert errors.count("\n") == 1, (extra, errors)
        assert message in errors, (extra, errors)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_workdir_of_another_config_is_refused(finished, data_dir):
    before = (finished / "config.json").read_text()
    result = run(*command("train.py", finished, data_dir, "--config.seed=1"))
    assert result.returncode == 2
    assert "holds a run with a different config: seed (0 there, 1 here)" in result.stderr
    assert (finished / "config.json").read_text() == before


def test_eval_of_an_empty_workdir_is_refused(tmp_path, data_dir):
    result = run(*command("eval.py", tmp_path, data_dir))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "holds no run" in result.stderr
    assert list(tmp_path.iterdir()) == []
