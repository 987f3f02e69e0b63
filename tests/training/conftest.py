"""The checkpoints that training is tested on, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import write_sd15, write_sdxl


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "sdxl": write_sdxl(folder / "sdxl"),
        "sd15": write_sd15(folder / "sd15", factor=4),
        "v": write_sd15(folder / "v", factor=4, prediction_type="v_prediction"),
    }
