"""Checkpoints and bundles that many tests share, each made once."""

from __future__ import annotations

import factories
import pytest
from lcm_compile import BuildSpec, build


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
    """The folder of a plain SDXL bundle for this CPU. Copy it before changing it."""
    out = tmp_path_factory.mktemp("bundle") / "sdxl"
    return build(BuildSpec(base=str(sdxl_checkpoint), no_lcm=True), out).folder
