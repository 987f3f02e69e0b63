"""Lower layers never import higher ones, and running loads nothing that only building needs."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcm_compile import _HOMES

ROOT = Path(__file__).parent.parent

# From the bottom up; a module may import its own layer and those below it.
LAYERS = [
    {"errors", "schema", "cost"},
    {"spec", "targets", "families", "unet_configs", "model_configs", "scheduler", "noise", "demo.world"},
    {"hub", "components", "tensor_files"},
    {"architectures"},
    {"folders"},
    {"single_file"},
    {"lora_kinds", "lora_names", "lora_folders", "lora_metadata"},
    {"lora_files"},
    {"lora_match"},
    {"apart", "shaping"},
    {"checkpoints", "store", "demo.model"},
    {"vae", "sharing", "lora_sources"},
    {"contracts"},
    {"random_base", "original_layout", "original_names"},
    {"loading", "files"},
    {"pipeline_folder"},
    {"lora_bases"},
    {"lora"},
    {"stages", "precision"},
    {"quantize"},
    {"training.spec", "training.consistency", "training.data"},
    {"training.encode", "training.state", "training.loop"},
    {"training.adapters", "training.full"},
    {"training.distill", "training.dreambooth", "training.count"},
    {"export", "engines"},
    {"manifest", "tokens", "loop"},
    {"bundle", "captured", "prompts"},
    {"pipeline", "shelf"},
    {"whole_loop"},
    {"runners"},
    {"keys"},
    {"exported", "measured"},
    {"parity", "plan"},
    {"lookup", "prepare", "fuse", "estimate"},
    {"compile", "doctor"},
    {"console", "images", "sheets"},
    {"grid", "benchmarks", "demo.training", "demo.pictures"},
    {"demo.train_vae"},
    {"demo.train"},
    {"reports", "lora_report"},
    {"inspection"},
    {"commands"},
    {"cli"},
    {"__main__"},
]


def sources():
    for path in sorted((ROOT / "lcm_compile").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "lcm_compile").with_suffix("").parts)
        yield name.removesuffix(".__init__"), path
    for folder in ("export", "engines", "benchmarks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            yield f"{folder}.{path.stem}".removesuffix(".__init__"), path


def layer_of(module):
    for height, layer in enumerate(LAYERS):
        if module in layer or module.split(".")[0] in layer:
            return height
    raise AssertionError(f"{module} is in no layer of tests/test_layers.py")


def project_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lcm_compile":
            inner = node.module.partition(".")[2]
            # `from lcm_compile import build` is an import of the module that `build` lives in.
            yield from [inner] if inner else [_HOMES.get(a.name, a.name) for a in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("lcm_compile."))


@pytest.mark.parametrize(
    ("module", "path"),
    [s for s in sources() if s[0] not in ("__init__", "demo", "training", "commands")],
    ids=lambda x: str(x)[-30:],
)
def test_imports_point_down(module, path):
    for imported in project_imports(path):
        if imported.startswith("__"):
            continue
        assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}, which is above it"


def test_export_and_engines_never_import_each_other():
    for module, path in sources():
        if module.startswith(("export", "engines")):
            other = "engines" if module.startswith("export") else "export"
            assert not any(i.startswith(other) for i in project_imports(path)), module


def modules_after(code):
    """Names of all modules loaded after running `code` in a new process."""
    script = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


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


def test_running_a_torchscript_bundle_loads_no_diffusers(sdxl_checkpoint, tmp_path):
    from lcm_compile import BuildSpec, build

    spec = BuildSpec(base=str(sdxl_checkpoint), no_lcm=True, backend="torchscript")
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
