"""Fills the README's table of speeds from the reports in benchmarks/results/.

`python -m lcm_compile.benchmarks.pages.readme_table`, from a clone; `make bench` measures the demo first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import click

from lcm_compile.benchmarks.measure.report import BenchmarkReport, read_report
from lcm_compile.benchmarks.measure.summary import ms_text, per_picture
from lcm_compile.benchmarks.measure.timing import ratios
from lcm_compile.errors import UsageError
from lcm_compile.system.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- bench: start -->", "<!-- bench: end -->"


def table(reports: Sequence[BenchmarkReport]) -> str:
    """Markdown: a line for each report, a column for each rival with the median ratio of pairs."""
    rivals = list(dict.fromkeys(name for report in reports for name in report.cases[0].rivals))
    columns = ["model, engines", "device", "a picture", *(f"{name} takes" for name in rivals)]
    lines = [columns, ["---", "---", "--:", *("--:" for _ in rivals)]]
    for report in reports:
        asked, picture = report.benchmark, report.cases[0]
        precisions = ", ".join(sorted(set(asked.precisions.values())))
        model = ", ".join(
            (
                f"{asked.spec.base} {asked.shape}",
                *([f"--vae {Path(asked.spec.vae).name}"] if asked.spec.vae else []),
                f"{asked.backend} {precisions}",
            )
        )
        shown = [
            f"{median(ratios(*per_picture(report, picture, name))):.2f} ×" if name in picture.rivals else ""
            for name in rivals
        ]
        device = f"{report.environment.device}, {report.environment.threads} threads"
        lines.append([model, device, ms_text(median(picture.samples_ms)), *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(text: str, inside: str) -> str:
    """A page with what is between the two markers replaced. UsageError where it has not one of each."""
    if text.count(START) != 1 or text.count(END) != 1:
        raise UsageError(f"the README needs one line {START} and one {END}", "put them back")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{inside}\n{END}{after}"


def reports_in(folder: Path) -> list[BenchmarkReport]:
    """Those that `bench --save` wrote under names of its own, by file name."""
    return [read_report(path) for path in sorted(folder.glob("bench-*.json"))]


@click.command()
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="Where the reports are.")
@click.option("--readme", type=click.Path(path_type=Path), default=ROOT / "README.md")
def main(results: Path, readme: Path) -> None:
    """Fills the table between the README's two markers."""
    reports = reports_in(results)
    if not reports:
        raise UsageError(f"there is no report in {results}", "lcm-compile bench --save FILE")
    write_atomically(readme, filled(readme.read_text(encoding="utf-8"), table(reports)))
    print(readme)


if __name__ == "__main__":
    main()
