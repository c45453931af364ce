"""Tests reports on runs: epochs, the paper's numbers, tables, curves and the HTML page.

What the page looks like in a browser is tested by `make pages-check`.
"""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from disco_jax.config import default, zeroshot_set
from disco_jax.config.validation import problems_of
from disco_jax.configs import vit_b32_laion100m
from disco_jax.errors import UserError
from disco_jax.report import report
from disco_jax.reporting import curves, tables
from disco_jax.reporting.page import as_html
from disco_jax.reporting.run import PAPER, names_of, read_run
from disco_jax.runs.workdir import stored_config


def write_run(folder: Path, config, rows, samples: int | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if samples:
        (folder / "starts.jsonl").write_text(json.dumps({"samples": samples}) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    papers = vit_b32_laion100m.get_config("65536")
    rows = [{"step": 24_414, "train/loss": 1.25, "imagenet/top1": 0.515, "imagenet_r/top1": 0.6}]
    own = default()
    own.batch_size = 100
    own.eval.sets.pets = zeroshot_set("pets")
    more = [{"step": 1, "train/loss": 5.0}, {"step": 20, "train/loss": 4.0, "pets/top1": 0.123}]
    return [
        write_run(tmp_path / "papers", papers, rows),
        write_run(tmp_path / "own", own, more, samples=500),
    ]


def test_the_table_has_the_papers_numbers_beside_its_runs_alone(runs):
    header, papers, published, own = tables.results([read_run(path) for path in runs])
    assert header[6:] == ["ImageNet", "R", "pets"]
    assert papers == [
        "papers", "ViT-B-32", "65,536", "16.0", "24,414", "1.2500", "51.50", "60.00", ""
    ]  # fmt: skip
    assert published == ["the paper's", "ViT-B-32", "65,536", "16.0", "", "", "51.91", "60.52", ""]
    assert own == ["own", "ViT-B-32", "100", "4.0", "20", "4.0000", "", "", "12.30"]


def test_evaluations_made_later_are_taken(runs):
    (runs[1] / "eval").mkdir()
    (runs[1] / "eval" / "30.json").write_text(json.dumps({"step": 30, "pets/top1": 0.2}))
    run = read_run(runs[1])
    assert run.last("pets/top1") == 0.2
    assert run.epochs(30) == 6


class Page(HTMLParser):
    """Parses a page into its headings, its table cells and the tags that were never closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.cells, self.headings, self.fetched = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.fetched += [
            v for k, v in attrs if k in ("src", "href") and not v.startswith("data:image/png;")
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)
        if self.open and self.open[-1] in ("h2", "h3", "summary"):
            self.headings.append(data)


def test_three_files_are_written(runs, tmp_path):
    (runs[1] / "predictions.png").write_bytes(b"\x89PNG")
    report(runs, tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.open == []
    assert page.fetched == []  # the page needs no other file
    assert "51.91" in page.cells
    assert page.headings == [
        "Curves", "Training loss", "Zero-shot accuracy", "Time", "Differences", "Problems",
        "Predictions", "own", "Config and starts", "papers", "Fields", "own", "Fields",
    ]  # fmt: skip
    assert (tmp_path / "out" / "report.png").read_bytes()[:4] == b"\x89PNG"
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert lines[2].startswith("| papers | ViT-B-32 | 65,536 |")
    assert {line.count("|") for line in lines} == {10}


def test_the_time_is_split_by_what_it_went_to(runs):
    """Ten steps of 3 s, then ten of 1 s with as much for data: 50 s, of which 10 s for data."""
    rows = [
        {"step": 10, "time/step": 3.0, "time/data": 0.0, "train/images_per_second": 10.0},
        {"step": 20, "time/step": 1.0, "time/data": 1.0, "train/images_per_second": 30.0},
        {"step": 20, "pets/top1": 0.5},
    ]
    run = read_run(runs[1])._replace(rows=rows)
    assert tables.times([run])[1] == ["own", "30", "0.01", "80.0%", "20.0%", "0.0%", "0.0%"]


def test_only_fields_that_differ_are_listed(runs):
    run = read_run(runs[1])
    other = run._replace(name="other", config=run.config.copy_and_resolve_references())
    assert tables.differences([run, other]) == []
    other.config.optimizer.learning_rate = 0.25
    del other.config.eval.sets["pets"]
    found = tables.differences([run, other])
    assert found[0] == ["field", "own", "other"]
    assert [row for row in found if row[0] == "optimizer.learning_rate"] == [
        ["optimizer.learning_rate", repr(run.config.optimizer.learning_rate), "0.25"]
    ]
    assert ["eval.sets.pets.source", "'pets'", "–"] in found
    names = {field for field, *_ in found[1:] if not field.startswith("eval.sets.pets")}
    assert names == {"optimizer.learning_rate"}


def test_problems_are_counted_and_the_first_are_named(runs):
    lines = [{"step": n, "kind": "broken_image", "key": f"{n}.jpg", "detail": ""} for n in range(9)]
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (runs[1] / "bad_samples-0.jsonl").write_text(log)
    (runs[1] / "bad_samples-1.jsonl").write_text(log.replace(".jpg", ".png"))
    run = read_run(runs[1])
    assert tables.problems([run]) == []
    assert [row[2] for row in tables.bad_samples([run])[1:]] == [
        "0.jpg", "0.png", "1.jpg", "1.png", "2.jpg"
    ]  # fmt: skip
    run.rows[-1]["data/bad_broken_image"] = 9.0
    assert tables.problems([run])[1][::2] == ["own", "9"]


def test_long_curves_are_thinned_and_keep_their_spikes():
    values = np.random.default_rng(0).normal(size=100_000)
    values[[777, 90_001]] = 50, -50
    values[5_000] = np.nan
    kept = curves.thinned(values)
    assert len(kept) <= curves.MOST_POINTS
    assert {777, 90_001} <= set(kept)
    assert 5_000 not in kept
    assert (np.diff(kept) > 0).all()
    assert curves.thinned(np.array([1.0, 0.0, -1.0, 2.0]), positive=True).tolist() == [0, 3]


def test_a_run_without_a_finite_value_has_no_curves(runs):
    run = read_run(runs[1])._replace(rows=[{"step": 1, "train/loss": float("nan")}])
    assert curves.charts_of([run]) == []
    page = Page(as_html([run]))
    assert page.open == []
    assert "Curves" not in page.headings
    assert "nan" in page.cells


def test_runs_of_one_name_are_told_apart():
    assert names_of([Path("a/x"), Path("b/y")]) == ["x", "y"]
    assert names_of([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"]
    assert names_of([Path("x"), Path("x")]) == ["x", "x"]


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_run(tmp_path)
    write_run(tmp_path / "new", default(), [])
    with pytest.raises(UserError, match="holds no metrics yet"):
        read_run(tmp_path / "new")


def test_a_stored_config_has_its_labelled_sets(runs):
    assert stored_config(runs[1]).eval.sets.pets.source == "pets"


def test_the_papers_numbers():
    """The paper's table of batch sizes, with columns ImageNet, V2, R and Sketch."""
    assert PAPER == {
        8192: (48.76, 41.28, 56.67, 36.65),
        16384: (50.95, 43.07, 59.24, 38.74),
        32768: (51.64, 43.85, 60.07, 39.25),
        65536: (51.91, 44.19, 60.52, 39.76),
    }
    assert tuple(PAPER) == vit_b32_laion100m.BATCHES


@pytest.mark.parametrize("batch", vit_b32_laion100m.BATCHES)
def test_the_papers_steps_are_those_of_its_epochs(batch):
    """The paper rounds its steps to 200K, 100K, 50K and 25K."""
    config = vit_b32_laion100m.get_config(str(batch))
    assert problems_of(config) == []
    papers = {8_192: 200_000, 16_384: 100_000, 32_768: 50_000, 65_536: 25_000}[batch]
    assert config.num_steps == pytest.approx(papers, rel=0.03)
    with pytest.raises(ValueError, match="the batch must be one of 8192, 16384"):
        vit_b32_laion100m.get_config("4096")
