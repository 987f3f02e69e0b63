"""The rivals that a bundle is timed against: the same weights, with the LoRAs fused, run by other means.

Each `draw_…` function with a folder is called in a worker's process. It loads the pipeline there, and returns
the function that draws from a prompt and a seed to 8-bit RGB.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_compile.benchmarks.measure.peers import cannot_draw
from lcm_compile.benchmarks.measure.worker import Draw, Drawn, Maker
from lcm_compile.bundles.bundle import EngineBundle, open_bundle
from lcm_compile.bundles.manifest import MANIFEST, BundleManifest, PipelineSettings
from lcm_compile.checkpoint.checkpoint import SCHEDULER
from lcm_compile.checkpoint.controlnet import controls_of
from lcm_compile.checkpoint.open import open_base
from lcm_compile.errors import BackendError, UsageError, unknown_name
from lcm_compile.graphs import CONTROLS, MASKED
from lcm_compile.pipeline.control_picture import sample_picture
from lcm_compile.spec import CHUNK_TOKENS, BuildSpec, Shape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

EULER = {"sampler": "euler", "steps": 25, "guidance_scale": 7.5, "eta": None}  # ordinary pictures
SELF = "ours"  # the name of the measured bundle, where rivals have theirs
INSTALL_OPENVINO = "pip install openvino"
INSTALL_RIVALS = "pip install 'lcm-compile[rivals]'"


@dataclass(frozen=True)
class Setup:
    """The settings that all rivals share.

    `precision` is the floating-point type of the bundle's engines: "fp32", "fp16" or "bf16". `pipeline` has
    what the bundle draws with by default. `controlnets` are the diffusers folders of its ControlNets, which
    all read the picture of proofs.
    """

    shape: Shape
    precision: str
    threads: int
    gpu: bool
    pipeline: PipelineSettings
    controlnets: tuple[Path, ...] = ()

    @property
    def drawing(self) -> dict[str, Any]:
        """The sampler, the steps, the guidance scale and η of the bundle's pictures."""
        return self.pipeline.drawing()


@dataclass(frozen=True)
class Rival:
    """A way to run a diffusers pipeline. `load(folder, setup)` loads it and returns the function that draws.

    `few_step` says whether the few-step LoRA is fused, so that the rival draws our picture. `starts_cold`
    is false for a rival that would have to compile in each new process, which nobody does in practice; cold
    starts leave it out, and so does the memory, because its peak includes the compiler. `compiled` says that
    the folder that it draws with is a bundle of ours, of the base without few-step weights.

    `package` is the module that it needs, and `install` the command that installs it. Such a rival runs on
    processors only, and without ControlNets. A peer has a loop of its own, and does not read diffusers'
    folders: `write(folder, work, setup)` writes the weights of one into the folder `work` in a layout that it
    reads, in a process of its own, and returns the path that is then loaded.
    """

    load: Callable[[Path, Setup], Draw]
    few_step: bool = True
    starts_cold: bool = True
    compiled: bool = False
    package: str | None = None
    install: str = INSTALL_RIVALS
    write: Callable[[Path, Path, Setup], Path] | None = None


def draw_with_bundle(folder: Path, drawing: Mapping[str, Any] | None = None) -> Draw:
    """Draws with a bundle, by default as it does by default.

    Its prompt cache is off, because diffusers encodes every prompt too.
    """
    from lcm_compile.pipeline.load import load
    from lcm_compile.pipeline.request import Request

    pipeline = load(folder, prompt_cache=0)
    settings = pipeline.settings
    how = drawing or settings.drawing()
    control = (sample_picture(settings.shape),) * len(settings.control_weights)

    def draw(prompt: str, seed: int) -> Drawn:
        batch = settings.shape.batch
        drawn = pipeline.draw(Request(prompt, seed, num_images=batch, control=control, **how))
        times = {name: ms for name, ms in drawn.ms.items() if name not in ("total", "load")}
        stages = {name: sum(ms) if isinstance(ms, list) else ms for name, ms in times.items()}
        return Drawn(drawn.pictures, stages, drawn.cuda_graph)

    return draw


def open_diffusers(folder: Path, dtype: str, setup: Setup) -> DiffusionPipeline:
    """Loads a diffusers pipeline with the bundle's sampler. `dtype` is the name of a torch dtype."""
    import diffusers
    import torch
    from diffusers import DiffusionPipeline

    from lcm_compile.checkpoint.load import quiet_libraries
    from lcm_compile.checkpoint.write_folder import make_scheduler

    torch.set_num_threads(setup.threads)
    kind, options = DiffusionPipeline, {"torch_dtype": getattr(torch, dtype)}
    with quiet_libraries():
        if setup.controlnets:
            kind = controlnet_pipeline(folder)
            nets = [diffusers.ControlNetModel.from_pretrained(net, **options) for net in setup.controlnets]
            options["controlnet"] = nets[0] if len(nets) == 1 else nets
        pipe = kind.from_pretrained(folder, **options)
    pipe.scheduler = make_scheduler(setup.pipeline.sampler, setup.pipeline.scheduler)
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "watermark"):
        pipe.watermark = None
    return pipe.to("cuda" if setup.gpu else "cpu")


def controlnet_pipeline(folder: Path) -> Any:
    """Returns diffusers' class of pipelines with ControlNets for the base in a folder."""
    import diffusers

    if (folder / "text_encoder_2").is_dir():
        return diffusers.StableDiffusionXLControlNetPipeline
    return diffusers.StableDiffusionControlNetPipeline


def draw_with_diffusers(
    pipe: DiffusionPipeline, setup: Setup, drawing: Mapping[str, Any] | None = None
) -> Draw:
    """Returns the function that draws with a loaded pipeline. On a processor it times the stages too."""
    import torch

    # On a GPU the host runs ahead of the computation, so that its clock can't time single stages.
    stages = {} if setup.gpu else time_stages(pipe)
    how = drawing or setup.drawing
    timesteps, options = setup.pipeline.scheduler.timesteps, dict[str, Any]()
    if timesteps and len(timesteps) == how["steps"] and drawing is None:
        options["timesteps"] = list(timesteps)
    if count := len(setup.controlnets):
        pictures, weights = [sample_picture(setup.shape).image] * count, [*setup.pipeline.control_weights]
        options["image"] = pictures if count > 1 else pictures[0]
        options["controlnet_conditioning_scale"] = weights if count > 1 else weights[0]

    def draw(prompt: str, seed: int) -> Drawn:
        stages.update(dict.fromkeys(stages, 0.0))
        images = pipe(
            prompt,
            num_inference_steps=how["steps"],
            guidance_scale=how["guidance_scale"],
            eta=how["eta"] or 0.0,
            num_images_per_prompt=setup.shape.batch,
            generator=torch.Generator("cpu").manual_seed(seed),
            height=setup.shape.height,
            width=setup.shape.width,
            **options,
        ).images
        return Drawn(np.stack([np.asarray(image) for image in images]), dict(stages))

    return draw


def time_stages(pipe: Any) -> dict[str, float]:
    """Makes a pipeline time its stages. Returns their milliseconds, which it adds to as it draws.

    What ControlNets take is the step's, as in a bundle's pictures.
    """
    ms = {"encode": 0.0, "step": 0.0, "decode": 0.0}

    def timed(stage: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            ms[stage] += (time.perf_counter() - start) * 1000

    pipe.encode_prompt = partial(timed, "encode", pipe.encode_prompt)
    pipe.vae.decode = partial(timed, "decode", pipe.vae.decode)
    starts: list[float] = []

    def end(*_: Any) -> None:
        ms["step"] += (time.perf_counter() - starts.pop()) * 1000

    for module in unet_and_controlnets(pipe):
        module.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
        module.register_forward_hook(end)
    return ms


def unet_and_controlnets(pipe: Any) -> list[Any]:
    """Returns what a pipeline runs in each step: its UNet, and its ControlNets if it has any."""
    return [pipe.unet, *([pipe.controlnet] if hasattr(pipe, "controlnet") else [])]


def draw_eagerly(folder: Path, setup: Setup) -> Draw:
    """Draws as diffusers' own examples do: in fp32 on a processor, in fp16 on a GPU."""
    return draw_with_diffusers(open_diffusers(folder, "float16" if setup.gpu else "float32", setup), setup)


def channels_last(pipe: Any) -> Any:
    """Moves all weights but the text encoders' to the channels-last memory format; returns the pipeline."""
    import torch

    for module in (*unet_and_controlnets(pipe), pipe.vae):
        module.to(memory_format=torch.channels_last)
    return pipe


def draw_eagerly_in_bf16(folder: Path, setup: Setup) -> Draw:
    """Draws with diffusers in bf16 and channels last."""
    return draw_with_diffusers(channels_last(open_diffusers(folder, "bfloat16", setup)), setup)


def draw_compiled(folder: Path, setup: Setup, mode: str = "default") -> Draw:
    """Draws with what `compiled` returns, in the bundle's precision."""
    dtype = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[setup.precision]
    return draw_with_diffusers(
        compiled(channels_last(open_diffusers(folder, dtype, setup)), setup, mode), setup
    )


def compiled(pipe: Any, setup: Setup, mode: str = "default") -> Any:
    """Returns a pipeline with torch.compile of UNet, ControlNets and the VAE's decoding, in a mode of it."""
    import torch

    pipe.unet = torch.compile(pipe.unet, mode=mode)
    if setup.controlnets:
        pipe.controlnet.forward = torch.compile(pipe.controlnet.forward, mode=mode)
    pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode)
    return pipe


def draw_with_openvino(folder: Path, setup: Setup) -> Draw:
    """Draws with OpenVINO's conversion of each model, in the bundle's precision."""
    from lcm_compile.benchmarks.measure.openvino_rival import use_openvino

    pipe = open_diffusers(folder, "float32", setup)
    use_openvino(pipe, setup.shape, setup.precision, setup.threads)
    return draw_with_diffusers(pipe, setup)


def write_for_genai(folder: Path, work: Path, setup: Setup) -> Path:
    """Writes the models of a diffusers folder for OpenVINO GenAI, in fp32 for bundles that compute in it."""
    from lcm_compile.benchmarks.measure.genai_rival import write_openvino_models
    from lcm_compile.checkpoint.load import quiet_libraries

    to = work / "openvino-genai"
    with warnings.catch_warnings(), quiet_libraries():
        # Of what libraries will rename, and of branches on sizes, which are the same for all that are drawn.
        warnings.simplefilter("ignore")
        write_openvino_models(open_diffusers(folder, "float32", setup), to, half=setup.precision != "fp32")
    return to


def draw_with_genai(folder: Path, setup: Setup) -> Draw:
    """Draws with OpenVINO GenAI's pipeline."""
    from lcm_compile.benchmarks.measure.genai_rival import draw_with_openvino_models

    return draw_with_openvino_models(folder, setup.shape, setup.precision, setup.threads, setup.drawing)


def write_for_sd_cpp(folder: Path, work: Path, _: Setup) -> Path:
    """Writes the weights of a diffusers folder for stable-diffusion.cpp, in fp16."""
    from lcm_compile.benchmarks.measure.sd_cpp_rival import write_f16

    return write_f16(folder, work)


def write_q8_for_sd_cpp(folder: Path, work: Path, _: Setup) -> Path:
    """Writes the weights of a diffusers folder for stable-diffusion.cpp, in its 8 bits."""
    from lcm_compile.benchmarks.measure.sd_cpp_rival import write_q8

    return write_q8(folder, work)


def draw_with_sd_cpp(file: Path, setup: Setup) -> Draw:
    """Draws with stable-diffusion.cpp."""
    from lcm_compile.benchmarks.measure.sd_cpp_rival import draw_with_file

    return draw_with_file(file, setup.shape, setup.threads, setup.drawing)


def draw_by_euler(folder: Path, setup: Setup) -> Draw:
    """Draws ordinary pictures eagerly: see EULER."""
    from diffusers import EulerDiscreteScheduler

    pipe = open_diffusers(folder, "float16" if setup.gpu else "float32", setup)
    pipe.scheduler = EulerDiscreteScheduler.from_config(json.loads((folder / SCHEDULER).read_text()))
    return draw_with_diffusers(pipe, setup, EULER)


def draw_by_compiled_euler(folder: Path, setup: Setup) -> Draw:
    """Draws ordinary pictures with a bundle of the base without few-step weights: see EULER."""
    return draw_with_bundle(folder, EULER)


RIVALS = {
    # Diffusers as it comes: fp32 on a processor, fp16 on a GPU.
    "eager": Rival(draw_eagerly),
    # Diffusers in bf16, channels last.
    "eager-bf16": Rival(draw_eagerly_in_bf16),
    # Diffusers with torch.compile.
    "compile": Rival(draw_compiled, starts_cold=False),
    # The same with kernels that torch has timed, and on a GPU with CUDA graphs: minutes to compile.
    "compile-max": Rival(partial(draw_compiled, mode="max-autotune"), starts_cold=False),
    # OpenVINO's export of the pipeline.
    "openvino": Rival(draw_with_openvino, starts_cold=False, package="openvino", install=INSTALL_OPENVINO),
    # OpenVINO GenAI's Text2ImagePipeline, in the bundle's precision.
    "openvino-genai": Rival(draw_with_genai, package="openvino_genai", write=write_for_genai),
    # stable-diffusion.cpp with weights in fp16, and with 8 bits each.
    "sd-cpp": Rival(draw_with_sd_cpp, package="cyllama", write=write_for_sd_cpp),
    "sd-cpp-q8_0": Rival(draw_with_sd_cpp, package="cyllama", write=write_q8_for_sd_cpp),
    # Diffusers without the few-step LoRA, 25 steps at guidance 7.5.
    "euler-25": Rival(draw_by_euler, few_step=False),
    # The same pictures from engines of ours, which are built if there are none yet.
    "euler-25-engine": Rival(draw_by_compiled_euler, few_step=False, compiled=True),
}


def check_rivals(names: tuple[str, ...], bundle: EngineBundle) -> dict[str, EngineBundle | None]:
    """Checks the rivals' names, and returns each once, with its bundle or None if it is one of RIVALS.

    Next to `euler-25` the same pictures are drawn by engines. Raises UsageError if a rival is neither in
    RIVALS nor a bundle's folder, if that bundle has another height or width, or if the rival can't draw what
    this bundle draws. Raises BackendError if the bundle is for a GPU and none works here.
    """
    manifest = bundle.manifest
    found: dict[str, EngineBundle | None] = {}
    if "euler-25" in names:
        names = (*names, "euler-25-engine")
    for name in names:
        if name in RIVALS:
            found[name] = None
        elif (Path(name) / MANIFEST).is_file():
            found[name] = open_bundle(Path(name))
        else:
            raise unknown_name("rival", name, (*RIVALS, "or a bundle's folder"))
    shape = manifest.pipeline.shape
    for name, other in found.items():
        other_shape = shape if other is None else other.manifest.pipeline.shape
        if (other_shape.height, other_shape.width) != (shape.height, shape.width):
            raise UsageError(
                f"{name} draws {other_shape}, and {bundle.folder} draws {shape}",
                "compare bundles of the same height and width",
            )
    spec, others = manifest.spec, [name for name, other in found.items() if other is None]
    if others and (spec.clip_skip or spec.prompt_tokens != CHUNK_TOKENS):
        raise UsageError(
            f"{others[0]} reads {CHUNK_TOKENS} tokens with all layers of the text encoders, and this bundle "
            f"{spec.prompt_tokens} tokens with clip skip {spec.clip_skip or 0}",
            f"leave out --against {others[0]}, or compare bundles",
        )
    if others and any(spec.name == MASKED for stage in manifest.stages for spec in stage.contract.inputs):
        raise UsageError(
            f"{others[0]} draws from prompts alone, and this bundle is of an inpainting model",
            f"leave out --against {others[0]}, or compare bundles",
        )
    inputs = {spec.name for stage in manifest.stages for spec in stage.contract.inputs}
    if "guidance" in inputs and any(name in RIVALS and not RIVALS[name].few_step for name in found):
        raise UsageError(
            f"{manifest.spec.base} is a full LCM, and Euler's sampler can't draw with it",
            "leave out --against euler-25",
        )
    for name in found:
        check_installed_rival(name, manifest)
    if found and not manifest.target.is_cpu and (reason := no_gpu()):
        raise BackendError(f"diffusers can't draw on a GPU here: {reason}", "lcm-compile doctor")
    return found


def check_installed_rival(name: str, manifest: BundleManifest) -> None:
    """Raises UsageError if a rival with its own package lacks that, or can't draw what a bundle draws."""
    rival = RIVALS.get(name)
    if rival is None or rival.package is None:
        return
    skip = f"leave out --against {name}"
    if manifest.spec.controlnets:
        raise UsageError(f"the rival {name} draws without ControlNets, and this bundle has one", skip)
    if not manifest.target.is_cpu:
        raise UsageError(f"the rival {name} runs on processors only, and this bundle is for a GPU", skip)
    if rival.write is not None and (reason := cannot_draw(name, manifest)):
        raise UsageError(f"the rival {reason}", skip)
    if importlib.util.find_spec(rival.package) is None:
        raise UsageError(
            f"the rival {name} needs the package {rival.package}, which is missing", rival.install
        )


def no_gpu() -> str | None:
    """Returns the reason why no GPU can be used here, or None if one can."""
    from lcm_compile.engines.gpu import gpu_here, why_no_gpu

    return None if gpu_here() else why_no_gpu()


@contextlib.contextmanager
def makers(
    names: Mapping[str, EngineBundle | None],
    spec: BuildSpec,
    backend: str,
    setup: Setup,
    report: Callable[[str], None],
) -> Iterator[dict[str, Maker]]:
    """Yields how each rival is loaded, by name.

    Fuses the pipelines that rivals share into temporary folders, which are deleted when the context ends.
    """
    from lcm_compile.system.cache import home
    from lcm_compile.system.child_process import call_in_child

    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home(), prefix=".bench-") as work:
        folders: dict[bool, Path] = {}
        made = {}
        if spec.controlnets and any(bundle is None for bundle in names.values()):
            report("write the ControlNets for the rivals")
            setup = replace(setup, controlnets=write_controlnets(spec, Path(work)))
        for name, bundle in names.items():
            if bundle is not None:
                made[name] = Maker(draw_with_bundle, (bundle.folder,))
                continue
            rival = RIVALS[name]
            if rival.compiled:
                report("build engines without few-step weights")
                made[name] = Maker(rival.load, (build_ordinary(spec, backend), setup))
                continue
            if rival.few_step not in folders:
                report("fuse the rivals' weights")
                place = Path(work) / ("few-step" if rival.few_step else "ordinary")
                alone = replace(spec, controlnets=())
                folders[rival.few_step] = fuse_for(alone, rival.few_step, place, setup.gpu)
            source = folders[rival.few_step]
            if rival.write is not None:
                report(f"write the weights for {name}")
                source = call_in_child(rival.write, source, Path(work), setup)
            made[name] = Maker(rival.load, (source, setup))
        yield made


def ordinary(spec: BuildSpec) -> BuildSpec:
    """Returns a spec without its few-step weights."""
    return replace(spec, lcm_lora=None, few_step=None, few_step_lora=None, no_lcm=True)


def build_ordinary(spec: BuildSpec, backend: str) -> Path:
    """Returns the folder of a spec's bundle without few-step weights, built if it is not there.

    Raises what `build` raises.
    """
    from lcm_compile.builder.build import build

    return build(replace(ordinary(spec), backend=backend, whole_loop=False)).folder


def write_controlnets(spec: BuildSpec, work: Path) -> tuple[Path, ...]:
    """Writes a spec's ControlNets as diffusers folders into `work`, and returns these.

    Raises what opening and loading them raises.
    """
    from lcm_compile.system.child_process import call_in_child

    count = len(spec.controlnets)
    call_in_child(save_controlnets, spec, work)  # whose end frees the memory
    return tuple(work / name for name in CONTROLS[:count])


def save_controlnets(spec: BuildSpec, work: Path) -> None:
    """Writes each ControlNet of a spec to the folder of its name in `work`."""
    from lcm_compile.checkpoint.load import load_component

    checkpoint = open_base(spec, half=False)
    for name in controls_of(checkpoint):
        module: Any = load_component(checkpoint, name)
        module.save_pretrained(work / name)


def fuse_for(spec: BuildSpec, few_step: bool, folder: Path, gpu: bool) -> Path:
    """Returns a diffusers folder of the spec's base with its LoRAs fused.

    Without `few_step`, the few-step LoRA is left out and only the styles are fused. If there is nothing to
    fuse and the base is a diffusers folder, that folder is returned; else the weights are written to
    `folder`. Raises what `fuse` raises.
    """
    plain = spec.no_lcm and not spec.loras and spec.vae == spec.base
    if plain and (Path(spec.base) / "model_index.json").is_file():
        return Path(spec.base)
    from lcm_compile.lora.fuse import fuse
    from lcm_compile.system.child_process import call_in_child

    wanted = spec if few_step or spec.random_seed is not None else ordinary(spec)
    call_in_child(fuse, wanted, folder, "fp16" if gpu else "fp32")  # whose end frees the memory
    return folder
