"""A comparison for people, for a pull request's page, and for CI's list of tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from xml.etree import ElementTree

from lcm_compile.benchmarks.gate.compare import PARITY, UNSURE, Comparison, Verdict


def value_text(verdict: Verdict, value: float | None) -> str:
    if value is None:
        return ""
    if verdict.unit == "bytes":
        return f"{value / 1e6:.1f} MB"
    if verdict.unit == "dB":
        return f"{value:.1f} dB"
    if verdict.unit == "ms":
        return f"{value:.1f} ms"
    return f"{value:.3f}×"


def change_text(verdict: Verdict) -> str:
    if verdict.change is None:
        return ""
    return f"{-verdict.change:+.1f} dB" if verdict.metric == PARITY else f"{100 * verdict.change:+.1f} %"


def interval_text(verdict: Verdict) -> str:
    if verdict.low is None or verdict.high is None:
        return ""
    return f"[{100 * verdict.low:+.1f}, {100 * verdict.high:+.1f}]"


def limit_text(verdict: Verdict) -> str:
    if verdict.limit is None:
        return ""
    return f"{verdict.limit:g} dB" if verdict.metric == PARITY else f"{100 * verdict.limit:g} %"


def status_text(verdict: Verdict) -> str:
    """The status, with what a reader needs to understand it."""
    if verdict.why:
        return f"{verdict.status}: {verdict.why}"
    return f"{verdict.status} (limit {limit_text(verdict)})" if verdict.failed else verdict.status


def scale_text(verdicts: list[Verdict]) -> str:
    """What a case's times are in, where they are ratios."""
    rivals = {v.unit.removeprefix("× ") for v in verdicts if v.unit.startswith("×")}
    whose = [rival if "'s " in rival else f"{rival}'s" for rival in rivals]
    return "".join(f" (times as shares of {it} in the same run)" for it in whose)


def by_case(comparison: Comparison) -> Iterator[tuple[str, list[Verdict]]]:
    for case, verdicts in groupby(comparison.verdicts, lambda v: v.case):
        yield case, list(verdicts)


def summary(comparison: Comparison) -> str:
    """One line: how many fail, and which."""
    failures = comparison.failures
    if not failures:
        unsure = sum(v.status == UNSURE for v in comparison.verdicts)
        told = f", {unsure} can't be told" if unsure else ""
        return f"{len(comparison.verdicts)} compared: none worse than its limit{told}"
    told = "; ".join(f"{v.case} {v.metric}: {change_text(v)} {status_text(v)}" for v in failures)
    return f"{len(failures)} of {len(comparison.verdicts)} failed: {' '.join(told.split())}"


def table(comparison: Comparison) -> str:
    """At most 80 columns, but for a case's name and a reason."""
    lines = []
    for case, verdicts in by_case(comparison):
        lines.append(plain(case) + scale_text(verdicts))
        for v in verdicts:
            cells = (value_text(v, v.base), value_text(v, v.new), change_text(v), interval_text(v))
            row = f"  {v.metric:<11} " + "".join(map(str.rjust, cells, (10, 10, 10, 16)))
            lines.append(f"{row if any(cells) else row.rstrip()}  {status_text(v)}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def markdown(comparison: Comparison) -> str:
    head = ["case", "metric", "baseline", "now", "change", "interval", "limit", "verdict"]
    lines = ["### lcm-compile compare", "", summary(comparison), ""]
    lines += [f"| {' | '.join(head)} |", "|---|---|--:|--:|--:|--:|--:|---|"]
    for v in comparison.verdicts:
        verdict = f"**{status_text(v)}**" if v.failed else status_text(v)
        cells = [v.case, v.metric, value_text(v, v.base), value_text(v, v.new), change_text(v)]
        cells += [interval_text(v), limit_text(v), verdict]
        lines.append(f"| {' | '.join(plain(cell).replace('|', chr(92) + '|') for cell in cells)} |")
    scales = [case + scale_text(verdicts) for case, verdicts in by_case(comparison) if scale_text(verdicts)]
    lines += ["", *(f"- {plain(remark)}" for remark in (*scales, *comparison.notes))]
    return "\n".join(lines).rstrip() + "\n"


def junit(comparison: Comparison) -> str:
    """JUnit's XML: a test a verdict; what can't be told is skipped."""
    verdicts = comparison.verdicts
    counts = {
        "tests": len(verdicts),
        "failures": len(comparison.failures),
        "skipped": sum(v.status == UNSURE for v in verdicts),
    }
    suite = ElementTree.Element(
        "testsuite", {"name": "lcm-compile compare", **{k: str(n) for k, n in counts.items()}}
    )
    for v in verdicts:
        test = ElementTree.SubElement(suite, "testcase", classname=plain(v.case), name=v.metric)
        told = " ".join(f"{change_text(v)} {interval_text(v)} {status_text(v)}".split())
        if v.failed:
            ElementTree.SubElement(test, "failure", message=plain(told))
        elif v.status == UNSURE:
            ElementTree.SubElement(test, "skipped", message=plain(told))
        else:
            ElementTree.SubElement(test, "system-out").text = plain(told)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def plain(text: str) -> str:
    """On one line, without what XML has no letters for."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "?", text)
