"""What all tests run in, and the checkpoints and bundles that many of them share, each made once."""

# ruff: noqa: E402 - the libraries read the environment when they are imported

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import shutil
import signal
import tempfile

# No test sees the caller's settings or the caller's downloads.
SETTINGS = ("LCM_COMPILE_", "HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_", "OMP_", "COLUMNS", "CXX")
COLOURS = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE")
for name in [name for name in os.environ if name.startswith(SETTINGS) or name in COLOURS]:
    del os.environ[name]
HUB = tempfile.TemporaryDirectory(prefix="hub-")
os.environ["HF_HOME"] = HUB.name
os.environ["HF_HUB_OFFLINE"] = "1"  # tests of the hub serve one of their own, in processes of their own
# A shell lets its background jobs ignore Ctrl-C, and their children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Models this small lose more to a second thread than they gain.
os.environ["OMP_NUM_THREADS"] = "1"
# Of several workers (`pytest -n auto`) each keeps to a core: engines' threads would wait for another's.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import factories
import pytest

from lcm_compile import BuildSpec, build, cli
from lcm_compile.builder.export import export
from lcm_compile.builder.fastest_backend import SLOW_TO_BUILD, circumstances
from lcm_compile.engines import BACKENDS, cannot_build_from
from lcm_compile.engines.winograd import choice
from lcm_compile.export import EXPORTERS
from lcm_compile.precisions import Precision
from lcm_compile.targets import TARGETS

# What the imports made stays, and an export makes a million objects: to look through all of them again and
# again is a tenth of what a build costs.
gc.freeze()
gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope="module", autouse=True)
def collected():
    """What a file of tests leaves in circles, such as models and engines, does not stay in memory."""
    yield
    gc.collect()


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """A store of the tests' own. Backends and convolutions are timed already, so no test waits for it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "cpu.json").write_text(json.dumps(backend_timings()))
    direct = {
        choice.circumstances(floats): {choice.name_of(*size): "direct" for size in choice.SIZES}
        for floats in choice.FORMS
    }
    (folder / "winograd.json").write_text(json.dumps(direct))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCM_COMPILE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def new_store(home):
    """Makes an empty store at a path, in which nothing is timed either, and returns the path."""

    def make(path):
        path.mkdir(parents=True)
        for name in ("cpu.json", "winograd.json"):
            shutil.copy(home / name, path)
        return path

    return make


@pytest.fixture
def own_home(new_store, tmp_path, monkeypatch):
    """An empty store of a test's own."""
    own = new_store(tmp_path / "home")
    monkeypatch.setenv("LCM_COMPILE_HOME", str(own))
    return own


def backend_timings():
    """Milliseconds of every backend that can build for this CPU, as they are remembered once measured.

    TorchScript is the fastest, whatever this machine does at the time: its builds take a fifth of the others'
    time. Where it can't build, the first of the table is.
    """
    timings = {}
    for precision in Precision:
        for graph_format in (None, *EXPORTERS):
            able = [
                name
                for name in BACKENDS
                if name not in SLOW_TO_BUILD
                and cannot_build_from(name, TARGETS["cpu"], precision, graph_format) is None
            ]
            if len(able) > 1:
                timings[circumstances(able, precision)] = {
                    name: 1.0 if name == "torchscript" else 10.0 * place for place, name in enumerate(able, 1)
                }
    return timings


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Opens a folder that all workers share; within the block no other worker has it open."""
    own = tmp_path_factory.getbasetemp()
    parent = (own.parent if worker else own) / "shared"
    parent.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def opened(name):
        with (parent / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield parent / name

    return opened


@pytest.fixture(scope="session")
def shared_bundle(shared):
    """Builds a bundle that all workers share: it is a hit for those that come later."""

    def built(spec, name):
        with shared(name) as folder:
            return build(spec, folder)

    return built


@pytest.fixture(scope="session")
def sdxl_checkpoint(shared):
    with shared("sdxl_checkpoint") as folder:
        return folder if folder.exists() else factories.write_sdxl(folder)


@pytest.fixture(scope="session")
def sd15_checkpoint(shared):
    with shared("sd15_checkpoint") as folder:
        return folder if folder.exists() else factories.write_sd15(folder)


@pytest.fixture(scope="session")
def sdxl_bundle(sdxl_checkpoint, shared_bundle):
    """The folder of a plain SDXL bundle for ONNX Runtime on this CPU. Copy it before changing it."""
    spec = BuildSpec(base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="onnxruntime")
    return shared_bundle(spec, "sdxl").folder


@pytest.fixture(scope="session")
def sdxl_graphs(sdxl_checkpoint, shared):
    """The folder of an export to ONNX: the graphs of sdxl_bundle. Copy it before changing it."""
    spec = BuildSpec(base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", precision="fp32")
    with shared("sdxl_graphs") as folder:
        if not folder.exists():
            export(spec, folder)
    return folder


@pytest.fixture(scope="session", params=[False, True], ids=["staged", "whole loop"])
def pairs(request, sdxl_checkpoint, shared_bundle):
    """The folder of a bundle that draws two pictures at a time."""
    spec = BuildSpec(
        base=str(sdxl_checkpoint),
        no_lcm=True,
        few_step="lcm",
        backend="torchscript",
        batch=2,
        whole_loop=request.param,
    )
    return shared_bundle(spec, f"pairs-{request.param}").folder


@pytest.fixture(scope="session")
def a10_bundle(sdxl_checkpoint, shared_bundle):
    """A plain SDXL bundle for an A10, built without one."""
    pytest.importorskip("tensorrt_rtx")
    spec = BuildSpec(base=str(sdxl_checkpoint), gpu="a10", no_lcm=True, few_step="lcm")
    return shared_bundle(spec, "a10")


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
