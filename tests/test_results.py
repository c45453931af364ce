"""Tests that the commands in docs/results give the results there, for a small part of them."""

import json
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.published import RUNS, estimate, fit, ratio
from benchmarks.replicate import EXPERIMENTS, curve, equivalence_config
from benchmarks.trainer import over_seeds
from disco_jax.config import default
from disco_jax.plan.accelerators import parse_topology
from disco_jax.plan.compiler import Compiler

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results"


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if (RESULTS / f"{n}.json").exists()])
def test_each_has_its_command_and_picture(name):
    words = shlex.split(result(name)["command"])
    assert words[:3] == ["python", "benchmarks/replicate.py", name]
    assert (RESULTS / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_equivalence_is_to_rounding():
    found = result("equivalence")
    assert len(found["curves"]) == 8
    assert {len(curve["loss"]) for curve in found["curves"].values()} == {50}
    assert max(found["largest_relative_difference"].values()) < 1e-5


@pytest.mark.slow
def test_equivalence_begins_as_it_was_written():
    config = equivalence_config(50)
    config.loss.method = "stream"
    with jax.numpy_dtype_promotion("standard"):
        losses = curve(config, devices=2, steps=3)["loss"]
    expected = result("equivalence")["curves"]["reference, 1 device"]["loss"][:3]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="the compilers are Linux wheels")
def test_memory_is_as_it_was_written(monkeypatch):
    """Other versions of XLA may need less memory, but not more."""
    for name in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    rows = {(row["method"], row["batch_size"]): row for row in result("memory")["rows"]}
    row = rows["ring", 32_768]
    with Compiler(parse_topology("a100-40gb:8")) as compiler:
        config = default()
        config.batch_size, config.loss.method = 32_768, "ring"
        again = compiler.compile(config, loss_only=True, dim=512)
    ratio = again["temp_bytes"] / row["temp_bytes"]
    assert ratio < 1.01
    assert ratio > 0.99 or jax.__version__ != result("memory")["jax"]
    assert rows["disco", 131_072]["temp_bytes"] > 20 * rows["ring", 131_072]["temp_bytes"]


def test_batch_sizes_have_three_seeds_each():
    rows = result("batch_size")["rows"]
    sizes = sorted({row["batch_size"] for row in rows})
    assert len(sizes) == 4
    assert sizes[-1] == 8 * sizes[0]
    for size in sizes:
        assert sorted(row["seed"] for row in rows if row["batch_size"] == size) == [0, 1, 2]
    for row in rows:
        assert row["steps"] == result("batch_size")["samples"] // row["batch_size"]


def test_the_docs_have_the_results_numbers():
    page = (ROOT / "docs/experiments.md").read_text()
    rows = result("batch_size")["rows"]
    for size in sorted({row["batch_size"] for row in rows}):
        runs = [row for row in rows if row["batch_size"] == size]
        cells = [str(size), f"{runs[0]['steps']:,}", *over_seeds(runs)]
        assert f"| {' | '.join(cells)} |" in page
    off = max(result("equivalence")["largest_relative_difference"].values())
    assert f"at most {off:.1e} of their value".replace("e-0", "e-") in page
    assert len({str(c["top1"]) for c in result("equivalence")["curves"].values()}) == 1


def test_the_fitted_rate_of_matmuls_is_found():
    """Published times made from matmuls at half of the peak rate."""
    rows = [
        {
            "seconds_by_kind": {"matmuls": 3.0 + i, "attention": 1.0, "other": 2.0},
            "estimated_seconds": 6.0 + i,
        }
        for i in range(4)
    ]
    made = [
        RUNS[1]._replace(seconds=(4.0 + i) * 0.8 / 0.5 + 2.0, steps=1) for i in range(len(rows))
    ]
    pairs = list(zip(made, rows, strict=True))
    assert fit(pairs) == pytest.approx(0.5)
    assert [ratio(*pair, 0.5) for pair in pairs] == pytest.approx([1] * 4)
    assert estimate(rows[0], 0.8) == rows[0]["estimated_seconds"]


def test_published_times_are_compared_as_the_docs_say():
    found = result("published")
    assert [row["run"] for row in found["rows"]] == [run.name for run in RUNS]
    text = (ROOT / "docs/speed.md").read_text()
    for row, run in zip(found["rows"], RUNS, strict=True):
        assert row["published_seconds"] == run.seconds
        assert row["ratio"] == pytest.approx(row["estimated_seconds"] / run.seconds)
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {run.name}"))
        assert f"| {row['ratio']:.2f} | {row['ratio_fitted']:.2f}" in line
