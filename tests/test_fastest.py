"""Tests the search for the fastest settings against all settings of a modelled accelerator."""

from itertools import product

import pytest
from rich.console import Console

from disco_jax.config import default
from disco_jax.config.remat import parse_remat
from disco_jax.plan.fastest import find_fastest, settings_of
from disco_jax.plan.plans import flags_of
from disco_jax.plan.show import show_fastest

GIB = 2**30
BLOCKS = (12, 12)
DEVICES, BATCH = 8, 32_768
# Seconds and bytes that a policy adds to `full`, per sample and block of the image tower; the text
# tower's are a quarter of these.
EFFECTS = {"none": (2e-6, 4e5), "dots": (-2e-6, 2e5), "branches": (-1.5e-6, 1e5), "full": (0, 0)}
FORWARD = 5e-5  # seconds of one more forward pass, per sample
LOSSES = {
    ("default", 512 * 2**20): (6e-3, GIB // 2),
    ("default", 2**31): (5.98e-3, 2 * GIB),
    ("default", 0): (7e-3, GIB // 4),
    ("auto", 0): (6.5e-3, GIB),
}


class Modelled:
    """Stands in for the compiler: time and memory are linear in what the settings save."""

    def __init__(self, capacity, state=2 * GIB):
        self.capacity, self.state, self.compiled = capacity, state, []

    def row(self, changes, loss_only=False):
        fields = {
            "batch_size": BATCH,
            "microbatch": 0,
            "fsdp": 1,
            "model.image_remat": "full",
            "model.text_remat": "full",
        } | changes
        method, kept = fields["loss.method"], fields["loss.keep_bytes"]
        loss_seconds, loss_bytes = LOSSES[method, kept]
        samples = fields["batch_size"] // DEVICES
        at_once = fields["microbatch"] or samples
        seconds = {"loss": {"matmuls": loss_seconds}}
        peak = loss_bytes
        if not loss_only:
            peak += 3e6 * at_once + self.state / fields["fsdp"]
            for tower, share in (("image", 1), ("text", 0.25)):
                policy, last = parse_remat(fields[f"model.{tower}_remat"])
                time, size = EFFECTS[policy]
                blocks = last or 12
                peak += size * share * blocks * at_once
                of_tower = samples * (2e-4 * share + time * share * blocks)
                if fields["microbatch"]:
                    of_tower += FORWARD * samples * share
                seconds[f"{tower}_tower"] = {"matmuls": of_tower}
            seconds["sum_gradients"] = {"communication": 1e-3 * (fields["fsdp"] > 1)}
        self.compiled.append(fields)
        return {
            "estimated_seconds": sum(sum(kinds.values()) for kinds in seconds.values()),
            "seconds_by_part": seconds,
            "peak_bytes": int(peak),
            "temp_bytes": loss_bytes,
            "capacity_bytes": self.capacity,
            "margin_bytes": self.capacity // 10,
            "fits": peak <= 0.9 * self.capacity,
            "batch_size": fields["batch_size"],
            "devices": DEVICES,
            "image_remat": fields["model.image_remat"],
            "text_remat": fields["model.text_remat"],
            "microbatch": fields["microbatch"],
            "microbatch_mode": "scan",
            "fsdp": fields["fsdp"],
            "method": method,
            "keep_bytes": kept,
            "blocks": BLOCKS,
            "block_elements": [4.0, 1.0],
        }

    def find(self, host=DEVICES):
        return find_fastest(
            self.row, lambda changes: self.row(changes, loss_only=True), BATCH, DEVICES, host
        )

    def fastest_of_all(self, host=DEVICES):
        """Tries everything."""
        remats = ["full", *(f"{p}:{n}" for p in ("none", "dots", "branches") for n in range(1, 13))]
        trials = product(remats, remats, (0, 2048, 1024, 512, 256), sorted({1, host}))
        method = {"loss.method": "default", "loss.keep_bytes": 512 * 2**20}
        rows = (
            self.row(
                method
                | {
                    "model.image_remat": image,
                    "model.text_remat": text,
                    "microbatch": microbatch,
                    "fsdp": fsdp,
                }
            )
            for image, text, microbatch, fsdp in trials
        )
        return min(row["estimated_seconds"] for row in rows if row["fits"])


@pytest.mark.parametrize("capacity", [10, 16, 18, 22, 30, 45])
@pytest.mark.parametrize("host", [1, 8])
def test_the_fastest_of_all_settings_is_found_with_few_programs(capacity, host):
    modelled = Modelled(capacity * GIB)
    rows = modelled.find(host)
    compiled = len(modelled.compiled)
    assert rows[0]["fits"]
    assert rows[0]["estimated_seconds"] <= 1.005 * modelled.fastest_of_all(host)
    assert compiled <= 22
    assert any(row.get("baseline") for row in rows)


def test_a_slower_loss_with_more_memory_is_not_chosen():
    modelled = Modelled(45 * GIB)
    row = modelled.find()[0]
    # 2 GiB would save 0.02 of 6 ms.
    assert (row["method"], row["keep_bytes"]) == ("default", 512 * 2**20)


def test_nothing_that_fits_is_said():
    rows = Modelled(GIB).find()
    assert not any(row["fits"] for row in rows)
    assert rows[0]["peak_bytes"] == min(row["peak_bytes"] for row in rows)


def test_the_flags_are_those_that_differ_from_the_config():
    config = default()
    row = Modelled(30 * GIB).row(
        {"model.image_remat": "dots:3", "loss.method": "default", "loss.keep_bytes": 0}
    )
    assert settings_of(row)["model.text_remat"] == "full"
    assert flags_of(config, row) == (
        "--config.model.image_remat=dots:3 --config.model.text_remat=full "
        "--config.loss.keep_bytes=0"
    )


def test_the_table_says_what_the_fastest_settings_save(capsys):
    rows = [row | {"topology": "a100-40gb:8", "hosts": 1} for row in Modelled(30 * GIB).find()]
    show_fastest([row | {"loss_only": False} for row in rows], "--x=1", Console(width=120))
    shown = capsys.readouterr().out
    base = next(row for row in rows if row.get("baseline"))
    saved = 1 - rows[0]["estimated_seconds"] / base["estimated_seconds"]
    assert "fastest by the estimate: --x=1" in shown
    assert f"{saved:.1%} less time than full rematerialization" in shown
