"""Engines of a host program whose locale writes numbers with a comma are those of any other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

BUILD = """
import locale, sys
locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
from pathlib import Path
from lcm_compile import BuildSpec, build, load
base, backend, out = sys.argv[1:]
spec = BuildSpec(base=base, no_lcm=True, few_step="lcm", backend=backend)
bundle = build(spec, Path(out))  # compares it with torch
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


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "torchscript"])
def test_a_decimal_comma_changes_no_engine(locales, sd15_checkpoint, tmp_path, backend):
    pytest.importorskip("torch" if backend == "torchscript" else backend)
    words = [sys.executable, "-c", BUILD, str(sd15_checkpoint), backend, str(tmp_path / "bundle")]
    environment = {**os.environ, "LOCPATH": str(locales)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
