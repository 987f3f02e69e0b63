"""Engines of a host program whose locale writes numbers with a comma are those of any other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import factories
import pytest

BUILD = """
import locale, sys
locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
from pathlib import Path
from factories import build_from
from lcm_compile import BuildSpec, load
from lcm_compile.builder.export import export
base, graph_format, out, *backends = sys.argv[1:]
out = Path(out)
export(BuildSpec(base=base, no_lcm=True, few_step="lcm", precision="fp32"), out / "graphs", graph_format)
for backend in backends:
    _, bundle = build_from(out / "graphs", "cpu", backend, out / backend)  # compares it with torch
    load(bundle)("a red star")
    assert locale.localeconv()["decimal_point"] == ","
"""


@pytest.fixture(scope="module")
def locales(tmp_path_factory):
    """A folder with a locale that has a decimal comma."""
    folder = tmp_path_factory.mktemp("locales")
    command = ["localedef", "-i", "de_DE", "-f", "UTF-8", str(folder / "de_DE.UTF-8")]
    if shutil.which("localedef") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no such locale can be made here")
    return folder


@pytest.mark.parametrize(
    ("graph_format", "backends"), [("onnx", ["openvino", "onnxruntime"]), ("torchscript", ["torchscript"])]
)
def test_a_decimal_comma_changes_no_engine(locales, sd15_checkpoint, tmp_path, graph_format, backends):
    for backend in backends:
        pytest.importorskip("torch" if backend == "torchscript" else backend)
    words = [sys.executable, "-c", BUILD, sd15_checkpoint, graph_format, tmp_path, *backends]
    tests = str(Path(factories.__file__).parent)
    environment = {**os.environ, "LOCPATH": str(locales), "PYTHONPATH": tests}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
