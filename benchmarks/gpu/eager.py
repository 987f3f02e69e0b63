"""Torch's own models for a machine that has engines and no checkpoint.

The stages have the weights of the engines, to tell what torch computes with them in fp32. The pipeline is one
of diffusers with random weights, to tell how long it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcm_compile.benchmarks.gpu.items import Missing
from lcm_compile.benchmarks.measure.rivals import Setup, channels_last, compiled, draw_with_diffusers
from lcm_compile.bundles.bundle import EngineBundle
from lcm_compile.bundles.manifest import StageFile
from lcm_compile.checkpoint.checkpoint import Checkpoint
from lcm_compile.checkpoint.empty_modules import module_of
from lcm_compile.checkpoint.load import quiet_libraries
from lcm_compile.checkpoint.open import open_base
from lcm_compile.engines.weights_file import read_weights
from lcm_compile.errors import LcmCompileError
from lcm_compile.precisions import Precision
from lcm_compile.proof.cuda_rehearsal import move, plain_tensors
from lcm_compile.stages.contracts import MODEL_STAGES, models_in
from lcm_compile.stages.half_precision import DTYPES
from lcm_compile.stages.quantize import Scales, install_layers, quantize_layers
from lcm_compile.stages.stage import Stage, make_stage, rewrite_modules
from lcm_compile.system.processor import threads

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PREFIX = "module."  # of the names of weights in engines of aotinductor, before the stage's own


def eager_stages(bundle: EngineBundle, device: str) -> Iterator[Stage]:
    """Yields the stages of a bundle of `aotinductor` on a device in fp32, with the weights of its engines.

    One model is in memory at a time. Raises Missing if the base's configs can't be had here, or if a LoRA at
    run time or an IP-Adapter is among the weights.
    """
    manifest = bundle.manifest
    checkpoint = base_of(bundle)
    if manifest.pipeline.loras or manifest.pipeline.lora_slots or manifest.spec.ip_adapter:
        raise Missing(f"{bundle.folder} has a LoRA at run time or an IP-Adapter")
    shapes = (manifest.pipeline.shape, manifest.proof.shape)
    for model in models_in(checkpoint):
        names, components = MODEL_STAGES[model]
        modules = {
            name: module_on(checkpoint, name, device) for name in components if name in checkpoint.components
        }
        modules = rewrite_modules(modules, manifest.spec.rewrites, shapes, checkpoint.vae_factor)
        for file in manifest.stages:
            if file.contract.name in names:
                stage = make_stage(checkpoint, file.contract, modules)
                give_weights(stage, file, bundle.path(file.file).with_suffix(".safetensors"), device)
                yield stage


def base_of(bundle: EngineBundle) -> Checkpoint:
    """Returns the checkpoint that a bundle was built from. Raises Missing if its configs are not here."""
    try:
        return open_base(bundle.manifest.spec, half=True)
    except LcmCompileError as error:
        raise Missing(f"the base of {bundle.folder} is not here: {error.message}") from error


def module_on(checkpoint: Checkpoint, name: str, device: str) -> torch.nn.Module:
    """Returns a component in fp32 on a device, with the random weights that torch gives it."""
    with torch.device(device), quiet_libraries():
        module: torch.nn.Module = module_of(name, checkpoint.components[name].config)
    return module.eval().requires_grad_(False)


def give_weights(stage: Stage, file: StageFile, path: Path, device: str) -> None:
    """Copies the weights of a stage's engine from a file to the stage, whose layers become 8-bit like its.

    Raises Missing if the engine has a weight that the stage has not.
    """
    product = file.precision.product
    if file.quantized_layers:
        scales = {name: Scales(1.0) for name in file.quantized_layers}
        layers = quantize_layers(stage.module, scales, Precision.of(product, "fp32"))
        install_layers(stage.module, layers)
    move(stage.module, device)
    # A weight that several layers share has several names, and the engine's is any of them.
    own: dict[str, torch.Tensor] = dict(stage.module.named_parameters(remove_duplicate=False))
    own |= dict(stage.module.named_buffers(remove_duplicate=False)) | plain_tensors(stage.module)
    transposed = {f"{name}.weight" for name in file.quantized_layers}  # see ScaledLinear and QuantizedLinear
    with torch.no_grad():
        for name, weight in read_weights(path, device).items():
            name = name.removeprefix(PREFIX)
            if name not in own:
                raise Missing(f"the {stage.name} engine has a weight {name}, which torch's module has not")
            own[name].copy_(weight.t() if name in transposed else weight)


def eager_pipeline(bundle: EngineBundle, device: str, dtype: torch.dtype) -> DiffusionPipeline:
    """Returns diffusers' pipeline of a bundle's base with random weights, and the bundle's tokenizers.

    Raises Missing if the base's configs can't be had here.
    """
    import diffusers
    from transformers import PreTrainedTokenizerFast

    from lcm_compile.checkpoint.write_folder import make_scheduler

    checkpoint, settings = base_of(bundle), bundle.manifest.pipeline
    names = ("unet", "vae", *checkpoint.text_encoders)
    parts: dict[str, Any] = {name: module_on(checkpoint, name, device).to(dtype) for name in names}
    if parts["vae"].config.get("force_upcast"):  # diffusers would decode in fp32, and engines do not
        parts["vae"].register_to_config(force_upcast=False)
    for name, tokenizer in zip(checkpoint.tokenizers, settings.tokenizers, strict=True):
        made = PreTrainedTokenizerFast(
            tokenizer_file=str(bundle.path(tokenizer.file)), model_max_length=tokenizer.max_length
        )
        made.pad_token = made.convert_ids_to_tokens(tokenizer.pad_token_id)
        parts[name] = made
    parts["scheduler"] = make_scheduler(settings.sampler, settings.scheduler)
    if "text_encoder_2" in parts:
        pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def eager_drawers(
    bundle: EngineBundle, device: str, rivals: Sequence[str]
) -> dict[str, Callable[[int], object]]:
    """Returns functions that draw with eager_pipeline from a seed, by the names of measure.rivals.

    "eager" is as diffusers comes, "compile" with torch.compile of the UNet and of the VAE's decoding. Raises
    Missing as eager_pipeline.
    """
    settings, drawers = bundle.manifest.pipeline, dict[str, Callable[[int], object]]()
    precision = bundle.manifest.stages[0].precision.floats
    setup = Setup(settings.shape, precision, threads(), device == "cuda", settings)
    for name in rivals:
        pipe: Any = eager_pipeline(bundle, device, DTYPES[precision])
        if name == "compile":
            pipe = compiled(channels_last(pipe), setup)
        drawers[name] = partial(draw_with_diffusers(pipe, setup), settings.sample_prompt)
    return drawers
