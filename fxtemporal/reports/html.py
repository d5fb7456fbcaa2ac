"""Renders a report as one self-contained HTML page: no network, no script but its filters.

::

    summary · what each module costs, before and after · the rewrites, with bars of milliseconds
    usual mistakes · what was left as it is, with filters · the curve of a factorization

In a notebook the page is in its own frame, so that the styles of the two do not mix.
"""

from __future__ import annotations

import html

from fxtemporal.passes.rule import Remark
from fxtemporal.reports.data import ReportData
from fxtemporal.reports.svg import bars, blocks, curve
from fxtemporal.reports.wording import (
    cures,
    flops,
    left_by_cost,
    line_of,
    measured,
    milliseconds,
    place,
    predicted,
    rows_by_cost,
    share,
    summary,
)

__all__ = ["fragment", "page"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5a6478; --paper: #ffffff;
  --line: #d9dee8; --panel: #f4f6fa; --before: #c25b3a; --after: #2f7d5b; --mark: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ecf4; --soft: #a5afc2; --paper: #12161d;
  --line: #323a48; --panel: #1b212b; --before: #e58a66; --after: #63c295; --mark: #e0b458 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; margin: 0 0 .5rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p.summary { font-size: 1.05rem; margin: 0 } .soft { color: var(--soft) }
code { font: .875em ui-monospace, monospace; background: var(--panel); padding: .1em .3em;
  border-radius: .25em }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .4rem 0;
  background: var(--panel) }
summary { cursor: pointer; padding: .5rem .75rem } summary:focus-visible { outline: 2px solid
  var(--after) } details > div { padding: 0 .75rem .6rem }
.numbers { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; color: var(--soft) }
.chip { display: inline-block; font-size: .8rem; padding: 0 .5rem; border-radius: 1rem;
  border: 1px solid currentColor; color: var(--soft) } .chip.applied { color: var(--after) }
.chip.failed { color: var(--before) } .chip.mistake { color: var(--mark) }
form { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: .5rem 0 }
input[type=search] { flex: 1 1 14rem; min-width: 0; padding: .35rem .6rem; font: inherit;
  color: inherit; background: var(--paper); border: 1px solid var(--line); border-radius: .4rem }
svg { display: block; max-width: 100%; height: auto } svg text { fill: var(--ink);
  font: 12px system-ui, sans-serif } svg .soft { fill: var(--soft) }
svg .before { fill: var(--before) } svg .after { fill: var(--after) }
svg .box { stroke: var(--line); stroke-width: 1 } svg .axis { stroke: var(--soft) }
svg .trend { fill: none; stroke: var(--after); stroke-width: 2 }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: 1rem } .pair h3 { font-size: .95rem; margin: 0 } [hidden] { display: none !important }
"""

_SCRIPT = """
for (const form of document.querySelectorAll("form.filter")) {
  const rows = [...document.querySelectorAll("#" + form.dataset.rows + " > details")];
  const shown = form.querySelector("output");
  const apply = () => {
    const words = form.elements.words.value.toLowerCase().split(/\\s+/).filter(Boolean);
    const kinds = new Set([...form.querySelectorAll("input[type=checkbox]:checked")]
      .map(box => box.value));
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !kinds.has(row.dataset.kind) || !words.every(word => text.includes(word));
      count += row.hidden ? 0 : 1;
    }
    shown.value = count + " of " + rows.length;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", event => event.preventDefault());
  apply();
}
"""


def page(report: ReportData) -> str:
    """The whole page."""
    title = "fxtemporal: audit" if report.mode == "audit" else "fxtemporal: what was done"
    body = "\n".join(
        part
        for part in (
            f"<h1>{title}</h1><p class=summary>{_text(summary(report))}</p>",
            _network(report),
            _pictures(report),
            _rewrites(report),
            _mistakes(report),
            _left(report),
            _curve(report),
            _fixed(report),
        )
        if part
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n"
        f"<body>{body}<script>{_SCRIPT}</script></body></html>\n"
    )


def fragment(report: ReportData) -> str:
    """The page in a frame, for a notebook."""
    text = html.escape(page(report), quote=True)
    style = "width:100%;height:36rem;border:0"
    return f'<iframe title="fxtemporal report" style="{style}" srcdoc="{text}"></iframe>'


def _text(value: object) -> str:
    return html.escape(str(value))


def _network(report: ReportData) -> str:
    lines = []
    if report.timing is not None:
        lines.append(report.timing_text)
    if report.comparison is not None:
        lines.append(f"Relative error: {report.comparison.relative_error:.1e}.")
    if report.frontend == "export" and report.note:
        lines.append(f"Captured by torch.export, because the tracer stopped: {report.note}.")
    elif report.note:
        lines.append(f"Note: {report.note}.")
    if report.gradients:
        lines.append(f"Not for training: {report.gradients}.")
    return f"<p class=soft>{_text(' '.join(lines))}</p>" if lines else ""


def _pictures(report: ReportData) -> str:
    structure = report.structure
    if structure is None or not structure.before:
        return ""
    longest = max(structure.cost_before.milliseconds, structure.cost_after.milliseconds)
    titles = ("as it is", "after the rewrites")
    sides = [
        f"<div><h3>{title}: {flops(cost.flops)} FLOPs, {cost.calls:,} ops</h3>"
        f"{blocks(side, longest, kind)}</div>"
        for title, kind, side, cost in (
            (titles[0], "before", structure.before, structure.cost_before),
            (titles[1], "after", structure.after, structure.cost_after),
        )
    ]
    return (
        "<h2>The model, module by module</h2><p class=soft>Width is predicted time; a stack is a "
        "module that is called several times.</p><div class=pair id=structure>"
        f"{''.join(sides)}</div>"
    )


def _rewrites(report: ReportData) -> str:
    applied = rows_by_cost(report)
    if not applied:
        return ""
    heading = "What would be rewritten" if report.mode == "audit" else "What was rewritten"
    longest = max((max(_times(remark)) for remark in applied), default=0.0)
    rows = []
    for remark in applied:
        numbers = [
            ("" if remark.cost is None else f"{flops(remark.cost.before.flops)} FLOPs"),
            share(remark, report) and f"{share(remark, report)} of the model",
            predicted(remark, report) and f"predicted {predicted(remark, report)}",
            measured(remark) and f"measured {measured(remark)}",
        ]
        title = _text(remark.what or remark.target)
        title += f" → {_text(remark.becomes)}" if remark.becomes else ""
        spans = "".join(f"<span>{_text(number)}</span>" for number in numbers if number)
        rows.append(
            f"<details open data-kind=applied><summary><span class='chip applied'>"
            f"{_text(remark.rule)}</span> {title}</summary><div>"
            f"<code>{_text(place(remark))}</code><div class=numbers>{spans}</div>"
            f"{bars(*_times(remark), longest)}</div></details>"
        )
    return f"<h2>{heading}</h2><div id=rewrites>{''.join(rows)}</div>"


def _times(remark: Remark) -> tuple[float, float]:
    """Milliseconds before and after: measured if known, else predicted."""
    if (times := milliseconds(remark)) is not None:
        return times
    if remark.cost is None:
        return 0.0, 0.0
    before, after = remark.cost.before.milliseconds, remark.cost.after.milliseconds
    return before, after if after > before * 1e-6 else 0.0


def _mistakes(report: ReportData) -> str:
    rows = [
        f"<details open><summary><span class='chip mistake'>{f.code}</span> "
        f"<code>{_text(line_of(f.location or f.target))}</code></summary><div>{_text(f.text)}"
        f"<br>→ {_text(f.cure)}</div></details>"
        for f in report.findings
    ]
    return f"<h2>Usual mistakes</h2><div id=mistakes>{''.join(rows)}</div>" if rows else ""


def _left(report: ReportData) -> str:
    left = left_by_cost(report)
    if not left:
        return ""
    rows, kinds = [], dict.fromkeys(remark.rule for remark in left)
    for remark in left:
        chips = {
            "failed": " <span class='chip failed'>failed</span>",
            "applied": " <span class='chip applied'>in part</span>",
        }
        state = chips.get(remark.status, "")
        reasons = "".join(
            f"<p><code>{code}</code> {_text(text)}<br>"
            f"→ <code>{_text(line)}</code> {_text(cure)}</p>"
            for code, text, line, cure in cures(remark)
        )
        rows.append(
            f"<details data-kind='{_text(remark.rule)}'><summary>"
            f"<span class=chip>{_text(remark.rule)}</span>"
            f"{state} {_text(remark.what or remark.target)} <code>{_text(place(remark))}</code>"
            f"</summary><div>{reasons}</div></details>"
        )
    boxes = "".join(
        f"<label><input type=checkbox checked name=kind value='{kind}'> {kind}</label>"
        for kind in map(_text, kinds)
    )
    return (
        "<h2>Left as it is</h2><form class=filter data-rows=left>"
        "<input type=search name=words placeholder='words to look for' aria-label='filter'>"
        f"{boxes}<output class=soft></output></form><div id=left>{''.join(rows)}</div>"
    )


def _curve(report: ReportData) -> str:
    if not report.curve:
        return ""
    return (
        "<h2>What the factorization gives up</h2><p class=soft>The predicted error of the output "
        f"against what is left of the budgeted quantity.</p>{curve(report.curve)}"
    )


def _fixed(report: ReportData) -> str:
    lines = "".join(f"<li>{_text(fixed)}</li>" for fixed in report.fixed)
    return f"<h2>Fixed by the trace</h2><ul class=soft>{lines}</ul>" if lines else ""
