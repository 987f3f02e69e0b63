"""The performance gate: compares a new report with a baseline and gives a verdict on every case and metric.

Times are compared as ratios to the rival that was timed in turn with the case, so that the machine's own
speed cancels. If the baseline has no rival, they are compared as milliseconds, which only works on the same
device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lcm_compile.benchmarks.gate.statistics import change, fewest_samples, spread
from lcm_compile.benchmarks.measure.bench import COLD, PICTURE
from lcm_compile.benchmarks.measure.report import Benchmark, BenchmarkReport, Case, Environment
from lcm_compile.errors import UsageError, unknown_name

QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}
SIZES = {"memory": "memory_bytes", "gpu-memory": "gpu_memory_bytes", "engine-size": "engine_bytes"}
PARITY = "parity"
METRICS = (*QUANTILES, *SIZES, PARITY)

# The largest relative increase that passes; for parity, the largest loss in dB.
DEFAULT_LIMITS = {"median": 0.05, "memory": 0.10, "engine-size": 0.05, PARITY: 1.0}
# Parity above this many dB counts as equal, because there two processors differ too: they round a few 8-bit
# values of a picture differently.
ROUNDING = 60.0
# The probability of at least one false alarm among all times of a comparison.
ALPHA = 0.01

Samples = tuple[float, ...]
# The statuses of a verdict.
WORSE = "worse"
BETTER = "better"
OK = "ok"
UNSURE = "~"  # the samples can't decide, or there is nothing to compare
MISSING = "missing"  # the baseline has it, and the new report does not
NEW = "new"  # the new report has it, and the baseline does not
FAILING = (WORSE, MISSING)


@dataclass(frozen=True)
class Verdict:
    """The outcome for one metric of one case.

    `base` and `new` are the two values, in `unit`. `change` is relative, and positive if the new value is
    worse; for parity it is the loss in dB. `low` and `high` are the confidence interval of a time's change;
    sizes and parity have none. `why` explains a status that no figures explain.
    """

    case: str
    metric: str
    status: str
    unit: str = ""
    base: float | None = None
    new: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    why: str = ""

    @property
    def failed(self) -> bool:
        """Whether this verdict makes the comparison fail."""
        return self.status in FAILING


@dataclass(frozen=True)
class Comparison:
    """All verdicts of a comparison, and notes that help to judge them."""

    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]

    @property
    def failures(self) -> list[Verdict]:
        """The verdicts that make the comparison fail."""
        return [verdict for verdict in self.verdicts if verdict.failed]

    def to_dict(self) -> dict[str, Any]:
        """Returns what `compare --json` prints of the comparison."""
        return {"passed": not self.failures, **asdict(self)}


def parse_limits(texts: tuple[str, ...]) -> dict[str, float]:
    """Returns DEFAULT_LIMITS, updated with texts like "median:5%" and "parity:1dB".

    The units may be left out. Raises UsageError for an unknown metric or a limit that is not a number.
    """
    limits = dict(DEFAULT_LIMITS)
    for text in texts:
        metric, _, amount = text.partition(":")
        if metric not in METRICS:
            raise unknown_name("metric", metric, METRICS, "--fail-on median:5%")
        unit = "dB" if metric == PARITY else "%"
        found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({unit})?", amount, re.IGNORECASE)
        if not found:
            raise UsageError(
                f"--fail-on {text!r}: {amount!r} is not a number of {unit}", f"--fail-on {metric}:5{unit}"
            )
        limits[metric] = float(found[1]) / (1 if metric == PARITY else 100)
    return limits


def compare_reports(base: BenchmarkReport, new: BenchmarkReport, limits: Mapping[str, float]) -> Comparison:
    """Returns the verdicts on each case of the baseline, for each metric that has a limit.

    A case that only one of the reports has gets a single verdict. Raises UsageError if times without a rival
    would be compared between two devices.
    """
    new_cases = {case.name: case for case in new.cases}
    times = len(base.cases) * sum(metric in QUANTILES for metric in limits)
    alpha = ALPHA / max(1, times)
    verdicts: list[Verdict] = []
    for case in base.cases:
        if case.name not in new_cases:
            verdicts.append(Verdict(case.name, "case", MISSING, why="the baseline has this case"))
            continue
        verdicts += judge(pair_of(case, base, new_cases.pop(case.name), new), limits, alpha)
    verdicts += [Verdict(name, "case", NEW, why="the baseline has no such case") for name in new_cases]
    return Comparison(tuple(verdicts), tuple(remarks(base, new)))


@dataclass(frozen=True)
class Pair:
    """One case of both reports, with its yardsticks and the environment where it was measured.

    Yardsticks are the samples, by name, that the case's own samples can be divided by.
    """

    base: Case
    new: Case
    base_yardsticks: Mapping[str, Samples]
    new_yardsticks: Mapping[str, Samples]
    base_environment: Environment
    new_environment: Environment

    @property
    def yardstick(self) -> str | None:
        """The yardstick that both sides' times are divided by, None for milliseconds.

        It is the baseline's first; NEW has it too if `missing_yardsticks` is empty.
        """
        return next(iter(self.base_yardsticks), None)

    @property
    def missing_yardsticks(self) -> list[str]:
        """The baseline's yardsticks that NEW does not have."""
        return [name for name in self.base_yardsticks if name not in self.new_yardsticks]


def pair_of(base_case: Case, base: BenchmarkReport, new_case: Case, new: BenchmarkReport) -> Pair:
    """Returns a case of the baseline with the same case of the new report."""
    return Pair(
        base_case,
        new_case,
        yardsticks(base_case, base),
        yardsticks(new_case, new),
        case_environment(base_case, base),
        case_environment(new_case, new),
    )


def yardsticks(case: Case, report: BenchmarkReport) -> dict[str, Samples]:
    """Returns the samples of the case's rivals, by name.

    For a stage that no rival has (the context), these are the rivals' samples of the picture, if they are
    from the same rounds.
    """
    if case.rivals:
        return {name: rival.samples_ms for name, rival in case.rivals.items()}
    return {
        f"{name}'s {PICTURE}": rival.samples_ms
        for picture in report.cases
        if picture.name == PICTURE and case.name not in COLD  # cold starts are from other rounds
        if len(picture.samples_ms) == len(case.samples_ms) and picture.groups == case.groups
        for name, rival in picture.rivals.items()
    }


def case_environment(case: Case, report: BenchmarkReport) -> Environment:
    """Returns where a case's samples were taken."""
    return case.environment or report.environment


def judge(pair: Pair, limits: Mapping[str, float], alpha: float) -> Iterator[Verdict]:
    """Yields the verdicts on one case, for each metric that has a limit.

    If a rival of the baseline is missing, no times are compared: as milliseconds, or as ratios to another
    rival, they could hide a regression.
    """
    if pair.missing_yardsticks:
        why = f"the baseline was timed in turn with {' and '.join(pair.missing_yardsticks)}"
        yield Verdict(pair.base.name, "rival", MISSING, why=why)
    for metric in METRICS:
        if metric in limits:
            if metric not in QUANTILES:
                yield judge_figure(pair, metric, limits[metric])
            elif not pair.missing_yardsticks:
                yield judge_time(pair, metric, limits[metric], alpha)


def judge_time(pair: Pair, metric: str, limit: float, alpha: float) -> Verdict:
    """Returns the verdict on a median or a tail. `alpha` is the error probability on either side.

    A time is worse if the interval of its change is entirely above zero and the estimate is above the limit.
    Raises UsageError if there is no yardstick and the devices differ.
    """
    yardstick, quantile = pair.yardstick, QUANTILES[metric]
    if yardstick is None:
        require_one_device(pair)
    sides = both_log_times(pair, metric)
    # Too few samples in the baseline are no loss. If only NEW has too few, the metric is missing.
    for side, status in zip(sides, (UNSURE, MISSING), strict=True):
        if why := too_few(side, quantile):
            return Verdict(pair.base.name, metric, status, limit=limit, why=why)
    base, new = (spread(side, quantile) for side in sides)
    found = change(base, new, alpha)
    if found.low > 0 and found.value > limit:
        status = WORSE
    elif found.high < 0:
        status = BETTER
    elif found.low <= 0 and found.high > limit:
        status = UNSURE  # consistent both with no change and with one beyond the limit
    else:
        status = OK
    return Verdict(
        *(pair.base.name, metric, status),
        unit=f"× {yardstick}" if yardstick else "ms",
        base=math.exp(base.value),
        new=math.exp(new.value),
        change=found.value,
        low=found.low,
        high=found.high,
        limit=limit,
    )


def both_log_times(pair: Pair, metric: str) -> list[list[np.ndarray]]:
    """Returns the log times by process, first the baseline's and then NEW's."""
    name = pair.yardstick
    return [
        log_times(case, samples[name] if name else None, metric)
        for case, samples in ((pair.base, pair.base_yardsticks), (pair.new, pair.new_yardsticks))
    ]


def too_few(processes: Sequence[np.ndarray], quantile: float) -> str | None:
    """Returns why there are too few samples for this quantile, or None if there are enough."""
    fewest, needed = min(map(len, processes)), fewest_samples(quantile, len(processes))
    return f"takes {needed} samples from every process; one has {fewest}" if fewest < needed else None


def log_times(case: Case, rival: Samples | None, metric: str) -> list[np.ndarray]:
    """Returns each process's log samples, minus the rival's if there is one.

    For the median, the rival's sample of the same round is subtracted. For a tail, it is the rival's median
    in the same process, because the rival's own tail would hide ours.
    """
    cuts = np.cumsum(case.groups or (len(case.samples_ms),))[:-1]
    ours = np.split(np.log(case.samples_ms), cuts)
    if rival is None:
        return ours
    theirs = np.split(np.log(rival), cuts)
    if metric == "median":
        return [a - b for a, b in zip(ours, theirs, strict=True)]
    return [a - np.median(b) for a, b in zip(ours, theirs, strict=True)]


def require_one_device(pair: Pair) -> None:
    """Raises UsageError if the two sides ran on different devices, or on different numbers of cores."""
    base, new = (
        f"{e.device}{f', {e.cores} cores' if e.device == e.processor else ''}"
        for e in (pair.base_environment, pair.new_environment)
    )
    if base != new:
        raise UsageError(
            f"case {pair.base.name!r} was timed on {base} without a rival, and now on {new}: times of two "
            "machines can't be compared, but their ratios to a rival can",
            "measure on both: lcm-compile bench --against eager --save FILE",
        )


def judge_figure(pair: Pair, metric: str, limit: float) -> Verdict:
    """Returns the verdict on a metric with one value in each report: a size, or parity."""
    name = SIZES.get(metric, "parity_db")
    base, new = getattr(pair.base, name), getattr(pair.new, name)
    place = (pair.base.name, metric)
    if base is None:
        return Verdict(*place, UNSURE, limit=limit, why="the baseline has none")
    if new is None:
        return Verdict(*place, MISSING, limit=limit, why="the baseline has it")
    # Sizes hardly depend on the processor, but each GPU model has engines of its own.
    devices_differ = pair.base_environment.device != pair.new_environment.device
    if metric != PARITY and devices_differ and on_gpu(pair):
        return Verdict(*place, UNSURE, limit=limit, why="measured on another GPU")
    if metric == PARITY:
        worse = min(base, ROUNDING) - min(new, ROUNDING)
    else:
        worse = new / base - 1 if base else math.inf * new
    status = WORSE if worse > limit else BETTER if worse < -limit else OK
    unit = "dB" if metric == PARITY else "bytes"
    return Verdict(*place, status, unit=unit, base=base, new=new, change=worse, limit=limit)


def on_gpu(pair: Pair) -> bool:
    """Returns whether either side ran on a GPU."""
    return any(e.device != e.processor for e in (pair.base_environment, pair.new_environment))


def remarks(base: BenchmarkReport, new: BenchmarkReport) -> Iterator[str]:
    """Yields what a reader should know before relying on the verdicts."""
    for name, report in (("the baseline", base), ("the new report", new)):
        if any(not case.groups or len(case.groups) == 1 for case in report.cases):
            yield (
                f"{name} is from one process, which makes its intervals wider, because processes differ; "
                "compare without NEW runs several, and --update --loosen WHY keeps their report"
            )
    before, now = base.environment.versions, new.environment.versions
    engines = [engines_text(report.benchmark) for report in (base, new)]
    if all(engines) and engines[0] != engines[1]:
        yield f"the engines differ: {' → '.join(engines)}"
    changed = [f"{k} {before[k]} → {now[k]}" for k in before if k in now and before[k] != now[k]]
    if changed:
        yield f"versions differ, which may affect the rivals too: {', '.join(changed)}"


def engines_text(benchmark: Benchmark) -> str:
    """Returns the backend and the precisions, or an empty text if the report does not contain them."""
    return " ".join([benchmark.backend, *sorted(set(benchmark.precisions.values()))]).strip()
