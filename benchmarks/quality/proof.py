"""Measures the quality and the speed of the demo model, on this project's own engines: `make proof`.

It draws the proof's prompts once for each row of the tables, judges the pictures, and times the rows against
each other. It writes `proof.json` (every verdict and time), `proof.md` (the tables) and the figures. A row
that `proof.json` already holds is not measured again, unless the bundle, the settings, the judge or the
machine changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from lcm_compile import build, load
from lcm_compile.benchmarks.quality import features
from lcm_compile.benchmarks.quality.figures import write_figures
from lcm_compile.benchmarks.quality.rows import PARTS, Row, requests, rows_of
from lcm_compile.benchmarks.quality.tables import name_of, percent, report
from lcm_compile.builder.key import key_digest
from lcm_compile.builder.plan import Plan, make_plan
from lcm_compile.demo import judge
from lcm_compile.demo.world import LOOKS, STYLE, parse_caption, proof_prompts
from lcm_compile.engines import find_backend
from lcm_compile.output.console import Bar, BuildProgress, note
from lcm_compile.pipeline.pipeline import Pipeline
from lcm_compile.spec import BuildSpec
from lcm_compile.system.cache import home
from lcm_compile.system.files import write_atomically
from lcm_compile.system.processor import read_processor
from lcm_compile.system.versions import installed_version

SHOWN = 8  # pictures of each row that are kept for the figures
ROUNDS = 15  # rounds of timing, each of which draws one picture of every row

Record = dict[str, Any]


@cache
def machine() -> dict[str, Any]:
    """Returns the description of this machine and the installed packages that `proof.json` records."""
    packages = {"onnxruntime": find_backend("onnxruntime").PACKAGES}
    packages |= {name: (name,) for name in ("lcm-compile", "numpy", "torch", "diffusers")}
    return {
        "cpu": read_processor().name,
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "python": platform.python_version(),
        **{name: installed_version(names) for name, names in packages.items()},
    }


@cache
def judge_digest() -> str:
    """Returns the digest of all code and weights that pictures are judged with."""
    files = (Path(judge.__file__), Path(features.__file__), features.WEIGHTS)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@cache
def plan_of(spec: BuildSpec) -> Plan:
    """Returns the plan of a build, whose key holds the digests of everything that the bundle depends on."""
    return make_plan(spec)


def row_key(row: Row) -> str:
    """Returns the key of a row's measurement: a digest of everything that its result depends on."""
    settings = {"spec": plan_of(row.spec).key, "judges": judge_digest(), "machine": machine()}
    content = json.dumps([asdict(row) | settings, [asdict(request) for request in requests(row)]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@lru_cache(maxsize=4)
def reference_of(count: int, zebra: bool, look: str) -> features.Reference:
    """Returns the rendered pictures that rows with these values of their fields are compared with."""
    return features.Reference([text + STYLE * zebra for text, _ in proof_prompts(count)], LOOKS[look])


def shown_path(key: str) -> Path:
    """Returns the path of the strip with a row's first pictures, side by side."""
    return home() / "proof" / f"{key}.png"


def draw_row(row: Row, pipeline: Pipeline) -> features.Pictures:
    """Draws all pictures of a row. Shape (n, height, width, 3)."""
    asked = requests(row)
    pictures = []
    with Bar(f"{row.label}, {row.steps}") as bar:
        for i, request in enumerate(asked):
            pictures.append(pipeline.draw(request).pictures[0])
            bar.update(i + 1, len(asked))
    return np.stack(pictures)


def judge_row(row: Row, pictures: features.Pictures) -> Record:
    """Returns the row's record for `proof.json`, without its times.

    `verdicts` has a string for each column of the tables, with a character for each picture: 1 for right, 0
    for wrong, and - if the prompt says nothing about that column.
    """
    asked = [parse_caption(request.prompt) for request in requests(row)]
    found = []
    for picture, words in zip(pictures, asked, strict=True):
        verdict = judge.matches(judge.judge(picture, LOOKS[row.look]), words)
        found.append(verdict | {"all": all(right is not False for right in verdict.values())})
    reference, plan = reference_of(row.count, row.zebra, row.look), plan_of(row.spec)
    mark = {None: "-", True: "1", False: "0"}
    verdicts = {name: "".join(mark[verdict[name]] for verdict in found) for name in found[0]}
    return {
        **{name: value for name, value in asdict(row).items() if name != "spec"},
        "base": Path(row.spec.base).name,
        "loras": [{"file": lora.path.name, "weight": lora.spec.weight} for lora in plan.loras],
        "bundle": key_digest(plan.key),
        "passes": row.passes,
        "right": {name: share(marks) for name, marks in verdicts.items()},
        "distances": reference.distances(pictures),
        "floor": reference.floor,
        "verdicts": verdicts,
    }


def share(marks: str) -> Record | None:
    """Returns the share of right verdicts in a column, with Wilson's 95 % interval; None without verdicts."""
    count = len(marks) - marks.count("-")
    z = 1.96  # standard deviations: 95 % of a normal distribution lie within them
    if not count:
        return None
    # E. B. Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    right = marks.count("1") / count
    middle = (right + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * ((right * (1 - right) + z * z / (4 * count)) / count) ** 0.5
    return {"part": right, "of": count, "low": middle - half, "high": middle + half}


def measure_rows(rows: Iterable[Row], known: Mapping[str, Record]) -> Iterator[tuple[str, Record]]:
    """Draws and judges the rows that are not known yet, one bundle after the other.

    Yields the key and the record of each.
    """
    missing: dict[BuildSpec, list[Row]] = {}
    for row in rows:
        key = row_key(row)
        if key not in known or not shown_path(key).is_file():
            missing.setdefault(row.spec, []).append(row)
    for spec, waiting in missing.items():
        with opened(spec) as pipeline:
            for row in waiting:
                pictures = draw_row(row, pipeline)
                path = shown_path(row_key(row))
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.concatenate(list(pictures[:SHOWN]), 1)).save(path)
                yield row_key(row), judge_row(row, pictures)


def time_rows(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Returns the seconds per picture of each row, by the row's key, with one value for each round.

    Each round draws one picture of every row on warm engines. So other load on the machine slows all rows
    alike.
    """
    seconds: dict[str, list[float]] = {row_key(row): [] for row in rows}
    with ExitStack() as stack:
        pipelines = {spec: stack.enter_context(opened(spec)) for spec in {row.spec for row in rows}}
        bar = stack.enter_context(Bar("timing"))
        for turn in range(ROUNDS + 1):
            for row in rows:
                asked = requests(row)
                start = time.perf_counter()
                pipelines[row.spec].draw(asked[turn % len(asked)])
                seconds[row_key(row)].append(round(time.perf_counter() - start, 5))
            bar.update(turn, ROUNDS)
    return {key: samples[1:] for key, samples in seconds.items()}  # the first round warms up


@contextmanager
def opened(spec: BuildSpec) -> Iterator[Pipeline]:
    """Builds a spec and yields the pipeline of its bundle."""
    with BuildProgress() as progress:
        bundle = build(spec, report=progress)
    with load(bundle) as pipeline:
        yield pipeline


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("benchmarks/results/proof"),
    help="Folder for the tables and figures.",
)
@click.option("--count", type=click.IntRange(min=2), default=300, show_default=True, help="Pictures per row.")
@click.option("--tuned", metavar="DIR", default="", help="A base that is tuned to the dusk palette.")
@click.option(
    "--part",
    "parts",
    type=click.Choice(PARTS),
    multiple=True,
    help="Measure only this part. Can be given several times.",
)
def main(out: Path, count: int, tuned: str, parts: tuple[str, ...]) -> None:
    """Measures the demo model and writes tables and figures to OUT."""
    path = out / "proof.json"
    stored = json.loads(path.read_text())["rows"] if path.exists() else {}
    rows = [row for part in parts or PARTS for row in rows_of(part, count, tuned)]
    if "universal" in (parts or PARTS) and not tuned:
        note("  universal is left out: it needs --tuned DIR")
    known = dict(stored)
    for key, record in measure_rows(rows, stored):
        known[key] = record
        write(path, known)
        right = percent(record["right"]["all"])
        note(f"  {record['part']}: {name_of(record)}: {right} % right in every column")
    for part in parts or PARTS:
        compared = [row for row in rows if row.part == part and row.timed]
        if not all("seconds" in known[row_key(row)] for row in compared):
            for key, samples in time_rows(compared).items():
                known[key] = {**known[key], "seconds": samples}
            write(path, known)
    # The file holds the rows of the requested parts in their order, then all other parts unchanged.
    kept = {row_key(row): known[row_key(row)] for row in rows}
    kept |= {key: record for key, record in stored.items() if record["part"] not in (parts or PARTS)}
    write(path, kept)
    (out / "proof.md").write_text(report(machine(), list(kept.values())), encoding="utf-8")
    write_figures(out, [(kept[key], shown_pictures(key)) for key in map(row_key, rows)])
    print(out.resolve())


def write(path: Path, rows: Mapping[str, Record]) -> None:
    """Writes `proof.json`: the machine, the prompts, and one line for each row."""
    most = max((record["count"] for record in rows.values()), default=0)
    lines = [f"{json.dumps(key)}: {json.dumps(record, ensure_ascii=False)}" for key, record in rows.items()]
    head = {"machine": machine(), "prompts": proof_prompts(most)}
    top = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    text = ",\n".join([*top, '"rows": {\n' + ",\n".join(lines) + "\n}"])
    write_atomically(path, f"{{\n{text}\n}}\n")


def shown_pictures(key: str) -> list[np.ndarray]:
    """Returns a row's first pictures, each of shape (64, 64, 3)."""
    with Image.open(shown_path(key)) as strip:
        return np.split(np.asarray(strip), strip.width // strip.height, axis=1)


if __name__ == "__main__":
    main()
