"""Checkpoints and bundles that many tests share, each made once."""

from __future__ import annotations

import os
import shutil

# Models this small lose more to a second thread than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Of several workers (`pytest -n auto`) each keeps to a core: engines' threads would wait for another's.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import factories
import pytest

from lcm_compile import BuildSpec, build, cli


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """A store of the tests' own."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCM_COMPILE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def sdxl_checkpoint(tmp_path_factory):
    return factories.write_sdxl(tmp_path_factory.mktemp("sdxl") / "checkpoint")


@pytest.fixture(scope="session")
def sd15_checkpoint(tmp_path_factory):
    return factories.write_sd15(tmp_path_factory.mktemp("sd15") / "checkpoint")


@pytest.fixture(scope="session")
def sdxl_bundle(sdxl_checkpoint, tmp_path_factory):
    """The folder of a plain SDXL bundle for ONNX Runtime on this CPU. Copy it before changing it."""
    out = tmp_path_factory.mktemp("bundle") / "sdxl"
    return build(BuildSpec(base=str(sdxl_checkpoint), no_lcm=True, backend="onnxruntime"), out).folder


@pytest.fixture(scope="session")
def a10_bundle(sdxl_checkpoint, tmp_path_factory):
    """A plain SDXL bundle for an A10, built without one."""
    pytest.importorskip("tensorrt_rtx")
    spec = BuildSpec(base=str(sdxl_checkpoint), gpu="a10", no_lcm=True)
    return build(spec, tmp_path_factory.mktemp("a10") / "b")


@pytest.fixture
def bundle(sdxl_bundle, tmp_path):
    """A copy of sdxl_bundle, to be changed."""
    return shutil.copytree(sdxl_bundle, tmp_path / "bundle")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line; returns exit code, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["lcm-compile", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


@pytest.fixture
def refused(command):
    """Runs a command line that must fail with a plain message; returns stderr.

    The message names all of `told`, and the next thing to do where the words themselves were right;
    nothing is on stdout.
    """

    def run(code, told, *words):
        found, out, err = command(*words)
        assert (found, out) == (code, ""), err
        assert "Traceback" not in err and "internal error" not in err, err
        assert "error: " in err.lower() and (code == 2 or "\n  try: " in err), err
        for word in told if isinstance(told, list | tuple) else [told]:
            assert str(word) in err, err
        return err

    return run
