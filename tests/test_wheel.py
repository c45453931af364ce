"""Tests the wheel, installed into an environment of its own, and the command that comes with it."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from disco_jax.command import COMMANDS
from tests import small_run
from tests.conftest import ENV
from tests.small_run import ROOT

FILES = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    *(p.name for p in ROOT.glob("requirements*.txt")),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT / "disco_jax", folder / "disco_jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "tests").mkdir()  # must not be packed
    (folder / "tests" / "__init__.py").touch()
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    pip(sys.executable, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", ".", cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of commands of an environment with the wheel, and this one's dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    # A path that a .pth file adds has its own .pth files ignored, such as that of this checkout.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip(folder / "bin" / "python", "install", "--no-deps", wheel)
    return folder / "bin"


def pip(python, *arguments, **options):
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*command, "--python", python, *arguments], check=True, **options)


def run(*command, cwd):
    env = {k: v for k, v in ENV.items() if k != "PYTHONPATH"} | {"XDG_CACHE_HOME": str(cwd)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)


def test_it_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"disco_jax"}
    there = {f"disco_jax/{file.relative_to(ROOT / 'disco_jax')}" for file in sources()}
    assert there <= set(names)


def sources():
    found = [*(ROOT / "disco_jax").rglob("*.py"), *(ROOT / "disco_jax/assets").rglob("*.*")]
    return [file for file in found if file.is_file()]


def test_its_command_trains_from_a_config_by_name(installed, tmp_path):
    """From any folder, with the package of the wheel; a mistake exits with 2."""
    made = small_run.make(tmp_path)
    code = "import disco_jax; print(disco_jax.__file__)"
    where = run(installed / "python", "-c", code, cwd=tmp_path).stdout
    assert where.startswith(str(installed.parent))
    command = [installed / "disco-jax", "train", "--config=pairs", "--workdir=run"]
    fields = [f"data.name={made}/pairs.csv", f"model.name={made}/model", "model.dtype=float32"]
    fields += ["num_steps=2", "batch_size=8", "data.num_workers=1", "fake_devices=1"]
    command += [f"--config.{field}" for field in [*fields, "optimizer.warmup_steps=1"]]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    wrong = run(*command[:2], "--config=pears", "--workdir=run", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --config: file not found: pears")
    assert wrong.stderr.endswith("did you mean pairs?\n")


def test_it_lists_its_commands_without_importing_anything(installed, tmp_path):
    listed = run(installed / "disco-jax", cwd=tmp_path)
    assert listed.returncode == 0
    assert all(f"  {name} " in listed.stdout for name, *_ in COMMANDS)
    assert run(installed / "disco-jax", "trian", cwd=tmp_path).returncode == 2
    code = "import sys; from disco_jax.command import main; sys.argv = ['', '--help']; main()"
    code += "; assert not {'jax', 'absl', 'numpy'} & set(sys.modules)"
    assert run(installed / "python", "-c", code, cwd=tmp_path).returncode == 0
    shown = run(installed / "disco-jax", "train", "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert str(installed.parent) in shown.stdout  # the path of the wheel's list of fields
