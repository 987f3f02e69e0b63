"""The layout: which folder may import which, and that running loads nothing that only building needs."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from lcm_compile import _HOMES

ROOT = Path(__file__).parent.parent

# What every folder may import, as it may `system`: the files that lie in no folder, and the samplers.
GROUND_FILES = {"errors", "version", "precisions", "graphs", "targets", "spec", "scheduler"}
GROUND = GROUND_FILES | {"samplers"}
# The folders that each folder may import besides itself.
MAY_IMPORT = {
    "system": set(),
    "samplers": set(),
    "checkpoint": set(),
    "engines": set(),
    "demo": {"checkpoint"},
    "lora": {"checkpoint"},
    "stages": {"checkpoint"},
    "export": {"stages"},
    "bundles": {"engines"},
    "pipeline": {"bundles", "engines", "lora", "checkpoint"},
    "proof": {"pipeline", "bundles", "engines", "stages"},
    "training": {"pipeline", "stages", "lora", "checkpoint", "demo"},
    "builder": {"proof", "pipeline", "bundles", "engines", "export", "stages", "lora", "checkpoint"},
    "output": {"builder", "pipeline", "bundles", "lora", "checkpoint"},
}
MAY_IMPORT["serving"] = {"output", "pipeline", "bundles"}
MAY_IMPORT["benchmarks"] = MAY_IMPORT.keys() - {"training", "export"}
MAY_IMPORT["commands"] = {*MAY_IMPORT}
# The files that open the package: they import the commands, or what `import lcm_compile` offers.
DOORS = {"__init__", "__main__", "cli"}


def sources():
    """Every module of the package, by its name in it, with its file."""
    for folder, inside in (("lcm_compile", ()), *((f, (f,)) for f in ("export", "engines", "benchmarks"))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join((*inside, *path.relative_to(ROOT / folder).with_suffix("").parts))
            yield name.removesuffix(".__init__"), path


FILES = dict(sources())


def imports_of(path):
    """The modules of the package that a file imports, anywhere in it, for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lcm_compile":
            inner = node.module.partition(".")[2]
            for alias in node.names:
                # `from lcm_compile import build` is an import of the module that `build` lives in.
                name = _HOMES.get(alias.name, alias.name) if not inner else f"{inner}.{alias.name}"
                yield name if name in FILES else inner
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("lcm_compile."))


IMPORTS = {name: {i for i in imports_of(path) if i and i != name} for name, path in FILES.items()}


def place_of(module):
    """A module's folder; its own name where it lies in none."""
    return module.split(".")[0]


def test_every_folder_has_its_row():
    folders = {name.split(".")[0] for name in FILES if "." in name}
    assert folders == MAY_IMPORT.keys()
    alone = {name for name, path in FILES.items() if path.parent == ROOT / "lcm_compile"}
    assert alone == GROUND_FILES | DOORS


@pytest.mark.parametrize("module", sorted(FILES.keys() - DOORS))
def test_a_file_imports_only_what_its_folder_may(module):
    here = place_of(module)
    above = {"system", *GROUND} if here in GROUND else {here, "system", *GROUND, *MAY_IMPORT[here]}
    for imported in IMPORTS[module]:
        assert place_of(imported) in above, f"{module} imports {imported}"


def circle_in(graph):
    """The nodes of a circle, or None."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]


def test_no_circle_between_files():
    assert circle_in({name: found for name, found in IMPORTS.items() if name not in DOORS}) is None


def test_no_circle_between_folders():
    graph = {}
    for name, found in IMPORTS.items():
        if name not in DOORS:
            graph.setdefault(place_of(name), set()).update(place_of(i) for i in found)
    assert circle_in({place: found - {place} for place, found in graph.items()}) is None


def modules_after(code):
    """Names of all modules loaded after running `code` in a new process, and of their outermost packages."""
    script = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    names = done.stdout.split()
    return {*names, *(name.split(".")[0] for name in names)}


def test_running_an_onnxruntime_bundle_loads_neither_torch_nor_diffusers(sdxl_bundle, tmp_path):
    code = f"""
import sys
from lcm_compile.cli import cli
cli.main(["run", "a star", "--engine", {str(sdxl_bundle)!r}, "--out", {str(tmp_path / "star.png")!r},
          "--guidance-scale", "1.5"], standalone_mode=False)
"""
    loaded = modules_after(code)
    assert (tmp_path / "star.png").is_file()
    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "peft", "onnx", "onnxscript"}
    # Nor what only a build needs, or only a picture that is no PNG: a tenth of the time to the first one.
    assert not {name for name in loaded if name.startswith(("lcm_compile.builder", "lcm_compile.checkpoint"))}
    assert not loaded & {"urllib.request", "ssl", "xml.etree.ElementTree"}


def test_engines_begin_to_load_before_what_draws_with_them_is_imported(sdxl_bundle, tmp_path):
    code = f"""
import sys

class AsEnginesLoad:
    def find_spec(self, name, *_):
        if name == "onnxruntime":
            print("before", *(name for name in sys.modules if "lcm_compile." in name or name == "PIL"))

sys.meta_path.insert(0, AsEnginesLoad())
from lcm_compile.cli import cli
words = ["run", "a star", "--engine", {str(sdxl_bundle)!r}, "--out", {str(tmp_path / "star.png")!r}]
cli.main([*words, "--seed", "7"], standalone_mode=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    [_, *imported] = next(line for line in done.stdout.splitlines() if line.startswith("before")).split()
    assert "lcm_compile.engines.onnxruntime" in imported
    assert not {"lcm_compile.pipeline.pipeline", "lcm_compile.samplers", "PIL"} & {*imported}
    assert not {"lcm_compile.commands.build", "lcm_compile.commands.bench"} & {*imported}


def test_running_a_torchscript_bundle_loads_no_diffusers(sdxl_checkpoint, tmp_path):
    from lcm_compile import BuildSpec, build

    spec = BuildSpec(base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="torchscript")
    bundle = build(spec, tmp_path / "bundle").folder
    loaded = modules_after(f"from lcm_compile import load; load({str(bundle)!r})('a star', seed=1)")
    assert "torch" in loaded
    assert not loaded & {"diffusers", "transformers", "peft"}


def test_import_is_free():
    loaded = modules_after("import lcm_compile, lcm_compile.cli")
    assert not loaded & {"torch", "numpy", "diffusers", "onnxruntime", "tensorrt", "tensorrt_rtx", "rich"}


def test_help_takes_a_third_of_a_second():
    def seconds(*command):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        return time.perf_counter() - start

    # The best of several: what the command costs, not what else the machine is doing.
    assert min(seconds(sys.executable, "-m", "lcm_compile", "--help") for _ in range(7)) < 0.3
