"""DreamBooth with a LoRA: teaches a base a subject or a style from a few pictures.

The loss is the denoising loss of the base's own training, taken on these pictures. Optionally the same loss
on pictures of their class is added with a weight, so that the base does not forget the class: Ruiz et al.
2022, arXiv 2208.12242, equation 2. The trained weights are the adapters of Hu et al. 2021.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lcm_compile.checkpoint.checkpoint import refuse_inpainting
from lcm_compile.checkpoint.find import Checkpoint, open_checkpoint
from lcm_compile.checkpoint.load import load_component, quiet_libraries
from lcm_compile.errors import CheckpointError, UsageError, unknown_name
from lcm_compile.system.files import check_out, check_space, replacing_output, user_path
from lcm_compile.training.adapters import (
    ADAPTED,
    ATTENTION,
    add_lora,
    describe,
    peft_tensors,
    place,
    predict_with,
    save_lora,
    trained,
)
from lcm_compile.training.consistency import Conditioning, Predict, Solver, add_noise, per_picture
from lcm_compile.training.data import NOISE, PRIOR_NOISE, Data, generator, list_pictures, open_data
from lcm_compile.training.encode import Encoded, Encoder, encoded, join
from lcm_compile.training.loop import Progress, state_bytes, train
from lcm_compile.training.spec import Machine, TrainSpec, find_machine
from lcm_compile.training.state import State, check_state, open_state, settings_of

# The values of --modules, each with the ends of the adapted modules' names.
MODULES = {"attention": ATTENTION, "all": ADAPTED}


@dataclass(frozen=True)
class StyleSpec(TrainSpec):
    """The settings of one style LoRA.

    `prompt` is the caption of pictures that have none. `prior_data` is a folder of class pictures. The base
    draws more of them from `prior_prompt` until there are `prior_images`; `prior_prompt` is also the caption
    of class pictures that have none. Raises UsageError if a value is out of range or if an option
    lacks another one that it needs.
    """

    steps: int = 500
    rank: int = 4
    prompt: str | None = None
    modules: str = "attention"
    prior_data: str | None = None
    prior_prompt: str | None = None
    prior_weight: float = 1.0
    prior_images: int = 0
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules not in MODULES:
            raise unknown_name("modules", self.modules, MODULES)
        if not (math.isfinite(self.prior_weight) and self.prior_weight > 0):
            raise UsageError(f"prior-weight must be a positive number, not {self.prior_weight}")
        gamma = self.snr_gamma
        if gamma is not None and not (math.isfinite(gamma) and gamma > 0):
            raise UsageError(f"snr-gamma must be a positive number, not {gamma}", "for example --snr-gamma 5")
        if self.prior_images < 0:
            raise UsageError(f"prior-images must be 0 or more, not {self.prior_images}")
        if self.prior_data is None and (self.prior_prompt is not None or self.prior_images):
            raise UsageError(
                "--prior-prompt and --prior-images need a folder of class pictures",
                "name it with --prior-data",
            )
        if self.prior_images and self.prior_prompt is None:
            raise UsageError(
                "--prior-images is given, but nothing says what to draw",
                'for example --prior-prompt "a photo of a dog"',
            )
        for name in ("prompt", "prior_prompt"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise UsageError(f"{name.replace('_', '-')} is empty", 'for example "a photo of sks dog"')


def train_lora(
    spec: StyleSpec, out: Path, resume: bool = False, tell: Callable[[str], None] = lambda _: None
) -> Generator[Progress, None, Path]:
    """Trains a LoRA on the pictures of a folder. Yields after every step, and finally returns `out`.

    The request is checked before this returns. Missing class pictures are drawn before this returns too, and
    `tell` is called with a line of text before each, and with each remark about how the base was read.
    `resume` and the errors are those of `distill`.
    """
    if spec.data is None:
        raise UsageError("no pictures to train on", "give a folder of pictures to --data")
    check_out(out)
    check_state(out, resume)
    checkpoint = open_checkpoint(spec.base)
    refuse_inpainting(checkpoint)
    if checkpoint.has_guidance_embedding:
        raise CheckpointError(
            f"{checkpoint.base} is an LCM: its UNet takes the guidance scale",
            "train on the base that it was distilled from",
        )
    for remark in checkpoint.notes:
        tell(remark)
    machine = find_machine(spec.mixed_precision)
    height, width = checkpoint.default_size
    data = open_data(spec.data, height, width, spec.seed, spec.prompt)
    digests = {"data": data.digest()}
    prior = None
    if spec.prior_data is not None:
        draw_class_pictures(spec, checkpoint, machine, tell)
        prior = open_data(spec.prior_data, height, width, spec.seed, spec.prior_prompt, "--prior-data")
        digests["prior_data"] = prior.digest()
    state = open_state(out, resume, settings_of(spec, checkpoint, machine, **digests))
    return run(spec, checkpoint, machine, data, prior, state, out)


def run(
    spec: StyleSpec,
    checkpoint: Checkpoint,
    machine: Machine,
    data: Data,
    prior: Data | None,
    state: State,
    out: Path,
) -> Generator[Progress, None, Path]:
    """Loads the models, trains, and writes the LoRA; yields after every step. See `train_lora`."""
    encoded_data = encode_all(checkpoint, machine, [data] if prior is None else [data, prior])
    unet: Any = load_component(checkpoint, "unet")
    add_lora(unet, spec.rank, MODULES[spec.modules], spec.seed)
    place(unet, machine)
    weights = trained(unet)
    if spec.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    output = 2 * sum(weight.numel() for weight in weights.values())
    check_space(out, output + state_bytes(spec, weights, means=0))
    solver = Solver.of(checkpoint.scheduler, 1, machine.device)
    predict = predict_with(unet, machine)

    def loss_of(numbers: Sequence[int]) -> Tensor:
        batches = []
        for purpose, pictures in zip((NOISE, PRIOR_NOISE), encoded_data, strict=False):
            clean, prompts = pictures(numbers)
            drawn = draw(purpose, spec.seed, numbers, clean.shape[1:], len(solver.alphas))
            noise, timestep = (t.to(machine.device) for t in drawn)
            batches.append(Batch(clean, noise, timestep, prompts))
        return dreambooth_loss(predict, batches, spec.prior_weight, solver, spec.snr_gamma)

    final = yield from train(spec, machine, weights, {}, loss_of, lambda step, steps: 1.0, state)
    if machine.main:
        save_lora(peft_tensors(final), out, describe(spec, checkpoint))
        state.remove()
    return out


def encode_all(checkpoint: Checkpoint, machine: Machine, data: Sequence[Data]) -> list[Encoded]:
    """Returns one function per element of `data`, which encodes its pictures by number."""
    encoder = Encoder(checkpoint, machine.device)
    return [encoded(each, encoder, machine.device) for each in data]


def draw(
    purpose: int, seed: int, numbers: Sequence[int], shape: Sequence[int], timesteps: int
) -> tuple[Tensor, Tensor]:
    """Draws the noise (b, *shape) and timesteps (b,) of pictures by number.

    `shape` is that of one latent, and `timesteps` is the number of timesteps to choose from. The values are
    the same on every machine.
    """
    generators = [generator(purpose, seed, n) for n in numbers]
    noise = np.stack([g.standard_normal(shape, np.float32) for g in generators])
    return torch.from_numpy(noise), torch.tensor([int(g.integers(timesteps)) for g in generators])


@dataclass(frozen=True)
class Batch:
    """Latents z0 and their noise (b, c, h, w), timesteps (b,) and conditioning (b, …)."""

    clean: Tensor
    noise: Tensor
    timestep: Tensor
    prompts: Conditioning


def dreambooth_loss(
    predict: Predict, batches: Sequence[Batch], prior_weight: float, solver: Solver, snr_gamma: float | None
) -> Tensor:
    """Returns the error on the pictures plus the weighted error on the class pictures, if there are any.

    `batches` are a batch of the pictures and, optionally, one of class pictures; both share one UNet pass.
    An error is the mean square of prediction − target. The target is ε, v = √ᾱ·ε − √(1 − ᾱ)·z0 or z0,
    according to the base's prediction type. With `snr_gamma` each error is weighted by `min_snr_weight`.
    """
    clean = torch.cat([batch.clean for batch in batches])
    noise = torch.cat([batch.noise for batch in batches])
    timestep = torch.cat([batch.timestep for batch in batches])
    alpha = solver.alphas[timestep]
    root, sigma = per_picture(alpha).sqrt(), (1 - per_picture(alpha)).sqrt()
    wanted = {"epsilon": noise, "v_prediction": root * noise - sigma * clean, "sample": clean}
    prompts = join(*(batch.prompts for batch in batches))
    prediction = predict(add_noise(clean, noise, alpha), timestep, prompts)
    error = mse_loss(prediction, wanted[solver.prediction_type], reduction="none")
    if snr_gamma is not None:
        error = error * per_picture(min_snr_weight(alpha, solver.prediction_type, snr_gamma))
    ours, *prior = error.split([len(batch.clean) for batch in batches])
    return ours.mean() + prior_weight * sum(errors.mean() for errors in prior)


def min_snr_weight(alpha: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Returns the weight of each timestep's error, in the shape of `alpha` (ᾱ).

    The weight of the squared error of ẑ0 is min(SNR, γ), with SNR = ᾱ / (1 − ᾱ): Hang et al. 2023, arXiv
    2303.09556, section 3.4. The squared error of ε is SNR times that of ẑ0, and that of v is SNR + 1 times,
    so their weights are divided by these factors. A small γ gives the noisy timesteps, which decide what is
    drawn, as much weight as those that only refine it.
    """
    snr = alpha / (1 - alpha)
    error_ratio = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / error_ratio[prediction_type]


def draw_class_pictures(
    spec: StyleSpec, checkpoint: Checkpoint, machine: Machine, tell: Callable[[str], None]
) -> None:
    """Lets the base draw pictures of `prior_prompt` until the folder of class pictures holds `prior_images`.

    Only the main process draws; the others wait for it. `tell` is called with a line of text before each
    picture.
    """
    from accelerate import PartialState

    folder = user_path(spec.prior_data or "")
    present = len(list_pictures(folder)) if folder.is_dir() else 0
    if machine.main and present < spec.prior_images:
        folder.mkdir(parents=True, exist_ok=True)
        pipe = open_pipeline(checkpoint, machine)
        names = ((i, folder / f"class-{i:04d}.png") for i in itertools.count())
        free = ((i, path) for i, path in names if not path.exists())
        for number in range(present + 1, spec.prior_images + 1):
            tell(f"drawing class picture {number} of {spec.prior_images}")
            i, path = next(free)
            random = torch.Generator().manual_seed(spec.seed + i)
            picture = pipe(spec.prior_prompt, generator=random).images[0]
            with replacing_output(path) as partial:
                picture.save(partial, format="PNG")
    PartialState().wait_for_everyone()


def open_pipeline(checkpoint: Checkpoint, machine: Machine) -> Any:
    """Returns diffusers' pipeline of a base, with the base's scheduler and without a safety checker.

    Raises CheckpointError if the base is not one complete diffusers folder.
    """
    from diffusers import DiffusionPipeline

    if any(c.folder != checkpoint.folder / name for name, c in checkpoint.components.items()):
        raise CheckpointError(
            "class pictures are drawn with diffusers, which needs a complete diffusers folder, and "
            f"{checkpoint.base} is not one",
            f"lcm-compile fuse --base {checkpoint.base} --no-lcm --out FOLDER makes one",
        )
    options: dict[str, Any] = {} if checkpoint.architecture == "sdxl" else {"safety_checker": None}
    with quiet_libraries():
        pipe = DiffusionPipeline.from_pretrained(
            checkpoint.folder,
            variant=checkpoint.components["unet"].variant,
            torch_dtype=machine.dtype or torch.float32,
            local_files_only=True,
            **options,
        ).to(machine.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
