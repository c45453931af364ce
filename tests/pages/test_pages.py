"""Tests the report and the documentation site in a headless Chromium, on a desktop and a phone.

`make pages-check` runs them. Chromium is the system's, or the one of `playwright install chromium`.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from disco_jax.configs import shapes
from disco_jax.report import report

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SITE = Path(__file__).parents[2] / "build" / "site"
PICTURES = Path(__file__).parents[2] / "build" / "pages"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
# The text of an element and of the shadow trees in it.
TEXT = """function text(node) {
  if (node.nodeType === Node.TEXT_NODE) return node.data + " ";
  if (node.tagName === "STYLE") return "";
  return [...(node.shadowRoot ?? node).childNodes].map(text).join("");
}"""
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"  # pixels


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        options = {"executable_path": path} if path else {}
        opened = playwright.chromium.launch(args=["--no-sandbox"], **options)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page_of_runs(tmp_path_factory) -> Path:
    """The report of two runs whose every metric is a known curve."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("calm", 1e-3), ("fast", 3e-3)):
        config = shapes.get_config()
        config.optimizer.learning_rate = rate
        rows = [
            {
                "step": step,
                "train/loss": 4 * math.exp(-step * rate),
                "train/learning_rate": rate,
                "train/images_per_second": 2_000.0,
                "time/step": 0.1,
                **({"zeroshot/top1": 1 - math.exp(-step * rate)} if step % 100 == 0 else {}),
            }
            for step in range(10, 1_001, 10)
        ]
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config.to_json())
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / "metrics.jsonl").write_text(lines)
        (folder / name / "starts.jsonl").write_text(json.dumps({"samples": 40_000}) + "\n")
        picture = Path(__file__).parents[2] / "docs/results/shapes_predictions.png"
        shutil.copyfile(picture, folder / name / "predictions.png")
    report([folder / "calm", folder / "fast"], folder / "out")
    return folder / "out" / "report.html"


def opened(browser: Browser, url: str, size: str, scheme: str = "light") -> tuple[Page, list[str]]:
    """Opens a page, and returns it with the list to which its errors and requests are added."""
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on("request", lambda r: wrong.append(r.url) if r.url.startswith("http") else None)
    page.goto(url, wait_until="load")
    return page, wrong


def is_whole(page: Page, wrong: list[str]) -> None:
    """Asserts that a page has no error, no broken image and nothing that sticks out."""
    assert wrong == []
    assert page.evaluate(TOO_WIDE) <= 0
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
    assert page.evaluate(broken) == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_is_readable(browser, page_of_runs, size, scheme):
    page, wrong = opened(browser, page_of_runs.as_uri(), size, scheme)
    page.wait_for_selector(".bk-Figure")
    page.wait_for_timeout(500)
    is_whole(page, wrong)
    colors = [int(n) for n in re.findall(r"\d+", page.evaluate(BACKGROUND))]
    assert (sum(colors) > 600) == (scheme == "light")
    assert page.locator(".bk-Figure").count() == 4
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"report-{size}-{scheme}.png", full_page=True)
    page.close()


def test_values_show_under_the_pointer(browser, page_of_runs):
    page, wrong = opened(browser, page_of_runs.as_uri(), "desktop")
    chart = page.locator(".bk-Figure").first
    chart.wait_for()
    page.wait_for_timeout(500)
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 3)
    page.wait_for_selector(".bk-Tooltip")
    page.wait_for_timeout(500)
    shown = [tip.evaluate(TEXT) for tip in page.locator(".bk-Tooltip").all()]
    page.screenshot(path=PICTURES / "report-pointer.png")
    text = " ".join(" ".join(shown).split())
    assert "calm" in text
    assert "fast" in text
    (step,) = {int(number) for number in re.findall(r"step:? (\d+)", text)}
    for rate in (1e-3, 3e-3):
        assert f"{4 * math.exp(-step * rate):.4f}" in text
    assert wrong == []
    page.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [str(p.relative_to(SITE)) for p in SITE.glob("**/index.html")])
def test_a_page_of_the_site_is_readable(browser, size, name):
    page, wrong = opened(browser, (SITE / name).as_uri(), size)
    page.wait_for_timeout(200)
    is_whole(page, [text for text in wrong if "search" not in text])
    PICTURES.mkdir(parents=True, exist_ok=True)
    label = name.removesuffix("/index.html").replace("/", "-")
    page.screenshot(path=PICTURES / f"{label}-{size}.png")
    page.close()
