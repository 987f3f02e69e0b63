"""What makes a second build a hit or a miss, and the reason that is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import factories
import pytest
from diffusers import StableDiffusionXLPipeline
from factories import load_modules
from safetensors.torch import load_file, save_file

from lcm_compile import BuildSpec, LoraSpec, build
from lcm_compile.builder import build as builder
from lcm_compile.builder import key, plan
from lcm_compile.bundles import store
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.errors import CheckpointError
from lcm_compile.system import cache


@pytest.fixture(scope="module")
def made(sdxl_checkpoint, new_store, tmp_path_factory):
    """A base, a LoRA and a store of their own, and the bundle in it; the files have settled."""
    folder = tmp_path_factory.mktemp("keys")
    base = shutil.copytree(sdxl_checkpoint, folder / "base")
    modules = load_modules(open_checkpoint(str(base)))
    lora = factories.write_lora(modules, folder / "lora.safetensors", "kohya")
    spec = BuildSpec(
        base=str(base), lcm_lora=LoraSpec(str(lora)), loras=(LoraSpec(str(lora), 0.5),), backend="torchscript"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCM_COMPILE_HOME", str(new_store(folder / "home")))
        build(spec)
    time.sleep(cache.SETTLED_NS / 1e9 + 0.1)
    return folder, spec


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """The spec of `made` on a copy of its files, with its store, as if it had been built from the copy."""
    folder, spec = made
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("home/bundles/*/manifest.json"):
        path.write_text(path.read_text().replace(str(folder), str(tmp_path)))
    monkeypatch.setenv("LCM_COMPILE_HOME", str(tmp_path / "home"))
    lora = str(tmp_path / "lora.safetensors")
    return replace(spec, base=str(tmp_path / "base"), lcm_lora=LoraSpec(lora), loras=(LoraSpec(lora, 0.5),))


def reasons(spec, hit=False, **options):
    """What a plan says; the bundle must stay as it was."""
    before = {p: p.stat().st_mtime_ns for p in store.bundles_folder().rglob("*")}
    made = plan.make_plan(spec, **options)
    assert made.hit == hit, made.reasons
    assert {p: p.stat().st_mtime_ns for p in store.bundles_folder().rglob("*")} == before
    return "\n".join(made.reasons)


def words(spec, *more):
    """The command line of a spec."""
    return (*spec.command().split()[1:], *more)


def test_the_same_spec_is_a_hit_and_says_why(command, copy):
    """The files are copies elsewhere: what they hold counts, not where they are."""
    start = time.perf_counter()
    code, out, err = command(*words(copy))
    assert time.perf_counter() - start < 3
    assert code == 0 and err.startswith("hit: all ") and "inputs are those of base-cpu-" in err
    assert open_bundle(store.recent()[0]).folder == store.bundles_folder() / out.strip()


def test_a_hit_needs_no_torch_and_no_three_seconds(copy):
    script = "import sys, lcm_compile.cli as c\ntry: c.main()\nfinally: assert 'torch' not in sys.modules"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *words(copy)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.startswith("hit"), done.stderr
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("spelling", ["base/", "base/../base", "./base", "link"])
def test_another_spelling_of_the_same_base_and_target_is_a_hit(copy, tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("base")
    reasons(replace(copy, base=spelling, gpu="CPU"), hit=True)


def edited(path):
    """One byte of a weight flipped in place; size, inode and mtime as before."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (status.st_mtime_ns, status.st_size)


WEIGHTS = [
    "base/unet/diffusion_pytorch_model.safetensors",
    "base/vae/diffusion_pytorch_model.safetensors",
    "base/text_encoder/model.safetensors",
    "base/text_encoder_2/model.safetensors",
]


@pytest.mark.parametrize("name", WEIGHTS)
def test_an_edit_of_the_same_size_and_time_is_a_miss(copy, tmp_path, name):
    time.sleep(cache.SETTLED_NS / 1e9 + 0.1)
    reasons(copy, hit=True)
    assert len(json.loads((cache.home() / "digests.json").read_text())) > 10  # they are remembered now
    edited(tmp_path / name)
    told = reasons(copy)
    assert f"{name.replace('base/', 'base ')} changed: " in told and told.count("changed") == 1


def test_an_edited_lora_is_a_miss(copy, tmp_path):
    time.sleep(cache.SETTLED_NS / 1e9 + 0.1)
    reasons(copy, hit=True)
    edited(tmp_path / "lora.safetensors")
    told = reasons(copy)
    assert "LoRA 1 changed: " in told and "LoRA 2 changed: " in told


@pytest.mark.parametrize(
    "name",
    [
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "tokenizer/merges.txt",
        "tokenizer_2/special_tokens_map.json",
        "model_index.json",
    ],
)
def test_an_edited_config_is_a_miss(copy, tmp_path, name):
    with (tmp_path / "base" / name).open("a") as file:
        file.write("\n")
    assert f"base {name} changed" in reasons(copy)


def test_a_weight_written_anew_with_the_same_values_is_a_hit(copy, tmp_path):
    path = tmp_path / WEIGHTS[0]
    save_file(load_file(path), path, {"format": "pt"})
    reasons(copy, hit=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"height": 32}, "shape changed: 1×64×64 → 1×32×64"),
        ({"batch": 2}, "shape changed: 1×64×64 → 2×64×64"),
        ({"precision": "bf16"}, "precision of step changed: fp32 → bf16"),
        ({"backend": "onnxruntime"}, "backend changed: torchscript → onnxruntime"),
        ({"loras": ()}, "LoRA 2 is gone"),
        ({"lcm_lora": None, "no_lcm": True}, "LoRA 1 weight changed: 1.0 → 0.5"),
        ({"gpu": "a10", "backend": "auto"}, "target changed: cpu → a10 8.6"),
    ],
)
def test_a_changed_request_is_a_miss(command, copy, change, told):
    if change.get("gpu") == "a10":
        pytest.importorskip("tensorrt_rtx")
    spec = replace(copy, **change)
    assert told in reasons(spec)
    code, out, _ = command(*words(spec, "--dry-run", "--json"))
    plan = json.loads(out)
    assert (code, plan["hit"]) == (0, False) and told in "\n".join(plan["reasons"])
    assert told in command(*words(spec, "--dry-run"))[1]


@pytest.mark.parametrize("weight", [0.25, -0.5, 0.5000000001])
def test_another_weight_of_a_lora_is_a_miss(copy, weight):
    spec = replace(copy, loras=(LoraSpec(copy.loras[0].source, weight),))
    assert f"LoRA 2 weight changed: 0.5 → {weight}" in reasons(spec)


def test_another_strength_of_a_part_is_a_miss(copy):
    """Of several that come to the same weights, each is a hit."""
    source = copy.loras[0].source
    for strengths, told in (
        ({"text": 0.25}, "0.5 → unet=0.5,text=0.25"),
        ({"mid_block": 0.0, "down_blocks.1": 1.0}, "0.5 → 0.5,down_blocks.1=1.0,mid_block=0.0"),
    ):
        spec = replace(copy, loras=(LoraSpec(source, 0.5, strengths),))
        assert reasons(spec).splitlines()[1:] == [f"LoRA 2 weight changed: {told}"]
    reasons(replace(copy, loras=(LoraSpec(source, 7.0, {"unet": 0.5, "text": 0.5}),)), hit=True)


def test_another_vae_is_a_miss_that_names_its_file_alone(copy, tmp_path):
    vae = shutil.copytree(tmp_path / "base" / "vae", tmp_path / "vae")
    reasons(replace(copy, vae=str(vae)), hit=True)
    edited(vae / "diffusion_pytorch_model.safetensors")
    told = reasons(replace(copy, vae=str(vae))).splitlines()
    assert len(told) == 2 and told[1].startswith("base vae/diffusion_pytorch_model.safetensors changed: ")


def shelve(planned):
    """A bundle in the store with the spec and the key of a plan, which is built from something else."""
    made = store.recent()[0]
    folder = shutil.copytree(made, store.bundles_folder() / planned.folder.name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"spec": asdict(planned.spec), "key": dict(planned.key)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_another_seed_of_random_weights_is_a_miss(copy):
    """Full-size weights, of which a plan makes none."""
    build(copy)  # a hit, the bundle used last
    spec = BuildSpec(base="sd15", weights="random:7", backend="torchscript")
    shelve(plan.make_plan(spec))
    reasons(spec, hit=True)
    told = reasons(replace(spec, weights="random")).splitlines()[1:]
    assert told == ["base weights changed: random, seed 7 → random, seed 0"]


def test_a_miss_is_compared_with_the_nearest_of_its_base_and_kind(command, copy, tmp_path, monkeypatch):
    """Not with what was built last, and not with a bundle of the same base that draws by another graph."""
    near = build(replace(copy, width=56))
    far = build(replace(copy, width=32, batch=2, lcm_lora=None, loras=(), no_lcm=True))
    monkeypatch.chdir(Path(copy.base).parent)
    told = reasons(replace(copy, base="./base", width=40)).splitlines()
    assert told[1:] in (["shape changed: 1×64×64 → 1×64×40"], ["shape changed: 1×64×56 → 1×64×40"])
    assert told[0] in (
        f"differs from {near.folder.name}:",
        f"differs from {plan.make_plan(copy).folder.name}:",
    )
    assert far.folder == store.recent()[0]
    none = "there is no bundle yet to compare with, of {} with {}"
    demo = reasons(BuildSpec(base="demo", backend="torchscript"))
    assert demo == none.format("demo", "its own weights and one graph for each stage")
    whole = replace(copy, backend="onnxruntime", whole_loop=True)
    assert reasons(whole) == none.format(copy.base, "its own weights and one graph for the complete loop")


def test_another_config_of_a_file_is_a_miss(copy, tmp_path):
    """Its own settings and tokenizers are what it takes from --config; the weights stay."""
    build(copy)
    folder = Path(copy.base)
    file = factories.write_original(
        StableDiffusionXLPipeline.from_pretrained(folder), tmp_path / "one.safetensors"
    )
    spec = replace(copy, base=str(file), config=str(folder))
    shelve(plan.make_plan(spec))
    reasons(spec, hit=True)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_start": 0.001}))
    with (folder / "tokenizer" / "merges.txt").open("a") as merges:
        merges.write("\n")
    told = [line.partition(" changed: ")[0] for line in reasons(spec).splitlines()[1:]]
    assert told == ["base configs", "base tokenizer/merges.txt"]


def test_a_dry_run_lists_all_that_differs_and_a_build_some(command, copy, tmp_path):
    old = plan.make_plan(copy).key
    base = factories.write_sdxl(Path(copy.base), seed=1)
    for text in base.glob("tokenizer*/*.json"):
        text.write_text(text.read_text() + "\n")
    spec = replace(copy, width=32, lcm_lora=None, loras=(), no_lcm=True)
    new = plan.make_plan(spec, tmp_path / "out").key
    differing = [name for name in {*old, *new} if old.get(name) != new.get(name)]
    assert len(differing) > 12
    words_of_all = words(spec, "--dry-run")
    told = json.loads(command(*words_of_all, "--json")[1])["reasons"]
    assert len(told) == 1 + len(differing)
    shown = command(*words_of_all)[1]
    assert all(f"{name} " in "\n".join(told) and f"{name} " in shown for name in differing)
    err = command(*words(spec))[2]
    assert f"and {len(differing) - 8} more inputs, which --dry-run lists" in err


@pytest.mark.parametrize("package", ["torch", "diffusers"])
def test_another_version_is_a_miss(copy, monkeypatch, package):
    real = key.installed_version
    monkeypatch.setattr(key, "installed_version", lambda p: f"{package} 9.9" if package in p else real(p))
    assert f"{package} version changed: " in reasons(copy)


def test_another_version_of_onnx_is_a_miss_for_onnx_graphs_alone(copy, monkeypatch):
    onnx = replace(copy, backend="onnxruntime")
    build(onnx)
    reasons(onnx, hit=True)
    real = key.installed_version
    for package in ("onnx", "onnxscript"):
        monkeypatch.setattr(
            key, "installed_version", lambda p, new=package: f"{new} 9.9" if new in p else real(p)
        )
        told = reasons(onnx)
        assert f"{package} version changed: " in told and told.count("changed") == 1
        reasons(copy, hit=True)


def test_dry_run_of_a_hit_and_of_force(command, copy):
    for more, hit, told in (((), True, "all "), (("--force",), False, "--force: ")):
        code, out, _ = command(*words(copy, "--dry-run", "--json", *more))
        plan = json.loads(out)
        assert (code, plan["hit"]) == (0, hit) and plan["reasons"][0].startswith(told)


def test_run_finds_the_bundle_of_a_base_and_target(command, copy, tmp_path, monkeypatch):
    """Whatever was fused into it; also when the base is gone."""
    monkeypatch.chdir(tmp_path)
    folder = command(*words(copy, "--width", "56"))[1].strip()
    for base in (copy.base, "base"):
        code, out, _ = command("run", "--base", base, "--gpu", "CPU", "--steps", "1", "--json")
        assert (code, json.loads(out)["engine"]) == (0, folder)
    shutil.rmtree(copy.base)
    assert command("run", "--base", copy.base, "--gpu", "cpu", "--steps", "1")[0] == 0


def test_run_refuses_a_bundle_whose_base_has_changed(command, copy, refused):
    assert command(*words(copy, "--width", "48"))[0] == 0
    path = Path(copy.base) / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    told = ["out of date", "base unet/diffusion_pytorch_model.safetensors changed"]
    refused(1, told, "run", "--base", copy.base, "--gpu", "cpu")


def test_a_base_that_changes_during_the_build_is_not_published(copy, tmp_path):
    path = Path(copy.base) / "unet" / "diffusion_pytorch_model.safetensors"

    def change(part, cost):
        if part == "check the engines":
            path.write_bytes(path.read_bytes()[:-1] + b"\x01")

    with pytest.raises(CheckpointError, match="changed while it was being built"):
        build(copy, tmp_path / "out", report=change)
    assert not (tmp_path / "out").exists()


def test_out_beside_a_bundle_in_the_store(copy, tmp_path):
    assert "there is no bundle at" in reasons(copy, out=tmp_path / "other")


def test_force_builds_again(command, copy):
    code, out, _ = command(*words(copy, "--json"))
    before = json.loads(out)
    time.sleep(1)  # `created` counts seconds
    code, out, _ = command(*words(copy, "--json", "--force"))
    after = json.loads(out)
    assert (code, before["hit"], after["hit"]) == (0, True, False)
    assert before["bundle"] == after["bundle"] and before["created"] != after["created"]


def test_what_misses_is_built_then_hits(command, copy):
    options = words(copy, "--width", "32", "--json")
    assert json.loads(command(*options)[1])["hit"] is False
    assert json.loads(command(*options)[1])["hit"] is True


def test_two_builds_at_once(copy):
    """One builds, the other waits for it and hits."""
    spec = replace(copy, width=40)
    start = [sys.executable, "-m", "lcm_compile", *words(spec, "--json")]
    two = [subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    outputs = [process.communicate(timeout=120) for process in two]
    assert [process.returncode for process in two] == [0, 0], outputs
    told = [json.loads(out) for out, _ in outputs]
    assert sorted(bundle["hit"] for bundle in told) == [False, True]
    assert told[0]["digest"] == told[1]["digest"]
    waited = next(err for (_, err), bundle in zip(outputs, told, strict=True) if bundle["hit"])
    assert waited.startswith("hit: all") or "another process built it" in waited
    assert not [p for p in store.bundles_folder().iterdir() if p.name.startswith(".")]


def test_what_another_built_since_the_plan_is_taken(copy, monkeypatch):
    """The plan is made again once the lock is held."""
    spec, told = replace(copy, width=48), []
    real, built = builder.publishing, []

    def publishing(folder, waiting):
        if not built:  # another process builds it between this one's plan and its lock
            built.append(True)
            build(spec)
        return real(folder, waiting)

    monkeypatch.setattr(builder, "publishing", publishing)
    bundle = build(spec, report=lambda part, cost: told.append(part))
    assert told == [] and bundle.manifest.spec.width == 48


# Of the package's folders, and of the files beside them, those whose code shapes neither graphs nor engines.
KEPT = {
    "output",
    "commands",
    "training",
    "demo",
    "benchmarks",
    "serving",
    "__init__.py",
    "__main__.py",
    "cli.py",
}


def test_the_key_holds_all_code_that_shapes_graphs_or_engines(copy, tmp_path):
    """Each folder, and each file beside them, of a copy of the package is edited by a byte in turn."""
    root = Path(__file__).resolve().parents[2]
    package = shutil.copytree(root / "lcm_compile", tmp_path / "site" / "lcm_compile")
    for name in ("export", "engines", "benchmarks"):
        shutil.copytree(root / name, package / name)
    new = [package / folder / "added.py" for folder in ("a_new_wing", "output", "serving")]
    for path in new:
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    script = f"""
import json, sys
from pathlib import Path
import lcm_compile.builder.key as key_module
from lcm_compile import BuildSpec, LoraSpec
from lcm_compile.builder import plan
assert Path(key_module.__file__).is_relative_to({str(tmp_path)!r})
spec = {copy!r}
def key():
    return dict(plan.make_plan(spec).key)
package, found = Path({str(package)!r}), {{}}
before = key()
for path in sorted(package.rglob("*.py")):
    inside = path.relative_to(package)
    name = inside.as_posix() if path.parent == package else inside.parent.as_posix()
    if name not in found or path.name == "added.py":
        text = path.read_bytes()
        path.write_bytes(text + b"#")
        after = key()
        assert {{k for k in before if before[k] != after[k]}} <= {{"lcm-compile"}}
        found[name] = before != after
        path.write_bytes(text)
assert key() == before
print(json.dumps(found))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"engines", "export", "a_new_wing", "spec.py", "output", "benchmarks", "cli.py"} <= found.keys()
    assert [name for name, is_a_miss in found.items() if is_a_miss == (name.split("/")[0] in KEPT)] == []
