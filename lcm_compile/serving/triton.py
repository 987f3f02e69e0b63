"""A model repository for NVIDIA's Triton Inference Server: `lcm-compile export BUNDLE --triton DIR`.

It has the bundle's stages, a model for each, for those backends that Triton has; or one model that draws
whole pictures, with this package in Triton's Python backend (`triton_model`). Configurations are in the text
form of `model_config.proto` (github.com/triton-inference-server/common).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lcm_compile.bundles.bundle import EngineBundle
from lcm_compile.bundles.manifest import MANIFEST, StageFile
from lcm_compile.errors import LcmCompileError, UsageError
from lcm_compile.graphs import ENCODE_IMAGE, TensorSpec

# Triton's names of the backends that it has: the others' engines are no files that it could load.
TRITON_BACKENDS = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "torchscript": "pytorch",
}
KERNELS = "/winograd.so"  # the end of the library's name in a bundle for OpenVINO
DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint64": "TYPE_UINT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bytes": "TYPE_STRING",
}
CONFIG = "config.pbtxt"
VERSION = "1"  # of a model, which is the name of the folder of its files
BUNDLE = "bundle"  # the folder of the bundle, in that one
BATCH_WAIT_US = 5000  # microseconds that a picture waits for others to share an engine's batch with
MODEL_FILE = "from lcm_compile.serving.triton_model import TritonPythonModel as TritonPythonModel\n"


@dataclass(frozen=True)
class PictureInput:
    """An input of the model that draws: the field of Request that it sets, and the shape for one picture.

    All but the prompt may be left out. `from_picture` are those of bundles that begin at a picture.
    """

    name: str
    field: str
    dtype: str
    meaning: str
    shape: tuple[int, ...] = (1,)
    from_picture: bool = False


PICTURE_INPUTS = (
    PictureInput("PROMPT", "prompt", "bytes", "What the picture shows, in UTF-8"),
    PictureInput("NEGATIVE_PROMPT", "negative_prompt", "bytes", "What it should not show"),
    PictureInput("PROMPT_SYNTAX", "prompt_syntax", "bytes", "plain, or webui, whose brackets weight words"),
    PictureInput("SEED", "seed", "uint64", "The seed of the noise; by default a random one"),
    PictureInput("STEPS", "steps", "int32", "Denoising steps"),
    PictureInput("GUIDANCE_SCALE", "guidance_scale", "float64", "Strength of guidance; 1 is none"),
    PictureInput("SAMPLER", "sampler", "bytes", "The sampler's name"),
    PictureInput("ETA", "eta", "float64", "The share of noise that tcd and ddim add again in each step"),
    PictureInput("INIT_IMAGE", "image", "uint8", "The picture to begin at, in RGB", (-1, -1, 3), True),
    PictureInput("MASK", "mask", "uint8", "White where that is repainted", (-1, -1), True),
    PictureInput("STRENGTH", "strength", "float64", "The share of the steps that are drawn", (1,), True),
)


def picture_inputs(bundle: EngineBundle) -> list[PictureInput]:
    """Returns the inputs of the model that draws with a bundle."""
    reads = any(stage.contract.name == ENCODE_IMAGE for stage in bundle.manifest.stages)
    return [own for own in PICTURE_INPUTS if reads or not own.from_picture]


def write_repository(bundle: EngineBundle, name: str, repository: Path, whole: bool) -> list[str]:
    """Writes a bundle's models into a model repository, and returns their names.

    The repository may exist, and have other models. With `whole` it is one model, `name`, that draws; else
    each stage is one, `name-stage`. Raises UsageError if Triton has no such backend, the bundle has
    ControlNets, or a model of that name exists, and LcmCompileError if the repository can't be written; then
    none of the models is there.
    """
    name = re.sub(r"[^\w.-]", "-", name)
    models = whole_model(bundle, name) if whole else stage_models(bundle, name)
    for model in models:
        if (repository / model).exists():
            raise UsageError(
                f"{repository} has a model {model} already",
                f"rm -r {repository / model}; or name this one: lcm-compile export NAME={bundle.folder}",
            )
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=repository, prefix=".") as partial:
            for model, write in models.items():
                folder = Path(partial, model)
                (folder / VERSION).mkdir(parents=True)
                write(folder)
            for model in models:
                Path(partial, model).rename(repository / model)
    except OSError as error:
        raise LcmCompileError(
            f"{repository} can't be written: {error.strerror}", "give another DIR"
        ) from error
    return [*models]


Writers = dict[str, Callable[[Path], None]]


def stage_models(bundle: EngineBundle, name: str) -> Writers:
    """Returns what writes the model of each stage into its folder, by the model's name."""
    own = bundle.manifest.backend
    if own not in TRITON_BACKENDS:
        raise UsageError(
            f"{bundle.folder} has engines of {own}, and Triton has no backend for them: it has "
            f"{', '.join(TRITON_BACKENDS)}",
            f"build with --backend {'onnxruntime' if bundle.manifest.target.is_cpu else 'tensorrt'}; "
            "or export with --triton-whole, which draws with this package in Triton's Python backend",
        )

    if any(name.endswith(KERNELS) for name in bundle.manifest.files):
        raise UsageError(
            f"{bundle.folder} has convolutions of its own, an extension that Triton's OpenVINO does not load",
            "build with --without winograd; or export with --triton-whole, which draws with this package in "
            "Triton's Python backend",
        )

    def writer(stage: StageFile, model: str) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            copy_files(engine_files(bundle, stage), folder / VERSION)
            (folder / CONFIG).write_text(stage_config(bundle, stage, model), encoding="utf-8")

        return write

    named = {f"{name}-{stage.contract.name}": stage for stage in bundle.manifest.stages}
    return {model: writer(stage, model) for model, stage in named.items()}


def engine_files(bundle: EngineBundle, stage: StageFile) -> dict[str, Path]:
    """Returns the files of a stage's engine by name: those of one stem, as `step.xml` and `step.bin`."""
    stem = Path(stage.file).with_suffix("")
    names = [name for name in bundle.manifest.files if Path(name).parent == stem.parent]
    return {Path(n).name: bundle.path(n) for n in names if Path(n).name.split(".")[0] == stem.name}


def whole_model(bundle: EngineBundle, name: str) -> Writers:
    """Returns what writes the model that draws whole pictures into its folder, by the model's name."""
    if bundle.manifest.pipeline.control_weights:
        raise UsageError(
            f"{bundle.folder} has ControlNets, whose pictures the model for Triton does not take",
            "export it without --triton-whole: a model for each stage",
        )

    def write(folder: Path) -> None:
        inside = folder / VERSION / BUNDLE
        copy_files({file: bundle.path(file) for file in bundle.manifest.files}, inside)
        copy_files({MANIFEST: bundle.folder / MANIFEST}, inside)
        (folder / VERSION / "model.py").write_text(MODEL_FILE, encoding="utf-8")
        (folder / CONFIG).write_text(whole_config(bundle, name), encoding="utf-8")

    return {name: write}


def copy_files(files: dict[str, Path], folder: Path) -> None:
    """Puts files into a folder: as hard links where the disk has them, because engines are large."""
    for name, path in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), place)
        except OSError:
            shutil.copyfile(path, place)


def stage_config(bundle: EngineBundle, stage: StageFile, name: str) -> str:
    """Returns a stage's configuration. Its shapes are the graph's, which has the batch in them."""
    backend = TRITON_BACKENDS[bundle.manifest.backend]
    # Triton's PyTorch backend takes tensors by their places, which names tell after two underscores.
    placed = backend == "pytorch"
    return "\n".join(
        [
            f'name: "{name}"',
            f'backend: "{backend}"',
            f'default_model_filename: "{Path(stage.file).name}"',
            "max_batch_size: 0",
            *tensor_lines("input", stage.contract.inputs, placed),
            *tensor_lines("output", stage.contract.outputs, placed),
            instances(bundle),
            "",
        ]
    )


def tensor_lines(side: str, specs: Sequence[TensorSpec], placed: bool) -> list[str]:
    """Returns the lines of a stage's inputs or outputs, each with its meaning as a comment."""
    lines = []
    for i, spec in enumerate(specs):
        name = f"{spec.name}__{i}" if placed else spec.name
        # A shape can't be empty in Triton: a scalar is a vector of one number that is reshaped.
        reshape = "" if spec.shape else " reshape { shape: [ ] }"
        shape = ", ".join(map(str, spec.shape or (1,)))
        lines += comment(spec.meaning)
        lines.append(
            f'{side} {{ name: "{name}" data_type: {DATA_TYPES[spec.dtype]} dims: [ {shape} ]{reshape} }}'
        )
    return lines


def whole_config(bundle: EngineBundle, name: str) -> str:
    """Returns the configuration of the model that draws: shapes are those of one picture of a batch."""
    shape = bundle.manifest.pipeline.shape
    lines = [f'name: "{name}"', 'backend: "python"', f"max_batch_size: {shape.batch}"]
    for own in picture_inputs(bundle):
        optional = "" if own.field == "prompt" else " optional: true"
        dims = ", ".join(map(str, own.shape))
        lines += comment(own.meaning)
        lines.append(
            f'input {{ name: "{own.name}" data_type: {DATA_TYPES[own.dtype]} dims: [ {dims} ]{optional} }}'
        )
    lines += [
        *comment("The picture in RGB"),
        f'output {{ name: "IMAGE" data_type: TYPE_UINT8 dims: [ {shape.height}, {shape.width}, 3 ] }}',
        *comment("The seed that it was drawn with"),
        'output { name: "SEED" data_type: TYPE_UINT64 dims: [ 1 ] }',
        instances(bundle),
    ]
    if shape.batch > 1:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {BATCH_WAIT_US} }}")
    return "\n".join([*lines, ""])


def comment(text: str) -> list[str]:
    """Returns a text as lines of comments."""
    return [f"# {line}" for line in text.splitlines()]


def instances(bundle: EngineBundle) -> str:
    """Returns the line that says where a model runs: one on each GPU, or one on the processor."""
    kind = "KIND_CPU" if bundle.manifest.target.is_cpu else "KIND_GPU"
    return f"instance_group {{ count: 1 kind: {kind} }}"
