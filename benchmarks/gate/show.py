"""A comparison as text for people, as Markdown for a pull request, and as JUnit XML for CI."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from xml.etree import ElementTree

from lcm_compile.benchmarks.gate.compare import PARITY, UNSURE, Comparison, Verdict
from lcm_compile.benchmarks.markdown import markdown_table

# The columns of the Markdown table. Those with text are aligned left, those with figures right.
COLUMNS = ("case", "metric", "baseline", "now", "change", "interval", "limit", "verdict")
TEXT_COLUMNS = tuple(COLUMNS.index(name) for name in ("case", "metric", "verdict"))


def value_text(verdict: Verdict, value: float | None) -> str:
    """Returns a value with the verdict's unit; an empty text for None."""
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
    """Returns the change in percent, or parity's in dB, where a minus is a loss."""
    if verdict.change is None:
        return ""
    return f"{-verdict.change:+.1f} dB" if verdict.metric == PARITY else f"{100 * verdict.change:+.1f} %"


def interval_text(verdict: Verdict) -> str:
    """Returns the confidence interval of the change, in percent."""
    if verdict.low is None or verdict.high is None:
        return ""
    return f"[{100 * verdict.low:+.1f}, {100 * verdict.high:+.1f}]"


def limit_text(verdict: Verdict) -> str:
    """Returns the limit in percent, or parity's in dB."""
    if verdict.limit is None:
        return ""
    return f"{verdict.limit:g} dB" if verdict.metric == PARITY else f"{100 * verdict.limit:g} %"


def status_text(verdict: Verdict) -> str:
    """Returns the status with its reason, or for a failure with the limit."""
    if verdict.why:
        return f"{verdict.status}: {verdict.why}"
    return f"{verdict.status} (limit {limit_text(verdict)})" if verdict.failed else verdict.status


def scale_text(verdicts: list[Verdict]) -> str:
    """Returns a remark on the rival that a case's times are divided by, or an empty text for milliseconds."""
    rivals = {v.unit.removeprefix("× ") for v in verdicts if v.unit.startswith("×")}
    yardsticks = [rival if "'s " in rival else f"{rival}'s" for rival in rivals]
    return "".join(f" (times relative to {name} in the same run)" for name in yardsticks)


def by_case(comparison: Comparison) -> Iterator[tuple[str, list[Verdict]]]:
    """Yields each case's name with its verdicts."""
    for case, verdicts in groupby(comparison.verdicts, lambda v: v.case):
        yield case, list(verdicts)


def summary(comparison: Comparison) -> str:
    """Returns one line that says how many verdicts fail, and which."""
    failures = comparison.failures
    if not failures:
        unsure = sum(v.status == UNSURE for v in comparison.verdicts)
        undecided = f", {unsure} undecided" if unsure else ""
        return f"{len(comparison.verdicts)} compared: none worse than its limit{undecided}"
    failed = "; ".join(f"{v.case} {v.metric}: {change_text(v)} {status_text(v)}" for v in failures)
    return f"{len(failures)} of {len(comparison.verdicts)} failed: {' '.join(failed.split())}"


def table(comparison: Comparison) -> str:
    """Returns the comparison as text, at most 80 columns wide unless a case's name or a reason is longer."""
    lines = []
    for case, verdicts in by_case(comparison):
        lines.append(plain(case) + scale_text(verdicts))
        for v in verdicts:
            cells = (value_text(v, v.base), value_text(v, v.new), change_text(v), interval_text(v))
            row = f"  {v.metric:<11} " + "".join(map(str.rjust, cells, (10, 10, 10, 16)))
            lines.append(f"{row if any(cells) else row.rstrip()}  {status_text(v)}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def markdown(comparison: Comparison) -> str:
    """Returns the comparison as a section in Markdown: the summary, a table, and the notes."""
    rows = []
    for v in comparison.verdicts:
        verdict = f"**{status_text(v)}**" if v.failed else status_text(v)
        cells = [v.case, v.metric, value_text(v, v.base), value_text(v, v.new), change_text(v)]
        cells += [interval_text(v), limit_text(v), verdict]
        rows.append([plain(cell) for cell in cells])
    lines = ["### lcm-compile compare", "", summary(comparison), ""]
    lines += markdown_table(COLUMNS, rows, TEXT_COLUMNS)
    scales = [case + scale_text(verdicts) for case, verdicts in by_case(comparison) if scale_text(verdicts)]
    lines += ["", *(f"- {plain(remark)}" for remark in (*scales, *comparison.notes))]
    return "\n".join(lines).rstrip() + "\n"


def junit(comparison: Comparison) -> str:
    """Returns the comparison as JUnit XML with a test for each verdict. Undecided ones count as skipped."""
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
        message = " ".join(f"{change_text(v)} {interval_text(v)} {status_text(v)}".split())
        if v.failed:
            ElementTree.SubElement(test, "failure", message=plain(message))
        elif v.status == UNSURE:
            ElementTree.SubElement(test, "skipped", message=plain(message))
        else:
            ElementTree.SubElement(test, "system-out").text = plain(message)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def plain(text: str) -> str:
    """Returns the text with "?" for line breaks, control characters and whatever XML does not allow."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "?", text)
