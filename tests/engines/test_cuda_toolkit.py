"""CUDA's headers and libcuda for torch's compiler, tried with the C++ compiler itself."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from lcm_compile.engines import aotinductor, cuda_toolkit, gpu
from lcm_compile.precisions import Precision
from lcm_compile.targets import find_target

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

H200 = find_target("h200")


def write_toolkit(folder, complete=True):
    """A toolkit as NVIDIA lays it out: its headers include others, which pip has in other packages."""
    for name in ("crt", "nv"):
        (folder / "include" / name).mkdir(parents=True)
    for name in cuda_toolkit.HEADERS:
        (folder / "include" / name).write_text("#pragma once\n")
    (folder / "include" / "cuda_runtime.h").write_text('#include "crt/host_config.h"\n')
    (folder / "include" / "cuda_fp16.h").write_text("#include <nv/target>\n")
    (folder / "include" / "cuda.h").write_text('extern "C" int cuInit(unsigned int);\n')
    if complete:
        (folder / "include" / "crt" / "host_config.h").touch()
        (folder / "include" / "nv" / "target").touch()
    return folder


def link(folder):
    """Links a library that calls the driver, as torch's compiler does; what it needs when it is loaded."""
    source = 'extern "C" int cuLaunchKernel(); int start() { return cuLaunchKernel(); }'
    linked = folder / "linked.so"
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(linked), "-lcuda"]
    if subprocess.run(command, input=source, text=True, capture_output=True).returncode:
        return None
    return subprocess.run(["readelf", "-d", linked], text=True, capture_output=True, check=True).stdout


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without a toolkit and without a driver's library. torch is for CUDA 99."""
    for name in ("CUDA_HOME", "CUDA_PATH", "LIBRARY_PATH", "CPATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    folders = os.environ["PATH"].split(os.pathsep)
    without = [folder for folder in folders if not Path(folder, "nvcc").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(without))
    if shutil.which("g++") is None or link(tmp_path):
        pytest.skip("here a toolkit lies beside the compiler")
    monkeypatch.setattr(cuda_toolkit, "USUAL_PLACES", (str(tmp_path / "usual" / "cuda-*"),))
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    return tmp_path


def test_headers_are_found_where_they_are_and_not_where_nvcc_is(nowhere, monkeypatch):
    """In some images `nvcc` is a script in /usr/local/bin, which torch takes for a toolkit in /usr/local."""
    shim = nowhere / "local" / "bin" / "nvcc"
    shim.parent.mkdir(parents=True)
    shim.write_text("#!/bin/sh\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join((str(shim.parent), os.environ["PATH"])))
    assert cuda_toolkit.find_toolkit() is None
    write_toolkit(nowhere / "usual" / "cuda-12.4", complete=False)
    assert cuda_toolkit.find_toolkit() is None
    usual = write_toolkit(nowhere / "usual" / "cuda-12.1")
    assert cuda_toolkit.find_toolkit() == usual
    monkeypatch.setenv("CUDA_HOME", str(nowhere / "local"))
    assert cuda_toolkit.find_toolkit() == usual
    monkeypatch.setenv("CUDA_HOME", str(write_toolkit(nowhere / "mine")))
    assert cuda_toolkit.find_toolkit() == nowhere / "mine"


@pytest.mark.parametrize("complete", [False, True])
def test_pips_headers_count_if_all_that_they_include_is_there(nowhere, monkeypatch, complete):
    """nvidia-cuda-runtime, which comes with torch, has neither crt/ nor nv/: two more packages have them."""
    own = write_toolkit(nowhere / "site" / "nvidia" / "cu99", complete)
    monkeypatch.syspath_prepend(nowhere / "site")
    assert cuda_toolkit.find_toolkit() == (own if complete else None)
    told = cuda_toolkit.missing_toolkit() or ""
    assert ("'nvidia-cuda-crt==99.1.*' 'nvidia-cuda-cccl==99.1.*'" in told) == (not complete)


def test_libcuda_is_linked_with_where_there_is_no_driver(nowhere, monkeypatch):
    """And is asked for by the name under which drivers have it."""
    toolkit = write_toolkit(nowhere / "usual" / "cuda-99")
    assert cuda_toolkit.missing_toolkit() is None
    monkeypatch.setenv("LIBRARY_PATH", str(nowhere / "mine"))
    before, home = dict(os.environ), cpp_extension.CUDA_HOME
    (nowhere / "scratch").mkdir()
    with cuda_toolkit.toolkit_for_torch(nowhere / "scratch"):
        assert "[libcuda.so.1]" in link(nowhere)
        assert os.environ["LIBRARY_PATH"].endswith(str(nowhere / "mine"))
        # The folders that torch gives to the compiler.
        assert str(toolkit / "include") in cpp_extension.include_paths("cuda")
    assert (dict(os.environ), cpp_extension.CUDA_HOME) == (before, home)
    assert link(nowhere) is None


def test_what_is_missing_for_a_gpu_is_told_before_anything_is_compiled(nowhere, monkeypatch, tmp_path):
    """Each by its name, in the order in which it would be missed."""
    monkeypatch.setattr(gpu, "gpu_here", lambda: ("NVIDIA H200", "9.0"))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    assert "pip install triton" in aotinductor.cannot_build(H200, Precision.FP16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or found(name))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python"))
    assert "Python.h" in aotinductor.cannot_build(H200, Precision.FP16)
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "Python.h").touch()
    reason = aotinductor.cannot_build(H200, Precision.FP16)
    assert "cuda_runtime.h" in reason and "CUDA_HOME" in reason
    write_toolkit(nowhere / "usual" / "cuda-99")
    assert aotinductor.cannot_build(H200, Precision.FP16) is None
