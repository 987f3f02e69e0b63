"""The performance gate: a new report against a baseline, every case and metric with a verdict.

Times are compared as ratios to the rival that the baseline timed in turn with the case, so that the machine's
own speed cancels; where the baseline has none as they are, on the same device only.
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

# Relative, but for parity's drop in dB.
DEFAULT_LIMITS = {"median": 0.05, "memory": 0.10, "engine-size": 0.05, PARITY: 1.0}
# dB above which two processors differ: a picture has a few values, of 8 bits, that are rounded the other way.
ROUNDING = 60.0
# The chance of one false alarm among all times of a comparison.
ALPHA = 0.01

Samples = tuple[float, ...]
WORSE, BETTER, OK, UNSURE, MISSING, NEW = "worse", "better", "ok", "~", "missing", "new"
FAILING = (WORSE, MISSING)


@dataclass(frozen=True)
class Verdict:
    """`change` is relative, more being worse; of parity it is the dB lost. `base` and `new` are in `unit`.

    The change of a time lies between `low` and `high`; what was counted, not sampled, has neither.
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
        return self.status in FAILING


@dataclass(frozen=True)
class Comparison:
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]

    @property
    def failures(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.failed]

    def to_dict(self) -> dict[str, Any]:
        return {"passed": not self.failures, **asdict(self)}


def parse_limits(texts: tuple[str, ...]) -> dict[str, float]:
    """DEFAULT_LIMITS, changed or added to by `METRIC:PERCENT%` and `parity:DECIBEL`. UsageError."""
    limits = dict(DEFAULT_LIMITS)
    for text in texts:
        metric, _, amount = text.partition(":")
        if metric not in METRICS:
            raise unknown_name("metric", metric, METRICS, "--fail-on median:5%")
        unit = "dB" if metric == PARITY else "%"
        found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({unit})?", amount, re.IGNORECASE)
        if not found:
            raise UsageError(
                f"--fail-on {text!r}: {amount!r} is no number of {unit}", f"--fail-on {metric}:5{unit}"
            )
        limits[metric] = float(found[1]) / (1 if metric == PARITY else 100)
    return limits


def compare_reports(base: BenchmarkReport, new: BenchmarkReport, limits: Mapping[str, float]) -> Comparison:
    """A verdict for every case and every metric that has a limit, and on cases that only NEW has.

    UsageError where times are to be compared that are of two devices.
    """
    given = {case.name: case for case in new.cases}
    times = len(base.cases) * sum(metric in QUANTILES for metric in limits)
    alpha = ALPHA / max(1, times)
    verdicts: list[Verdict] = []
    for case in base.cases:
        if case.name not in given:
            verdicts.append(Verdict(case.name, "case", MISSING, why="the baseline has this case"))
            continue
        verdicts += judge(pair_of(case, base, given.pop(case.name), new), limits, alpha)
    verdicts += [Verdict(name, "case", NEW, why="the baseline has no such case") for name in given]
    return Comparison(tuple(verdicts), tuple(remarks(base, new)))


@dataclass(frozen=True)
class Pair:
    """One case of both reports, what each can be told in ratios to, and where each was measured."""

    base: Case
    new: Case
    base_yardsticks: Mapping[str, Samples]
    new_yardsticks: Mapping[str, Samples]
    was: Environment
    now: Environment

    @property
    def yardstick(self) -> str | None:
        """What times are told in; NEW has it where nothing is lacking."""
        return next(iter(self.base_yardsticks), None)

    @property
    def lacking(self) -> list[str]:
        return [name for name in self.base_yardsticks if name not in self.new_yardsticks]


def pair_of(case: Case, base: BenchmarkReport, now: Case, new: BenchmarkReport) -> Pair:
    sides = yardsticks(case, base), yardsticks(now, new)
    return Pair(case, now, *sides, where(case, base), new.environment)


def yardsticks(case: Case, report: BenchmarkReport) -> dict[str, Samples]:
    """A case's rivals; of a stage that none has (the context), what rivals took for the round's picture."""
    if case.rivals:
        return {name: rival.samples_ms for name, rival in case.rivals.items()}
    return {
        f"{name}'s {PICTURE}": rival.samples_ms
        for picture in report.cases
        if picture.name == PICTURE and case.name not in COLD  # which are of other rounds
        if len(picture.samples_ms) == len(case.samples_ms) and picture.groups == case.groups
        for name, rival in picture.rivals.items()
    }


def where(case: Case, report: BenchmarkReport) -> Environment:
    return case.environment or report.environment


def judge(pair: Pair, limits: Mapping[str, float], alpha: float) -> Iterator[Verdict]:
    """Without the baseline's rival no times: as they are, or to another one, they could hide a regression."""
    if pair.lacking:
        why = f"the baseline was timed in turn with {' and '.join(pair.lacking)}"
        yield Verdict(pair.base.name, "rival", MISSING, why=why)
    for metric in METRICS:
        if metric in limits:
            if metric not in QUANTILES:
                yield judge_figure(pair, metric, limits[metric])
            elif not pair.lacking:
                yield judge_time(pair, metric, limits[metric], alpha)


def judge_time(pair: Pair, metric: str, limit: float, alpha: float) -> Verdict:
    yardstick, quantile = pair.yardstick, QUANTILES[metric]
    if yardstick is None:
        require_one_device(pair)
    sides = both_log_times(pair, metric)
    # What the baseline can't tell is no loss; what it can, and NEW can't, is missing.
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
        status = UNSURE  # no change at all would give this, and so would one beyond the limit
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
    """The baseline's and NEW's."""
    name = pair.yardstick
    return [
        log_times(case, rivals[name] if name else None, metric)
        for case, rivals in ((pair.base, pair.base_yardsticks), (pair.new, pair.new_yardsticks))
    ]


def too_few(processes: Sequence[np.ndarray], quantile: float) -> str | None:
    """Why samples can't tell a quantile, or None."""
    fewest, needed = min(map(len, processes)), fewest_samples(quantile, len(processes))
    return f"takes {needed} samples from every process; one has {fewest}" if fewest < needed else None


def log_times(case: Case, rival: Samples | None, metric: str) -> list[np.ndarray]:
    """Each process's log samples, relative to the rival's where there is one.

    For the median sample by sample, whose pairs were taken side by side. A tail is held to the rival's median
    in the same process: its own tail would hide ours.
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
    """UsageError where two machines' own times would be compared. A processor's cores count too."""
    was, now = (
        f"{e.device}{f', {e.cores} cores' if e.device == e.processor else ''}" for e in (pair.was, pair.now)
    )
    if was != now:
        raise UsageError(
            f"case {pair.base.name!r} was timed on {was}, without a rival, and now on {now}: "
            "times of two machines can't be compared",
            "lcm-compile bench --against eager --save FILE on both: ratios to a rival can",
        )


def judge_figure(pair: Pair, metric: str, limit: float) -> Verdict:
    """What has one value a report: sizes, and parity."""
    name = SIZES.get(metric, "parity_db")
    base, new = getattr(pair.base, name), getattr(pair.new, name)
    place = (pair.base.name, metric)
    if base is None:
        return Verdict(*place, UNSURE, limit=limit, why="the baseline has none")
    if new is None:
        return Verdict(*place, MISSING, limit=limit, why="the baseline has it")
    if metric != PARITY and pair.was.device != pair.now.device and on_gpu(pair):
        return Verdict(*place, UNSURE, limit=limit, why="of another GPU")
    # Processors hardly matter to sizes; a GPU's engines are its own.
    if metric == PARITY:
        worse = min(base, ROUNDING) - min(new, ROUNDING)
    else:
        worse = new / base - 1 if base else math.inf * new
    status = WORSE if worse > limit else BETTER if worse < -limit else OK
    unit = "dB" if metric == PARITY else "bytes"
    return Verdict(*place, status, unit=unit, base=base, new=new, change=worse, limit=limit)


def on_gpu(pair: Pair) -> bool:
    return any(e.device != e.processor for e in (pair.was, pair.now))


def remarks(base: BenchmarkReport, new: BenchmarkReport) -> Iterator[str]:
    """What a reader should know before believing the verdicts."""
    for name, report in (("the baseline", base), ("the new report", new)):
        if any(not case.groups or len(case.groups) == 1 for case in report.cases):
            yield (
                f"{name} is of one process, so its intervals are wider: processes differ. compare without "
                "NEW runs several, and --update --loosen WHY keeps them"
            )
    was, now = base.environment.versions, new.environment.versions
    engines = [engines_text(report.benchmark) for report in (base, new)]
    if all(engines) and engines[0] != engines[1]:
        yield f"the engines differ: {' → '.join(engines)}"
    changed = [f"{k} {was[k]} → {now[k]}" for k in was if k in now and was[k] != now[k]]
    if changed:
        yield f"versions differ, of rivals perhaps too: {', '.join(changed)}"


def engines_text(benchmark: Benchmark) -> str:
    """Backend and precisions; nothing where the report does not tell."""
    return " ".join([benchmark.backend, *sorted(set(benchmark.precisions.values()))]).strip()
