"""A rival: stable-diffusion.cpp, which is in the wheel of cyllama, with its own loop and tokenizer.

Other packages of it are compiled when they are installed. It reads a checkpoint of one file in the original
layout, in fp16, or quantized in its own format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lcm_compile.benchmarks.measure.worker import Draw, Drawn
from lcm_compile.errors import BackendError
from lcm_compile.lora.fuse import fuse
from lcm_compile.spec import BuildSpec, Shape

# A rule for no weight: without any, the converter of cyllama 0.2.18 reads a null pointer.
NO_RULE = "^no weight$=f16"


def write_f16(folder: Path, work: Path) -> Path:
    """Writes the weights of a diffusers folder as one file in `work`, if it is not there, and returns it."""
    file = work / "sd-cpp.safetensors"
    if not file.exists():
        fuse(BuildSpec(str(folder), no_lcm=True), file, "fp16")
    return file


def write_q8(folder: Path, work: Path) -> Path:
    """Writes the weights of a diffusers folder with 8 bits each, as q8_0, and returns the file."""
    from cyllama.sd import SDType, convert_model, set_progress_callback

    set_progress_callback(lambda *_: None)  # or it draws a bar on stdout
    file = work / "sd-cpp-q8_0.gguf"
    convert_model(str(write_f16(folder, work)), str(file), output_type=SDType.Q8_0, tensor_type_rules=NO_RULE)
    return file


def draw_with_file(file: Path, shape: Shape, threads: int, how: Mapping[str, Any]) -> Draw:
    """Loads a checkpoint of one file, and returns the function that draws one picture at a time with it.

    `how` has the number of steps and the guidance scale. The noise is that of torch's generator. Raises
    BackendError if the library refuses the file.
    """
    from cyllama.sd import RngType, SampleMethod, Scheduler, SDContext, SDContextParams

    settings = SDContextParams()
    settings.model_path, settings.n_threads, settings.rng_type = str(file), threads, RngType.CPU
    if hasattr(settings, "free_params_immediately"):  # cyllama 0.2, where the second picture has no weights
        settings.free_params_immediately = False
    try:
        context = SDContext(settings)
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"stable-diffusion.cpp does not read these weights: {error}") from error

    def draw(prompt: str, seed: int) -> Drawn:
        [picture] = context.generate(
            prompt,
            width=shape.width,
            height=shape.height,
            seed=seed,
            sample_steps=how["steps"],
            cfg_scale=how["guidance_scale"],
            sample_method=SampleMethod.LCM,
            scheduler=Scheduler.LCM,
        )
        return Drawn(np.array(picture.to_numpy())[None], {})

    return draw
