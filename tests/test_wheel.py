"""What a user installs: every module, the demo model, under its size, and no stray top-level package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what git would ship, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_holds_every_module(wheel):
    """Of every folder, however deep: setuptools ships those alone that pyproject.toml lists."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("lcm_compile", "export", "engines", "benchmarks"):
        inside = folder if folder == "lcm_compile" else f"lcm_compile/{folder}"
        paths = [path for path in (ROOT / folder).rglob("*.py") if "results" not in path.parts]
        assert len(paths) > 5
        for path in paths:
            assert f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert "lcm_compile/py.typed" in names
    assert any(name.endswith("/features.safetensors") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"lcm_compile"}


def test_holds_the_demo_model_under_12_mb(wheel):
    infos = [i for i in zipfile.ZipFile(wheel).infolist() if i.filename.startswith("lcm_compile/demo/")]
    names = {i.filename.removeprefix("lcm_compile/demo/") for i in infos}
    shipped = {str(p.relative_to(ROOT / "lcm_compile/demo")) for p in weights()}
    assert shipped <= names
    assert {"lcm_lora.safetensors", "zebra_lora.safetensors"} <= set(names)
    assert "checkpoint/model_index.json" in names
    assert sum(i.file_size for i in infos if i.filename.endswith(".safetensors")) < 12_000_000


def weights():
    return (ROOT / "lcm_compile" / "demo" / "checkpoint").rglob("*.*")


def test_names_its_command(wheel):
    archive = zipfile.ZipFile(wheel)
    entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "lcm-compile = lcm_compile.__main__:main" in archive.read(entry).decode()
