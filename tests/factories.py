"""Small checkpoints and LoRAs of random weights, written in the layouts of the real files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from lcm_compile.builder.build import build_plans
from lcm_compile.builder.plan import make_plan_from
from lcm_compile.bundles.export_manifest import open_export
from lcm_compile.checkpoint.controlnet import original_keys
from lcm_compile.checkpoint.load import load_component
from lcm_compile.lora.merge import check_loras, merge_loras
from lcm_compile.system.stopwatch import silent


def load_modules(checkpoint):
    """Every model of a checkpoint, as an attribute of its component's name; `named` gives them as a dict."""
    return Modules(**{name: load_component(checkpoint, name) for name in checkpoint.components})


class Modules(SimpleNamespace):
    text_encoder_2 = None

    def named(self):
        return dict(vars(self))


def fuse_loras(modules, loras):
    """Merges LoRAs into the models of a base, all of which are here, once every one is known to fit."""
    provenance = check_loras(modules, loras)
    merge_loras(modules, loras)
    return provenance


def build_from(graphs, gpu, backend="auto", out=None):
    """Builds a bundle from an export; returns the plan that was followed, and the bundle."""
    plan = make_plan_from(open_export(graphs), gpu, backend, out)
    return build_plans([plan], False, silent)[0]


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WORDS = ["a", "red", "blue", "star", "circle", "on", "white", "large", "small", "background"]


def write_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP byte-level BPE tokenizer whose merges make each of WORDS one token (last id: end of text)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = list(bytes_to_unicode().values())
    tokens = alphabet + [c + "</w>" for c in alphabet]
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            parts[:2] = [parts[0] + parts[1]]
            if merge not in merges:
                merges.append(merge)
                tokens.append(parts[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    special = {k: v for k, v in settings.items() if k.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return CLIPTokenizer.from_pretrained(folder)


def text_config(tokenizer: CLIPTokenizer, hidden: int, projection: int, **kwargs) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **kwargs,
    )


def tiny_vae(factor: int) -> AutoencoderKL:
    blocks = {4: (16, 16, 32), 8: (16, 16, 32, 32)}[factor]
    return AutoencoderKL(
        block_out_channels=blocks,
        down_block_types=["DownEncoderBlock2D"] * len(blocks),
        up_block_types=["UpDecoderBlock2D"] * len(blocks),
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=0.13025,
    )


def lively(module: torch.nn.Module, gain: float = 1.0) -> torch.nn.Module:
    """Random biases too, so that a bias that is lost shows in the picture."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
            elif parameter.ndim > 1:
                parameter.mul_(gain)
    return module.eval()


def write_sdxl(
    folder: Path, seed: int = 0, factor: int = 4, prediction_type: str = "epsilon", **unet_kwargs
) -> Path:
    """A checkpoint of SDXL's architecture, 64×64 pictures by default."""
    torch.manual_seed(seed)
    one = write_tokenizer(folder / "_1")
    two = write_tokenizer(folder / "_2", pad_token="!")
    config = {
        "sample_size": 64 // factor,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 32 + 48,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 40 + 6 * 8,
        "norm_num_groups": 8,
    }
    unet = UNet2DConditionModel(**config | unet_kwargs)
    pipe = StableDiffusionXLPipeline(
        vae=lively(tiny_vae(factor)),
        text_encoder=lively(CLIPTextModel(text_config(one, 32, 32)), 4),
        text_encoder_2=lively(CLIPTextModelWithProjection(text_config(two, 48, 40, hidden_act="gelu")), 4),
        tokenizer=one,
        tokenizer_2=two,
        unet=lively(unet, 1.2),
        scheduler=EulerDiscreteScheduler(
            **BETAS, prediction_type=prediction_type, steps_offset=1, timestep_spacing="leading"
        ),
        add_watermarker=False,
    )
    return save(pipe, folder)


def write_sd15(
    folder: Path, seed: int = 0, factor: int = 8, prediction_type: str = "epsilon", **unet_kwargs
) -> Path:
    """A checkpoint of SD1.5's architecture (PNDM settings, convolutional projections, no pooled text)."""
    torch.manual_seed(seed)
    tokenizer = write_tokenizer(folder / "_1")
    config = {
        "sample_size": 64 // factor,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    unet = UNet2DConditionModel(**config | unet_kwargs)
    pipe = StableDiffusionPipeline(
        vae=lively(tiny_vae(factor)),
        text_encoder=lively(CLIPTextModel(text_config(tokenizer, 32, 32)), 4),
        tokenizer=tokenizer,
        unet=lively(unet, 1.2),
        scheduler=PNDMScheduler(
            **BETAS,
            prediction_type=prediction_type,
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return save(pipe, folder)


def with_scheduler(base: Path, folder: Path, **settings) -> Path:
    """A copy of a base, with these settings of its scheduler. Published bases have clip_sample False."""
    shutil.copytree(base, folder)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def save(pipe, folder: Path) -> Path:
    import shutil

    pipe.save_pretrained(folder)
    for index, name in ((1, "tokenizer"), (2, "tokenizer_2")):
        source = folder / f"_{index}"
        if source.exists():
            # the hub's files: vocab.json and merges.txt, not the converted tokenizer.json
            shutil.rmtree(folder / name)
            source.rename(folder / name)
    return folder


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


UNET_LORA_MODULES = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in", "conv1", "conv_shortcut")
TEXT_LORA_MODULES = ("q_proj", "v_proj", "out_proj", "fc1")


def lora_modules(pipe, text: bool, every: bool = False) -> list[tuple[str, str, torch.nn.Module]]:
    """(component, module, layer) of those that LoRAs are usually made for, or of every matrix."""
    wanted = [("unet", pipe.unet, "" if every else UNET_LORA_MODULES)]
    if text:
        names = [n for n in ("text_encoder", "text_encoder_2") if getattr(pipe, n, None) is not None]
        wanted += [(name, getattr(pipe, name), TEXT_LORA_MODULES) for name in names]
    return [
        (component, name, layer)
        for component, root, suffixes in wanted
        for name, layer in root.named_modules()
        if name.endswith(suffixes) and isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    ]


def write_lora(
    pipe,
    path: Path,
    layout: str,
    rank: int = 4,
    alpha: float | None = 2.0,
    text: bool = True,
    seed: int = 0,
    every: bool = False,
) -> Path:
    """A random LoRA for a pipeline's modules, in the key names of kohya's trainer or of diffusers/PEFT.

    With `every` it changes all linear layers and convolutions of the UNet.
    """
    generator = torch.Generator().manual_seed(seed)
    one_encoder = getattr(pipe, "text_encoder_2", None) is None
    kohya = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te_" if one_encoder else "lora_te1_",
        "text_encoder_2": "lora_te2_",
    }
    tensors = {}
    for component, name, layer in lora_modules(pipe, text, every):
        weight = layer.weight
        kernel = weight.shape[2:]
        down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.2
        up = torch.randn(weight.shape[0], rank, *(1 for _ in kernel), generator=generator) * 0.2
        if component != "unet" and not name.startswith("text_model."):
            name = f"text_model.{name}"  # as the trainers' transformers named it
        if layout == "kohya":
            key = kohya[component] + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            if alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(alpha)
        else:
            key = f"{component}.{name}"
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return save_tensors(tensors, path)


def write_original(pipe, path: Path, precision: str = "fp32", **extra: torch.Tensor) -> Path:
    """A pipeline as one file in the original layout; `extra`: more tensors, under any key."""
    from lcm_compile.checkpoint.checkpoint import MODELS
    from lcm_compile.checkpoint.write_single_file import original_weights

    models = {name: getattr(pipe, name) for name in MODELS if getattr(pipe, name, None) is not None}
    tensors = dict(extra)
    for name, module in models.items():
        config = getattr(module, "config", None)
        config = config if isinstance(config, Mapping) else config.to_dict()
        tensors |= original_weights(name, config, "text_encoder_2" in models, module)
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    return save_tensors({k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}, path)


def write_vae(folder, seed=7, factor=4, **config):
    """A VAE alone, in a diffusers folder; `config` changes what its config says."""
    torch.manual_seed(seed)
    vae = lively(tiny_vae(factor))
    vae.register_to_config(**config)
    vae.save_pretrained(folder)
    return vae


def write_controlnet(base, folder, seed=3, **config):
    """A ControlNet for a base, in a diffusers folder. What it adds is as large as what a trained one adds."""
    torch.manual_seed(seed)
    pipe = DiffusionPipeline.from_pretrained(base)
    unet = UNet2DConditionModel.from_config({**pipe.unet.config, **config})
    net = lively(new_controlnet(pipe, unet))
    randomize_own_layers(net)
    net.save_pretrained(folder)
    return folder


def new_controlnet(pipe, unet):
    """An untrained ControlNet for a pipeline's pictures, with the weights of a UNet."""
    widths = (8, 16, 32, 48)[: len(pipe.vae.config.block_out_channels)]
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)


OWN_LAYERS = ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block")


def randomize_own_layers(net):
    """A new ControlNet adds nothing: its convolutions to the UNet, and the picture's last, are zeros."""
    with torch.no_grad():
        for weight in net.controlnet_cond_embedding.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 2 / weight[0].numel() ** 0.5)
        for module in (net.controlnet_down_blocks, net.controlnet_mid_block):
            for weight in module.parameters():
                weight.normal_(0, 0.2)


def write_control_lora(base, folder, path, rank=4, seed=3):
    """A control-LoRA for a base in a file, and the ControlNet that it stands for in a diffusers folder."""
    torch.manual_seed(seed)
    pipe = DiffusionPipeline.from_pretrained(base)
    net = new_controlnet(pipe, pipe.unet)
    randomize_own_layers(net)
    names, tensors = dict(original_keys(net)), {"lora_controlnet": torch.zeros(0)}
    for key, weight in net.state_dict().items():
        if key.startswith(OWN_LAYERS) or weight.ndim == 1:
            if not key.startswith(OWN_LAYERS):
                weight.add_(torch.randn_like(weight), alpha=0.02)
            tensors[names[key]] = weight
            continue
        layer, kernel = names[key].removesuffix(".weight"), weight.shape[2:]
        up = torch.randn(weight.shape[0], rank, *(1 for _ in kernel)) * 0.05
        down = torch.randn(rank, *weight.shape[1:]) * 0.2
        weight.add_(torch.tensordot(up.flatten(1), down, 1))
        tensors |= {f"{layer}.up": up, f"{layer}.down": down}
    net.save_pretrained(folder)
    return save_tensors(tensors, path)


def write_t2i_adapter(folder, seed=3, **config):
    """A T2I-Adapter, in a diffusers folder, whose features are as large as what they are added to."""
    torch.manual_seed(seed)
    adapter = T2IAdapter(**{"channels": [32, 64], "num_res_blocks": 2, "downscale_factor": 8, **config})
    with torch.no_grad():
        for weight in lively(adapter).parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.2 / weight[0].numel() ** 0.5)
    adapter.save_pretrained(folder)
    return folder


def write_original_t2i_adapter(folder, path):
    """A diffusers folder's T2I-Adapter as one file under the original's names."""
    adapter, named = T2IAdapter.from_pretrained(folder), {}
    light = adapter.config.adapter_type == "light_adapter"
    for key, weight in adapter.state_dict().items():
        match key.split(".")[1:]:
            case ["body", block, "resnets", number, *leaf]:
                place = f"{block}.body.{number}" if light else str(2 * int(block) + int(number))
                named[f"body.{place}.{'.'.join(leaf)}"] = weight
            case ["body", block, *leaf]:
                place = block if light else 2 * int(block)
                named[f"body.{place}.{'.'.join(leaf)}"] = weight
            case leaf:
                named[".".join(leaf)] = weight
    torch.save(named, path)
    return path


# Three blocks: the features of an SDXL adapter reach the middle one, and a light adapter needs as many.
DEEP_SDXL = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
}
DEEP_SD15 = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}


def outline(size, seed=0):
    """A control picture in another size than the bundle's: lines of random places and colours."""
    image, random = Image.new("RGB", size), np.random.default_rng(seed)
    pen = ImageDraw.Draw(image)
    for colour in ("white", "red", "blue", "yellow"):
        pen.line([tuple(map(int, random.integers(0, size))) for _ in range(2)], fill=colour, width=9)
    return image


def painting(width=64, height=64):
    """A picture to begin at: blurred blots of all colours."""
    blots = np.random.default_rng(3).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(blots).resize((width, height), Image.Resampling.BICUBIC)


def write_original_controlnet(folder, path, prefix="control_model.", dtype=torch.float16):
    """A diffusers folder's ControlNet as one file under the original's names."""
    net = ControlNetModel.from_pretrained(folder)
    names = dict(original_keys(net))
    return save_tensors({prefix + names[key]: w.to(dtype) for key, w in net.state_dict().items()}, path)


def write_image_encoder(folder, seed=11, hidden=32, projection=24):
    """A CLIP image encoder for pictures of 28×28, in transformers' folder."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        projection_dim=projection,
        hidden_act="gelu",
    )
    lively(CLIPVisionModelWithProjection(config), 4).save_pretrained(folder)
    return folder


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def ip_projection(kind, embedding, hidden, width):
    """The shapes of an IP-Adapter's projection, in the original's names."""
    if kind == "base":
        return {"proj.weight": (4 * width, embedding), "proj.bias": (4 * width,), **norm("norm", width)}
    if kind == "full":
        one = {"proj.0.weight": (hidden, hidden), "proj.0.bias": (hidden,)}
        return one | {"proj.2.weight": (width, hidden), "proj.2.bias": (width,), **norm("proj.3", width)}
    shapes = {"latents": (1, 6, 48), "proj_in.weight": (48, hidden), "proj_in.bias": (48,)}
    shapes |= {"proj_out.weight": (width, 48), "proj_out.bias": (width,), **norm("norm_out", width)}
    block = {**norm("0.norm1", 48), **norm("0.norm2", 48), **norm("1.0", 48)}
    block |= {"0.to_q.weight": (128, 48), "0.to_kv.weight": (256, 48), "0.to_out.weight": (48, 128)}
    block |= {"1.1.weight": (192, 48), "1.3.weight": (48, 192)}
    return shapes | {f"layers.{n}.{key}": shape for n in range(4) for key, shape in block.items()}


def write_ip_adapter(base, path, kind="base", seed=5, embedding=24, hidden=32):
    """An IP-Adapter of random weights for a base, in the original's names, with a plain effect."""
    random = torch.Generator().manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    width = unet.config.cross_attention_dim
    tensors = {}
    for key, shape in ip_projection(kind, embedding, hidden, width).items():
        scale = len(shape) == 1 and key.endswith("weight")
        tensors[f"image_proj.{key}"] = scale + torch.randn(shape, generator=random) / shape[-1] ** 0.5
    for number, name in enumerate(unet.attn_processors):
        if number % 2:
            out = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for one in "kv":
                weight = torch.randn(out, width, generator=random) / width**0.5
                tensors[f"ip_adapter.{number}.to_{one}_ip.weight"] = weight
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        return save_tensors(tensors, path)
    parts = {
        part: {key.removeprefix(f"{part}."): t for key, t in tensors.items() if key.startswith(part)}
        for part in ("image_proj", "ip_adapter")
    }
    torch.save(parts, path)
    return path


# Settings that make a family of SD1.5's architecture a thousand times smaller.
SMALL_UNET = {
    "block_out_channels": [32, 64, 64, 64],
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "sample_size": 8,
}
SMALL_VAE = {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8, "layers_per_block": 1}
SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class InThisProcess:
    """Stands in for ForkServer where a test changes what the calls would import."""

    def __init__(self, modules):
        self.modules = modules

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, function, *args):
        return function(*args)
