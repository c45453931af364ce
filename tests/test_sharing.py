"""Tests what leaves the machine: model cards, uploads to the Hub, metrics in Weights & Biases."""

import json
import sys
import types
from typing import ClassVar

import huggingface_hub
import pytest

from disco_jax.errors import UserError
from disco_jax.interop import __main__ as command
from disco_jax.interop import export_model, import_model
from disco_jax.interop.card import push
from disco_jax.runs.metrics import MetricWriter, open_wandb
from tests.conftest import GOLDEN

# Reads the weights and sizes of a tiny OpenCLIP model, as the tests of interop do.
WEIGHTS, SIZES = (GOLDEN / f"openclip_tiny_gelu.{end}" for end in ("weights.safetensors", "json"))


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "open_clip_model.safetensors").write_bytes(WEIGHTS.read_bytes())
    spec = {"model_cfg": json.loads(SIZES.read_text()), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(spec))
    import_model(str(folder), "openclip", tmp_path / "ours")
    return tmp_path / "ours"


@pytest.mark.parametrize(
    ("library", "name", "call"),
    [
        ("openclip", "open_clip", 'create_model_from_pretrained("hf-hub:me/tiny")'),
        ("hf", "transformers", 'AutoModel.from_pretrained("me/tiny")'),
    ],
)
def test_a_card_is_one_that_the_hub_reads(model, tmp_path, library, name, call):
    export_model(model, library, tmp_path / "out", "me/tiny")
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == name
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert card.text.strip().startswith("# tiny\n")
    assert call in card.text
    assert "## Training" not in card.text


def test_a_runs_card_has_its_settings_and_its_last_evaluation(tmp_path, monkeypatch):
    """And no path of the machine it was trained on."""
    from disco_jax.interop import card
    from disco_jax.models import preset
    from tests.small_run import config_of

    run, out = tmp_path / "run", tmp_path / "out"
    (run / "eval").mkdir(parents=True)
    out.mkdir()
    (run / "config.json").write_text(config_of(tmp_path, batch_size=48).to_json())
    for step, top1 in ((900, 0.25), (1000, 0.5)):
        record = {"step": step, "imagenet/top1": top1}
        (run / "eval" / f"{step}.json").write_text(json.dumps(record))
    card.write_card(out, run, "openclip", preset("tiny"))
    text = (out / "README.md").read_text()
    assert "| batch_size | 48 |" in text
    assert "| metric, step 1000 | value |" in text
    assert "| imagenet/top1 | 50.00% |" in text
    assert str(tmp_path) not in text


class Hub:
    """Stands in for huggingface_hub.HfApi."""

    calls: ClassVar[list] = []

    def create_repo(self, repo, **options):
        if repo == "you/tiny":
            raise PermissionError("403 Forbidden\nmore")
        self.calls.append(("create_repo", repo, options))

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options["repo_id"], options))
        return "https://hub/me/tiny/commit/1"


def test_export_pushes(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    out = str(tmp_path / "out")
    arguments = ["export", str(model), "--to=openclip", f"--out={out}", "--push=me/tiny"]
    monkeypatch.setattr(sys, "argv", ["interop", *arguments, "--private"])
    command.main()
    assert [call[:2] for call in Hub.calls] == [
        ("create_repo", "me/tiny"),
        ("upload_folder", "me/tiny"),
    ]
    assert Hub.calls[0][2] == {"private": True, "exist_ok": True}
    assert str(Hub.calls[1][2]["folder_path"]) == out
    assert "Pushed https://hub/me/tiny/commit/1" in capsys.readouterr().out


def test_a_refusal_of_the_hub_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(
        UserError, match=r"^--push: you/tiny could not be written \(403 Forbidden\);"
    ):
        push(tmp_path, "you/tiny", False)


class Page:
    """Stands in for a run of wandb."""

    def __init__(self, **options):
        self.options, self.rows, self.closed = options, [], False

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.closed = True


def test_metrics_go_to_wandb_and_a_resumed_run_to_the_same_page(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **o: Page(**o)))
    pages = []
    for start in (0, 2):
        page = open_wandb("mine", tmp_path, {"batch_size": 4})
        writer = MetricWriter(tmp_path, start, page)
        writer.write(start + 1, {"train/loss": 0.5})
        writer.close()
        pages.append(page)
    assert pages[0].options["id"] == pages[1].options["id"]
    assert pages[0].options["project"] == "mine"
    assert pages[0].options["config"] == {"batch_size": 4}
    assert [page.rows for page in pages] == [[(1, {"train/loss": 0.5})], [(3, {"train/loss": 0.5})]]
    assert all(page.closed for page in pages)
    assert open_wandb("", tmp_path, {}) is None


def test_a_missing_or_refusing_wandb_is_one_line(tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.raises(UserError, match=r"^wandb: api_key not configured \(no-tty\); see"):
        open_wandb("mine", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^wandb: the package is missing; pip install wandb"):
        open_wandb("mine", tmp_path, {})
