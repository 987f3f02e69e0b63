"""Packs what the probe needs on a machine with a GPU that can download nothing: at most 60 MB.

`python -m lcm_compile.benchmarks.gpu.kit --out gpu-kit.tar.gz --bundle BUNDLE`

That is this package, diffusers and small packages that both want, and bundles without the weights that lie in
files of their own. The machine has torch, transformers and Pillow already. There:
`sh gpu-kit/run.sh RESULTS`.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.errors import UsageError

MOST_BYTES = 60_000_000
# What machines with torch, transformers and Pillow may lack, of what diffusers and the probe need.
SMALL = (
    *(
        "importlib_metadata",
        "zipp",
        "lazy_importer",
        "requests",
        "urllib3",
        "charset_normalizer",
        "platformdirs",
    ),
    *("httpx", "httpcore", "h11", "anyio", "certifi", "idna", "click", "rich", "pygments", "markdown_it_py"),
    *("mdurl",),
)
HEADER = ".header"  # the ending of a file that has the header of a file of weights alone
SMALL_ARRAYS = ".small"  # the ending of a file that has its small arrays
LEAST_LEFT_OUT = 1 << 20  # bytes of a file of weights that is worth leaving out
# The most bytes of a small array, which travels: those are norms' weights, scales, and constants of a graph.
MOST_SMALL = 8 << 10
# The types of weights that are made random, as safetensors and as torch names them.
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F8_E4M3": "float8_e4m3fn"}
SCALE = 0.02  # the standard deviation of random vectors
RUN = """#!/bin/sh
# Installs what is missing here, and runs the probe: sh run.sh RESULTS [OPTIONS]
set -e
here=$(dirname "$0"); results=$1; shift
pip="python3 -m pip install -q --no-deps --no-index --find-links $here/wheels"
$pip --force-reinstall lcm-compile
python3 -c "import diffusers" 2>/dev/null || $pip diffusers
for name in {small}; do
  python3 -c "import importlib.metadata as m; m.version('$name')" 2>/dev/null || $pip "$name"
done
python3 -m lcm_compile.benchmarks.gpu.probe --results "$results" {bundles} "$@"
"""


def strip(folder: Path, copy: Path) -> None:
    """Copies a bundle; of each large file of weights (safetensors) only the header and the small arrays.

    If there is one, the files of the proof's calls are empty: they are those of other weights.
    """
    large = [path for path in folder.rglob("*.safetensors") if path.stat().st_size >= LEAST_LEFT_OUT]
    calls = list(folder.glob("proof/*.npz")) if large else []

    def left_out_of(within: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(within, name) in {*large, *calls}]

    shutil.copytree(folder, copy, ignore=left_out_of)
    for path in calls:
        (copy / path.relative_to(folder)).touch()
    for path in large:
        there = copy / path.relative_to(folder)
        header, entries = read_header(path)
        there.with_name(path.name + HEADER).write_bytes(header)
        with path.open("rb") as file, there.with_name(path.name + SMALL_ARRAYS).open("wb") as small:
            for start, end in (entry["data_offsets"] for entry in entries):
                if end - start <= MOST_SMALL:
                    file.seek(len(header) + start)
                    small.write(file.read(end - start))


def read_header(path: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Returns the header of a safetensors file, and what it says of each array, in the file's order."""
    with path.open("rb") as file:
        size = file.read(8)
        header = size + file.read(int.from_bytes(size, "little"))
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    return header, sorted(entries.values(), key=lambda entry: entry["data_offsets"][0])


def left_out(folder: Path) -> list[Path]:
    """Returns the headers of the files of weights that `strip` has left out of a bundle."""
    return sorted(folder.rglob(f"*.safetensors{HEADER}"))


def fill(folder: Path, copy: Path) -> None:
    """Copies a bundle that `strip` made, with random weights where they were left out, made on the GPU.

    The manifest has their digests then.
    """
    from lcm_compile.bundles.bundle import list_files

    shutil.copytree(folder, copy)
    for header in left_out(copy):
        path = header.with_name(header.name.removesuffix(HEADER))
        small = path.with_name(path.name + SMALL_ARRAYS)
        write_random(header, small, path)
        header.unlink()
        small.unlink()
    manifest, _ = read_manifest(copy)
    replace(manifest, files=list_files(copy)).write(copy)


def write_random(header: Path, small: Path, path: Path) -> None:
    """Writes a file of weights with this header and these small arrays, and random numbers for the others.

    Matrices and kernels have the variance 1 / fan-in, so that activations stay in range; in fp8 they spread
    over its range, as their scale expects. What is not in FLOATS is zero.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    content, entries = read_header(header)
    with path.open("wb") as file, small.open("rb") as kept:
        file.write(content)
        for entry in entries:
            (start, end), shape = entry["data_offsets"], entry["shape"]
            if end - start <= MOST_SMALL:
                file.write(kept.read(end - start))
            elif dtype := FLOATS.get(entry["dtype"]):
                weights, to = torch.empty(shape, device=device), getattr(torch, dtype)
                if entry["dtype"] == "F8_E4M3":
                    largest = torch.finfo(to).max
                    weights.uniform_(-largest, largest, generator=generator)
                else:
                    deviation = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else SCALE
                    weights.normal_(0, deviation, generator=generator)
                raw = weights.to(to).cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
                file.write(raw)
            else:
                file.write(bytes(end - start))


def pack(out: Path, bundles: tuple[Path, ...]) -> None:
    """Writes the archive. Raises UsageError if it is not run in a clone, or if the archive is too large."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        raise UsageError("the kit is packed from a clone of the repository", "make gpu-kit, in a clone")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "gpu-kit"
        wheels = folder / "wheels"
        pip = [sys.executable, "-m", "pip"]
        subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", wheels, root], check=True)
        wanted = [f"{name}=={version(name)}" for name in ("diffusers", *SMALL)]
        # For any machine, and any version of Python that it may have.
        anywhere = ["--no-deps", "--only-binary", ":all:", "--platform", "any"]
        subprocess.run([*pip, "download", "-q", *anywhere, "-d", wheels, *wanted], check=True)
        for bundle in bundles:
            strip(bundle, folder / "bundles" / bundle.resolve().name)
        named = " ".join(f'--bundle "$here/bundles/{bundle.resolve().name}"' for bundle in bundles)
        (folder / "run.sh").write_text(RUN.format(small=" ".join(SMALL), bundles=named))
        packed = Path(scratch) / "gpu-kit.tar.gz"
        with tarfile.open(packed, "w:gz") as archive:
            archive.add(folder, folder.name)
        if (size := packed.stat().st_size) > MOST_BYTES:
            files = (path for path in folder.rglob("*") if path.is_file())
            largest = max(files, key=lambda path: path.stat().st_size).relative_to(folder)
            raise UsageError(
                f"the kit would have {size / 1e6:.0f} MB, and can have {MOST_BYTES / 1e6:.0f}",
                f"fewer bundles, or smaller ones: {largest} is the largest file",
            )
        shutil.move(packed, out)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("gpu-kit.tar.gz"), show_default=True)
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A bundle that travels without its weights; repeatable.",
)
def main(out: Path, bundles: tuple[Path, ...]) -> None:
    """Pack the probe for a machine with a GPU."""
    try:
        pack(out, bundles)
    except UsageError as error:
        raise click.ClickException(f"{error.message}\ntry: {error.hint}") from error
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
