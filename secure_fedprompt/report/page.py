"""The page: plain HTML and CSS, no script, no network."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from secure_fedprompt.audit.findings import CHECKS, Level
from secure_fedprompt.audit.summary import verdict
from secure_fedprompt.report.charts import line, stacked, table
from secure_fedprompt.report.gather import Report

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c1f24; --dim: #5b6470; --rule: #d5dae1;
  --good: #1a7f37; --bad: #b3261e; --warn: #8a5a00;
  --s0: #2f6db0; --s1: #b85c14; --s2: #3f8b3a; --s3: #8250a8; --s4: #6b7280; --s5: #b03a5b; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --fg: #e6e9ed; --dim: #9aa4b1;
  --rule: #333a44; --good: #57c271; --bad: #ff8a80; --warn: #f0b849;
  --s0: #6aa9e8; --s1: #f09a55; --s2: #79c773; --s3: #c197e6; --s4: #9aa4b1; --s5: #f084a3; } }
@media print { :root { color-scheme: light; --bg: #fff; --fg: #000; --dim: #444; --rule: #bbb; }
  section { break-inside: avoid; } details::details-content { content-visibility: visible; } }
svg { font-size: 12px; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li, caption, summary { overflow-wrap: anywhere; }
.dim, caption { color: var(--dim); font-size: .9rem; text-align: left; }
.verdict { border-left: .4rem solid; padding: .5rem .75rem; font-weight: 600; }
.kept { border-color: var(--good); } .broken { border-color: var(--bad); }
.pass { color: var(--good); } .fail { color: var(--bad); } .warn { color: var(--warn); }
svg { width: 100%; height: auto; display: block; font-family: system-ui, sans-serif; }
svg text { fill: var(--dim); } .grid { stroke: var(--rule); }
polyline { fill: none; stroke-width: 2; } .l0 { stroke: var(--s0); }
.f0 { fill: var(--s0); } .f1 { fill: var(--s1); } .f2 { fill: var(--s2); }
.f3 { fill: var(--s3); } .f4 { fill: var(--s4); } .f5 { fill: var(--s5); }
.b0 { background: var(--s0); } .b1 { background: var(--s1); } .b2 { background: var(--s2); }
.b3 { background: var(--s3); } .b4 { background: var(--s4); } .b5 { background: var(--s5); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0;
  margin: .25rem 0; font-size: .9rem; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--rule); text-align: right;
  white-space: nowrap; vertical-align: top; } th[scope=row], th:first-child { text-align: left; }
.words { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 5rem; }
.level { stroke: var(--dim); stroke-width: 1.5; stroke-dasharray: 6 5; }
@media screen and (max-width: 34rem) { svg { font-size: 19px; } }
summary { cursor: pointer; } :focus-visible { outline: 3px solid var(--s0); outline-offset: 2px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(report: Report) -> str:
    """The whole document."""
    title = f"{report.method} under {report.protection}, run {report.run[:8]}"
    sections = [
        _section("What ran", _facts(report.facts)),
        _section("Who learned what", _list(report.learned)),
        _section("Accuracy", _accuracy(report)),
        _section("Bytes", _bytes(report)),
        _section("Time", _time(report)),
        _section("Dropouts and faults", _dropouts(report)),
        _section("Privacy spent", _list(report.spent)),
        _section("Audit", _audit(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="dim">{escape(report.subtitle)}</p>'
        f"{_verdict(report)}</header><main>{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    name = title.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{body}</section>'


def _facts(facts: dict[str, str]) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
        + "</dl>"
    )


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _numbers(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _verdict(report: Report) -> str:
    if report.audit is None:
        return '<p class="verdict broken">not audited: the run folder holds no audit log</p>'
    kind = "kept" if report.audit.kept else "broken"
    return f'<p class="verdict {kind}">Audit: {escape(verdict(report.audit))}</p>'


def _accuracy(report: Report) -> str:
    values = [None if v is None else 100 * v for v in report.accuracy]
    if all(v is None for v in values):
        return (
            '<p class="dim">No accuracy is on record: metrics were off, or only clients opened the '
            "sums; give a client's result file with --client-json.</p>"
        )
    labels = [f"before {label}" for label in report.labels]
    zero = None if report.zero_shot is None else ("zero-shot", 100 * report.zero_shot)
    title = "Accuracy of the global prompt by round" + (", and zero-shot" if zero else "")
    chart = line(title, report.marks, values, "%", zero)
    rows = [(a, "" if v is None else f"{v:.1f}%") for a, v in zip(labels, values, strict=True)]
    note = (
        '<p class="dim">Of the global prompt at the start of each round, over the test images of '
        "all clients, who share sums only: there is no spread between them to show. Zero-shot is "
        "what &ldquo;a photo of a NAME.&rdquo; gets right, with nothing trained.</p>"
    )
    return chart + note + _numbers("Numbers", table(("round", "accuracy"), rows, "Accuracy"))


def _bytes(report: Report) -> str:
    charts = []
    for way, series in report.traffic.items():
        most = max((sum(column) for column in zip(*series.values(), strict=True)), default=0.0)
        unit, scale = ("MB", 1e6) if most >= 1e6 else ("kB", 1e3)
        scaled = {kind: [value / scale for value in values] for kind, values in series.items()}
        title = f"{unit} {way} by message type and round, all clients together"
        charts.append(f"<h3>{'To' if way == 'up' else 'From'} the server</h3>")
        charts.append(stacked(title, report.marks, scaled, f" {unit}"))
        rows = [(kind, *(f"{v:,.0f}" for v in values), f"{sum(values):,.0f}")
                for kind, values in series.items()]  # fmt: skip
        head = ("message", *report.labels, "all")
        charts.append(_numbers("Numbers", table(head, rows, f"Bytes {way}")))
    return "".join(charts)


def _time(report: Report) -> str:
    chart = stacked("Seconds by stage and round", report.marks, report.seconds, " s")
    rows = [(stage, *(f"{v:.2f}" for v in values)) for stage, values in report.seconds.items()]
    head = ("stage", *report.labels)
    return chart + _numbers("Numbers", table(head, rows, "Seconds by stage"))


def _dropouts(report: Report) -> str:
    if not report.dropouts:
        return "<p>None: every client of every cohort is in every sum, and no round aborted.</p>"
    return table(("round", "who", "what"), report.dropouts, "Dropouts, faults and aborted rounds")


def _audit(report: Report) -> str:
    if report.audit is None:
        return "<p>The run folder holds no audit log.</p>"
    checks = "".join(
        f'<li><strong class="{state.split(maxsplit=1)[0]}">{escape(state)}</strong> '
        f"{escape(check)}: {escape(CHECKS[check])}</li>"
        for check, state in report.audit.checks.items()
    )
    found = [f for f in report.audit.findings if f.level is not Level.NOTE]
    rows = [(f.level, f.check, f.where, f.text) for f in found]
    head = ("level", "check", "where", "what")
    listed = table(head, rows, "Failures and warnings") if rows else ""
    return f"<ul>{checks}</ul>{listed}"
