"""Describes a base checkpoint: each model's config, and the files of its weights. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcm_compile.checkpoint.families import FAMILIES, Family
from lcm_compile.errors import CheckpointError
from lcm_compile.graphs import LoraInputs
from lcm_compile.scheduler import SchedulerSettings
from lcm_compile.spec import EmbeddingSpec
from lcm_compile.system.files import user_path

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
MODELS = (*TEXT_ENCODERS, "unet", "vae")


def is_tiny(vae: Mapping[str, Any]) -> bool:
    """Returns whether a VAE's config is that of a tiny autoencoder (TAESD), which decodes less exactly."""
    return bool(vae.get("_class_name") == "AutoencoderTiny")


def is_inpainting(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> bool:
    """Returns whether a UNet's config is that of an inpainting model, which takes a mask and two latents."""
    return bool(unet["in_channels"] == 2 * vae.get("latent_channels", 4) + 1)


def refuse_inpainting(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for an inpainting model, which training draws no masks for."""
    if checkpoint.is_inpainting:
        raise CheckpointError(
            f"{checkpoint.base} is an inpainting model, and training draws no masks for it",
            "train on the text-to-image base that it was made of, and build this one with that LoRA",
        )


def factor_of(vae: Mapping[str, Any]) -> int:
    """Returns how many pixels of the picture one pixel of the latent is on a side: 8 for Stable Diffusion."""
    # A tiny autoencoder's config has other names for these settings.
    blocks = vae.get("decoder_block_out_channels") or vae.get("block_out_channels") or [0]
    return int(vae.get("upsampling_scaling_factor", 2) ** (len(blocks) - 1))


@dataclass(frozen=True)
class Component:
    """One model of a checkpoint: its config and its weights.

    If it comes from a diffusers `folder`, `files` are the weight files in that folder, and `variant` is
    `fp16` or None. Otherwise `files` is one file with all models, in which the keys of this model begin with
    `prefix`. For random weights there are no files. One that `changes_unet` is a control-LoRA, whose files
    hold changes to the weights of the base's UNet.
    """

    name: str
    config: Mapping[str, Any]
    files: tuple[Path, ...] = ()
    variant: str | None = None
    folder: Path | None = None
    prefix: str = ""
    changes_unet: bool = False

    @property
    def location(self) -> str:
        """The folder or file of the weights, in words."""
        return str(self.folder or (self.files[0] if self.files else "random weights"))

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold weights: all of `files` but the index of shards."""
        return [path for path in self.files if path.suffix != ".json"]

    def content_files(self) -> list[Path]:
        """Returns the files of the weights, and of the config if it has a file."""
        return [*([self.folder / "config.json"] if self.folder else []), *self.files]


@dataclass(frozen=True)
class PlannedEmbedding:
    """A textual inversion that the text encoders get: as it was asked for, and its file."""

    spec: EmbeddingSpec
    path: Path


@dataclass(frozen=True)
class Checkpoint:
    """A base of SDXL's architecture (two text encoders) or SD1.5's (one).

    `folder` holds its tokenizers and, if it is a diffusers folder, its settings. If the base is a single
    file, this is `file`, which holds the weights. With a `random_seed` there are no weight files: see
    random_weights. `scheduler_config` is the scheduler's config as it was found. `notes` are sentences for
    the user about how the base was read. `embeddings` are the textual inversions that `load` adds.
    `prompt_chunks` says how many chunks of `text_length` tokens a prompt has, and `clip_skip` how many of the
    last layers of each text encoder are skipped. `loras` says what of LoRAs is an input of its stages.
    """

    base: str
    folder: Path
    family: Family | None
    components: Mapping[str, Component]
    scheduler_config: Mapping[str, Any]
    zero_negative_prompt: bool
    random_seed: int | None = None
    file: Path | None = None
    notes: tuple[str, ...] = ()
    embeddings: tuple[PlannedEmbedding, ...] = ()
    prompt_chunks: int = 1
    clip_skip: int = 0
    loras: LoraInputs = field(default_factory=LoraInputs)

    @property
    def scheduler(self) -> SchedulerSettings:
        """The settings of the noise schedule."""
        return SchedulerSettings.from_dict(self.scheduler_config)

    @property
    def location(self) -> Path:
        """The file or folder of the base."""
        return self.file or self.folder

    @property
    def name(self) -> str:
        """The base's short name: a family, a hub id, or the name of the file or folder."""
        if self.base in FAMILIES or not user_path(self.base).exists():
            return self.base
        return self.file.stem if self.file else self.folder.resolve().name

    @property
    def text_encoders(self) -> list[str]:
        """The names of its text encoders, one or two."""
        return [name for name in TEXT_ENCODERS if name in self.components]

    @property
    def tokenizers(self) -> list[str]:
        """The names of its tokenizers, in the order of its text encoders."""
        return [name.replace("text_encoder", "tokenizer") for name in self.text_encoders]

    def text_length(self, text_encoder: str) -> int:
        """Returns the number of tokens that a text encoder reads at once."""
        return int(self.components[text_encoder].config.get("max_position_embeddings", 77))

    @property
    def architecture(self) -> str:
        """`sdxl` or `sd15`."""
        return "sdxl" if "text_encoder_2" in self.components else "sd15"

    @property
    def unet(self) -> Mapping[str, Any]:
        """The UNet's config."""
        return self.components["unet"].config

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that a LoRA can have a strength of its own for, each without those inside it."""
        blocks = [
            f"{name}.{i}"
            for name, types in (("down_blocks", "down_block_types"), ("up_blocks", "up_block_types"))
            for i in range(len(self.unet[types]))
        ]
        return (*self.text_encoders, "unet", *blocks, "mid_block")

    @property
    def vae(self) -> Mapping[str, Any]:
        """The VAE's config."""
        return self.components["vae"].config

    @property
    def vae_factor(self) -> int:
        """How many pixels of the picture one pixel of the latent is on a side."""
        return factor_of(self.vae)

    @property
    def lossy(self) -> dict[str, str]:
        """The stages that lose quality, each with the reason."""
        return {"decode": "a tiny autoencoder in the VAE's place"} if is_tiny(self.vae) else {}

    @property
    def default_size(self) -> tuple[int, int]:
        """The height and width in pixels that the UNet was trained for."""
        size = self.unet["sample_size"]
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return height * self.vae_factor, width * self.vae_factor

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet also takes a mask, and the latent of a picture without what it repaints."""
        return is_inpainting(self.unet, self.vae)

    @property
    def has_guidance_embedding(self) -> bool:
        """Whether the UNet is a full LCM, which takes the guidance scale as an input."""
        return self.unet.get("time_cond_proj_dim") is not None

    @property
    def default_guidance(self) -> float:
        """The guidance scale of a picture for which none is asked: 1, which is none, or a full LCM's.

        A full LCM's is the default of the pipeline that diffusers has for it: LatentConsistencyModelPipeline
        for SD1.5's architecture, StableDiffusionXLPipeline for SDXL's.
        """
        if not self.has_guidance_embedding:
            return 1.0
        return 5.0 if self.architecture == "sdxl" else 8.5

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files; 0 for random weights."""
        return sum(p.stat().st_size for p in {path for c in self.components.values() for path in c.files})

    @property
    def is_folder(self) -> bool:
        """Whether the settings come from a diffusers folder, not from this package's tables."""
        return self.file is None and self.random_seed is None

    def tokenizer_files(self) -> dict[str, Path]:
        """Returns the tokenizers' files by name, such as `tokenizer/vocab.json`.

        Empty if a base with random weights has no tokenizer.
        """
        folders = [self.folder / name for name in self.tokenizers if (self.folder / name).is_dir()]
        found = [p for folder in folders for p in sorted(folder.iterdir()) if p.suffix in (".json", ".txt")]
        return {f"{path.parent.name}/{path.name}": path for path in found}

    def content_files(self) -> dict[str, Path]:
        """Returns every file that decides what the engines compute and how prompts are read, by its role.

        The file's own name is part of the role only in a diffusers folder, where it says what the file is.
        """
        files = self.tokenizer_files()
        if self.is_folder:
            files |= {name: self.folder / name for name in ("model_index.json", SCHEDULER)}
        for component in self.components.values():
            for path in component.content_files():
                own = path != self.file
                label = path.name if component.folder else "file"
                files[f"{component.name}/{label}" if own else "file"] = path
        return files

    def content(self, sha256: Callable[[Path], str]) -> dict[str, str]:
        """Returns everything that decides what is computed, as digests by name. Keys of builds contain it.

        `sha256` returns the digest of a file.
        """
        content = {name: sha256(path) for name, path in self.content_files().items()}
        loose = {c.name: dict(c.config) for c in self.components.values() if c.folder is None}
        if loose:
            configs = json.dumps({**loose, "scheduler": dict(self.scheduler_config)}, sort_keys=True)
            content["configs"] = hashlib.sha256(configs.encode()).hexdigest()
        if self.random_seed is not None:
            content["weights"] = f"random, seed {self.random_seed}"
        return content


SCHEDULER = "scheduler/scheduler_config.json"
# What `fuse` notes in the scheduler's config, or without the _ in a file's metadata: the few-step weights
# that it fused, as METHOD:VARIANT. Diffusers leaves settings alone that begin with _.
FUSED_FEW_STEP = "_lcm_compile_few_step"
