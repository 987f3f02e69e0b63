"""Fills the README's table of speeds from the reports in benchmarks/results/.

Run `python -m lcm_compile.benchmarks.pages.readme_table` in a clone. `make bench` measures the demo first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import click

from lcm_compile.benchmarks.markdown import markdown_table
from lcm_compile.benchmarks.measure.report import BenchmarkReport, read_report
from lcm_compile.benchmarks.measure.summary import ms_text, per_picture
from lcm_compile.benchmarks.measure.timing import ratios
from lcm_compile.errors import UsageError
from lcm_compile.system.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def table(reports: Sequence[BenchmarkReport]) -> str:
    """Returns the table in Markdown, with a row for each report.

    A rival's column holds its time for a picture divided by ours, the median over pairs of samples.
    """
    rivals = list(dict.fromkeys(name for report in reports for name in report.cases[0].rivals))
    columns = ["model, engines", "device", "a picture", *(f"{name} takes" for name in rivals)]
    rows = []
    for report in reports:
        benchmark, picture = report.benchmark, report.cases[0]
        precisions = ", ".join(sorted(set(benchmark.precisions.values())))
        model = ", ".join(
            (
                f"{benchmark.spec.base} {benchmark.shape}",
                *([f"--vae {Path(benchmark.spec.vae).name}"] if benchmark.spec.vae else []),
                f"{benchmark.backend} {precisions}",
            )
        )
        rival_ratios = [
            f"{median(ratios(*per_picture(report, picture, name))):.2f} ×" if name in picture.rivals else ""
            for name in rivals
        ]
        device = f"{report.environment.device}, {report.environment.threads} threads"
        rows.append([model, device, ms_text(median(picture.samples_ms)), *rival_ratios])
    return "\n".join(markdown_table(columns, rows, left=(0, 1)))


def filled(text: str, inside: str, name: str = "bench") -> str:
    """Returns the page with the text between the two lines of a name replaced.

    Raises UsageError if it does not have each of these lines exactly once.
    """
    start, end = (f"<!-- {name}: {edge} -->" for edge in ("start", "end"))
    if text.count(start) != 1 or text.count(end) != 1:
        raise UsageError(
            f"the page must have the lines {start} and {end} once each",
            "put them around the place where the table belongs",
        )
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{inside}\n{end}{after}"


def reports_in(folder: Path) -> list[BenchmarkReport]:
    """Reads the reports in the folder whose names begin with "bench-", sorted by file name."""
    return [read_report(path) for path in sorted(folder.glob("bench-*.json"))]


@click.command()
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="Where the reports are.")
@click.option(
    "--readme", type=click.Path(path_type=Path), default=ROOT / "README.md", help="The page to fill."
)
def main(results: Path, readme: Path) -> None:
    """Fills the table between the README's two marker lines."""
    reports = reports_in(results)
    if not reports:
        raise UsageError(
            f"there is no report in {results}", "make bench measures the demo and saves reports there"
        )
    write_atomically(readme, filled(readme.read_text(encoding="utf-8"), table(reports)))
    print(readme)


if __name__ == "__main__":
    main()
