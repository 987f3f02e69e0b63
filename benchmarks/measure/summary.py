"""A benchmark for people: its tables, and the line that names the stage with most to gain."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lcm_compile.benchmarks.gate.statistics import fewest_samples
from lcm_compile.benchmarks.measure.bench import COLD, PICTURE
from lcm_compile.benchmarks.measure.report import BenchmarkReport, Case
from lcm_compile.benchmarks.measure.rivals import SELF
from lcm_compile.benchmarks.measure.timing import quantile, ratios
from lcm_compile.output.console import note, print_table, size_text


@dataclass(frozen=True)
class Latency:
    """Quantiles of a case's samples in milliseconds, None for a tail that has too few samples.

    `share` is the device's limit divided by the median, None where no limit is known.
    """

    median: float
    p90: float | None
    p99: float | None
    share: float | None

    @classmethod
    def of(cls, case: Case) -> Latency:
        """Returns the quantiles of this case."""
        middle = median(case.samples_ms)
        share = None if case.limit_ms is None else case.limit_ms / middle
        return cls(middle, tail(case.samples_ms, 0.9), tail(case.samples_ms, 0.99), share)


def tail(samples: Sequence[float], fraction: float) -> float | None:
    """Returns a quantile above the median, or None if so few samples would have none above it on average."""
    return quantile(samples, fraction) if len(samples) >= fewest_samples(fraction, 1) else None


def batches_of(report: BenchmarkReport) -> dict[str, int]:
    """Returns how many pictures ours and each rival draw at a time, by name."""
    ours = report.benchmark.shape.batch if report.benchmark.shape else 1
    return {SELF: ours, **{name: rival.batch or ours for name, rival in report.cases[0].rivals.items()}}


def per_picture(report: BenchmarkReport, case: Case, name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Returns our and a rival's milliseconds, sample by sample.

    If the rival draws another number of pictures at a time than ours, both are milliseconds for one picture.
    """
    ours, rival = case.samples_ms, case.rivals[name]
    if rival.batch is None:
        return ours, rival.samples_ms
    batch = batches_of(report)[SELF]
    return [ms / batch for ms in ours], [ms / rival.batch for ms in rival.samples_ms]


def summarise(report: BenchmarkReport) -> dict[str, Any]:
    """Returns the summary of the samples that `bench --json` prints.

    `ratio` is the median over pairs of a rival's time divided by ours.
    """
    picture, batches = report.cases[0], batches_of(report)
    return {
        "pictures_a_second": 1000 * batches[SELF] / median(picture.samples_ms),
        "batch": batches[SELF],
        "rivals": {
            name: {
                "pictures_a_second": 1000 * batches[name] / median(rival.samples_ms),
                "batch": batches[name],
            }
            for name, rival in picture.rivals.items()
        },
        "cases": {
            case.name: {
                **vars(Latency.of(case)),
                "samples": len(case.samples_ms),
                "rivals": {
                    name: {
                        "median": median(rival.samples_ms),
                        "ratio": median(ratios(*per_picture(report, case, name))),
                    }
                    for name, rival in case.rivals.items()
                },
            }
            for case in report.cases
            if case.samples_ms
        },
        "budget": budget(report),
    }


def stages_of(report: BenchmarkReport) -> list[Case]:
    """Returns the cases that are stages: all but the picture and the cold starts."""
    return [case for case in report.cases if case.name not in (PICTURE, *COLD) and case.samples_ms]


def budget(report: BenchmarkReport) -> str | None:
    """Returns a line on the stage whose time is furthest above its limit, or None if no limit is known."""
    picture_ms = median(report.cases[0].samples_ms)
    stages = [(case, median(case.samples_ms)) for case in stages_of(report) if case.limit_ms is not None]
    if not stages:
        return None
    case, ms = max(stages, key=lambda pair: pair[1] - (pair[0].limit_ms or 0.0))
    limit = case.limit_ms or 0.0
    device = "processor" if report.environment.device == report.environment.processor else "GPU"
    return (
        f"{case.name} takes {ms / picture_ms:.0%} of the picture and runs at {limit / ms:.0%} of this "
        f"{device}'s peak: at most {ms_text(ms - limit)} of {ms_text(picture_ms)} could be saved there"
    )


def ms_text(ms: float) -> str:
    """Returns milliseconds as text, in seconds from ten seconds on."""
    return f"{ms / 1000:.2f} s" if ms >= 10_000 else f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms"


def print_report(report: BenchmarkReport) -> None:
    """Prints tables of at most 80 columns to stdout, and the report's notes as warnings to stderr."""
    benchmark, environment = report.benchmark, report.environment
    precisions = ", ".join(sorted(set(benchmark.precisions.values())))
    print(f"{benchmark.spec.base} {benchmark.shape}, {benchmark.backend}, {precisions}")
    print(textwrap.fill(f"{environment.device}, {environment.threads} threads", 80) + "\n")
    print_table(
        ("", "median", "p90", "p99", "of limit", "engine"),
        [latency_row(case) for case in report.cases if case.samples_ms],
    )
    picture, summary = report.cases[0], summarise(report)
    print()
    print_table(("", "complete picture"), picture_rows(picture, summary))
    print()
    print_rivals(report)
    if line := summary["budget"]:
        print(textwrap.fill(line, 80))
    for text in report.notes:
        note(f"warning: {text}", always=True)


def latency_row(case: Case) -> tuple[str, ...]:
    """Returns a case's row of the first table: its name, quantiles, share of the limit, and engine size."""
    latency = Latency.of(case)
    return (
        case.name if case.passes == 1 else f"{case.name} × {case.passes}",
        ms_text(latency.median),
        *("" if ms is None else ms_text(ms) for ms in (latency.p90, latency.p99)),
        "" if latency.share is None else f"{latency.share:.0%}",
        "" if case.engine_bytes is None else size_text(case.engine_bytes),
    )


def picture_rows(picture: Case, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the rows of the picture's table, without those that were not measured."""
    batch = summary["batch"]
    by = f", by {batch}" if batch > 1 else ""
    rows = [("pictures a second", f"{summary['pictures_a_second']:.2f}{by}")]
    if picture.flop is not None and picture.weight_bytes is not None:
        rows.append(
            ("work", f"{picture.flop / 1e12:.3g} TFLOP, {size_text(picture.weight_bytes)} of weights")
        )
    if picture.limit_ms is not None:
        rows.append(("limit", ms_text(picture.limit_ms)))
    if picture.memory_bytes is not None:
        rows.append(("peak memory", size_text(picture.memory_bytes)))
    if picture.gpu_memory_bytes is not None:
        rows.append(("GPU memory", size_text(picture.gpu_memory_bytes)))
    if picture.parity_db is not None:
        rows.append(("PSNR", f"{picture.parity_db:.1f} dB"))
    return [*rows, ("samples", f"{len(picture.samples_ms)}")]


def print_rivals(report: BenchmarkReport) -> None:
    """Prints a table for each rival, with a row for each case that it was timed in."""
    picture = report.cases[0]
    for name in picture.rivals:
        shared = [case for case in report.cases if name in case.rivals]
        print_table(
            (f"against {name}", "ours", "theirs", "theirs : ours", "spread"),
            [
                *(rival_row(report, case, name) for case in shared),
                *batch_rows(report, name),
                *memory_rows(picture, name),
            ],
        )
        print()


def rival_row(report: BenchmarkReport, case: Case, name: str) -> tuple[str, ...]:
    """Returns the case's row of a rival's table: both medians, their ratio, and the ratio's quartiles."""
    ours, theirs = per_picture(report, case, name)
    pairs = ratios(ours, theirs)
    return (
        case.name if case.rivals[name].batch is None else f"{case.name}, each",
        ms_text(median(ours)),
        ms_text(median(theirs)),
        f"{median(pairs):.2f}×",
        f"{quantile(pairs, 0.25):.2f} to {quantile(pairs, 0.75):.2f}",
    )


def batch_rows(report: BenchmarkReport, name: str) -> list[tuple[str, ...]]:
    """Returns a row with both rates in pictures per second, if the rival has another batch than ours."""
    if report.cases[0].rivals[name].batch is None:
        return []
    ours = summarise(report)
    rates = [f"{side['pictures_a_second']:.2f}, by {side['batch']}" for side in (ours, ours["rivals"][name])]
    return [("pictures a second", *rates, "", "")]


def memory_rows(picture: Case, name: str) -> list[tuple[str, ...]]:
    """Returns a row with both peaks of memory, if both were measured."""
    ours, theirs = picture.memory_bytes, picture.rivals[name].memory_bytes
    if not ours or not theirs:
        return []
    return [("peak memory", size_text(ours), size_text(theirs), f"{theirs / ours:.2f}×", "")]
