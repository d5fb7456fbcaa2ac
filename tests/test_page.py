"""The page of a report in a real browser: it opens, folds, filters, and can be read anywhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxtemporal
from fxtemporal import Factorize, Report
from fxtemporal.reports.wording import left_by_cost

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None and "CI" not in os.environ, reason="there is no Chromium here"
    ),
    pytest.mark.xdist_group("browser"),
]


class Example(nn.Module):
    """A loop that folds, one that does not, convolutions, and a mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1))
        self.dense = nn.Conv3d(4, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.cell = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.dense(self.stem(x)))
        frames = [self.body(y[:, :, t]) for t in range(y.size(2))]
        state = torch.zeros_like(frames[0])
        for frame in frames:
            state = torch.tanh(self.cell(state) + frame)
        return state.view(2, -1)


@pytest.fixture(scope="module")
def report() -> Report:
    return fxtemporal.audit(Example().eval(), (torch.randn(2, 3, 6, 8, 8),))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        options = ["--no-sandbox", "--disable-gpu"]
        browser = running.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, report: Report, tmp_path: Path) -> Iterator[Any]:
    """Opens a page; fails if anything was fetched, or written to the console as an error."""
    contexts, problems = [], []

    def opened(text: str | None = None, **options: Any) -> Any:
        path = tmp_path / "report.html"
        path.write_text(report.to_html() if text is None else text, encoding="utf-8")
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda r: (
                None if r.url.startswith(("file:", "data:", "about:")) else problems.append(r.url)
            ),
        )
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def visible(page: Any, selector: str) -> int:
    return sum(row.is_visible() for row in page.locator(selector).all())


def test_it_opens_and_says_what_the_report_says(opened: Any, report: Report) -> None:
    page = opened()
    assert page.title() == "fxtemporal: audit"
    text = page.locator("body").inner_text()
    assert "usual mistake" in text
    for remark in report.by_status("applied"):
        assert remark.what in text
    for finding in report.findings:
        assert finding.text in text


def test_loops_are_stacks_that_become_one(opened: Any) -> None:
    page = opened()
    before, after = page.locator("#structure svg").all()
    times = [label.text_content() for label in before.locator("text").all()]
    assert times[times.index("body.0") + 1] == "×6"
    times = [label.text_content() for label in after.locator("text").all()]
    assert times[times.index("body.0") + 1] == ""
    assert before.locator("rect").count() > after.locator("rect").count()


def test_rows_fold(opened: Any) -> None:
    page = opened()
    row = page.locator("#left > details").first
    content = row.locator("div").first
    assert not content.is_visible()
    row.locator("summary").click()
    assert content.is_visible()
    row.locator("summary").press("Enter")
    assert not content.is_visible()


def test_filters_by_rule_and_by_words(opened: Any, report: Report) -> None:
    page = opened()
    rows = len(left_by_cost(report))
    assert visible(page, "#left > details") == rows >= 2
    page.locator("input[type=checkbox][value=conv3d-forms]").uncheck()
    others = [r for r in left_by_cost(report) if r.rule != "conv3d-forms"]
    assert visible(page, "#left > details") == len(others) < rows
    page.locator("input[type=search]").fill("no such words")
    assert visible(page, "#left > details") == 0
    assert page.locator("output").inner_text() == f"0 of {rows}"
    page.locator("input[type=search]").fill("recurrence")
    assert visible(page, "#left > details") >= 1


CONTRAST = """
() => {
  const parts = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = color => {
    const [r, g, b] = parts(color).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (!/, 0\\)$/.test(color) && color !== "transparent") return color;
    }
    return "rgb(255, 255, 255)";
  };
  let worst = 21;
  const kinds = "h1, h2, h3, p, summary, code, .chip, .soft, text, label";
  for (const element of document.querySelectorAll(kinds)) {
    const style = getComputedStyle(element);
    const front = element.tagName === "text" ? style.fill : style.color;
    const [a, b] = [light(front), light(behind(element))].sort((x, y) => y - x);
    worst = Math.min(worst, (a + 0.05) / (b + 0.05));
  }
  return worst;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_in_both_schemes(opened: Any, scheme: str) -> None:
    page = opened(color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert page.evaluate(CONTRAST) >= 4.5  # WCAG 2.1, level AA


@pytest.mark.parametrize("width", [320, 400, 1200])
def test_nothing_sticks_out_on_any_screen(opened: Any, width: int) -> None:
    page = opened(viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_factorization_shows_its_curve(opened: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(3, 16, 3), nn.ReLU(), nn.Conv3d(16, 16, 3)).eval()
    x = torch.randn(1, 3, 6, 8, 8)
    settings = Factorize(flops=0.5)
    report = fxtemporal.report(fxtemporal.optimize(model, (x,), factorize=settings, tune="static"))
    page = opened(report.to_html())
    assert page.title() == "fxtemporal: what was done"
    assert page.locator("svg .trend").count() == 1


def test_a_notebook_shows_the_page_in_a_frame(opened: Any, report: Report) -> None:
    page = opened(f"<!doctype html><title>notebook</title><body>{report._repr_html_()}</body>")
    frame = page.frame_locator("iframe")
    assert "fxtemporal: audit" in frame.locator("h1").inner_text()


def test_names_that_look_like_markup_stay_text(opened: Any, report: Report) -> None:
    import dataclasses

    bad = "<img src=x onerror=alert(1)>'\"&"
    first, *rest = report.remarks
    remark = dataclasses.replace(first, what=bad, target=bad, location=None)
    page = opened(dataclasses.replace(report, remarks=(remark, *rest), stopped=bad).to_html())
    assert page.locator("img").count() == 0
    assert bad in page.locator("body").inner_text()
