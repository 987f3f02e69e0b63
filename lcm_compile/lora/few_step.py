"""The few-step methods: how each draws, and where its weights are published. No other file names one.

A method's recipe is what its model card, or its paper's code, does with diffusers. Guidance 1 is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lcm_compile.checkpoint.checkpoint import FUSED_FEW_STEP, Checkpoint
from lcm_compile.checkpoint.families import FAMILIES, LCM_LORA_FILE
from lcm_compile.errors import UsageError, unknown_name
from lcm_compile.samplers import SAMPLERS
from lcm_compile.spec import BuildSpec

METHODS = ("lcm", "dmd2", "lightning", "hyper", "tcd", "pcm", "flash", "turbo")
NON_COMMERCIAL = ("cc-by-nc", "sai-nc", "stabilityai-nc")  # how the ids of such licences begin


@dataclass(frozen=True)
class FewStep:
    """How pictures are drawn with one kind of few-step weights.

    `method` and `variant` name it: `hyper:8-cfg`. `sampler`, `steps`, `guidance_scale` and `eta` are the
    defaults of a picture. `made_for` are the numbers of steps that the weights were trained for. `scheduler`
    are settings of the base's scheduler that change, by diffusers' names. `weights` has the LoRA that is
    published for a family, as `OWNER/NAME[:FILE]`, and `unets` a complete UNet where there is no LoRA;
    `licences` has their licences by repository, as the Hugging Face hub names them. `families` are those
    that alone draw so; empty means all.
    """

    method: str
    variant: str
    sampler: str
    steps: int
    made_for: tuple[int, ...]
    guidance_scale: float = 1.0
    eta: float | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    unets: Mapping[str, str] = field(default_factory=dict)
    families: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The method and the variant, as `--few-step` takes them."""
        return f"{self.method}:{self.variant}"

    def source(self, family: str) -> str | None:
        """Returns where a family's weights are published, or None."""
        return self.weights.get(family) or self.unets.get(family)


TRAILING = {"timestep_spacing": "trailing"}
DDIM = {**TRAILING, "clip_sample": False, "set_alpha_to_one": False}
# DMD2's timesteps are 1000·(N − i)/N − 1: LCM's, chosen from all 1000 of training and not from 50.
DMD2 = {"original_inference_steps": 1000}
LCM_STEPS = (1, 2, 3, 4, 5, 6, 7, 8)


def hyper(variant: str, file: str, **row: Any) -> FewStep:
    """Returns a row of Hyper-SD, whose files for SD1.5 and SDXL have the same names."""
    steps = int(variant.partition("-")[0])
    found = {name: f"ByteDance/Hyper-SD:Hyper-{file.format(kind)}" for name, kind in HYPER_KINDS.items()}
    return FewStep("hyper", variant, steps=steps, weights=found, **{"made_for": (steps,), **row})


def pcm(variant: str, file: str, **row: Any) -> FewStep:
    """Returns a row of PCM, whose files for SD1.5 and SDXL have the same names."""
    found = {
        name: f"wangfuyun/PCM_Weights:{name}/pcm_{name}_{file}_converted.safetensors"
        for name in ("sd15", "sdxl")
    }
    return FewStep("pcm", variant, weights=found, **row)


HYPER_KINDS = {"sd15": "SD15", "sdxl": "SDXL"}

# The first row of a method is its default.
FEW_STEP = (
    # Luo et al. 2023, arXiv 2311.05556.
    FewStep(
        "lcm",
        "4",
        sampler="lcm",
        steps=4,
        made_for=LCM_STEPS,
        weights={family.name: family.lcm_lora for family in FAMILIES.values() if family.lcm_lora},
    ),
    # Yin et al. 2024, arXiv 2405.14867. The one-step UNet starts in the middle of the schedule.
    FewStep(
        "dmd2",
        "4",
        sampler="lcm",
        steps=4,
        made_for=(4,),
        scheduler=DMD2,
        weights={"sdxl": "tianweiy/DMD2:dmd2_sdxl_4step_lora_fp16.safetensors"},
    ),
    FewStep(
        "dmd2",
        "1",
        sampler="lcm",
        steps=1,
        made_for=(1,),
        scheduler={**DMD2, "timesteps": [399]},
        unets={"sdxl": "tianweiy/DMD2:dmd2_sdxl_1step_unet_fp16.bin"},
    ),
    # Lin et al. 2024, arXiv 2402.13929. The one-step UNet predicts x0.
    *(
        FewStep(
            "lightning",
            str(steps),
            sampler="euler",
            steps=steps,
            made_for=(steps,),
            scheduler=TRAILING,
            weights={"sdxl": f"ByteDance/SDXL-Lightning:sdxl_lightning_{steps}step_lora.safetensors"},
        )
        for steps in (4, 2, 8)
    ),
    FewStep(
        "lightning",
        "1",
        sampler="euler",
        steps=1,
        made_for=(1,),
        scheduler={**TRAILING, "prediction_type": "sample"},
        unets={"sdxl": "ByteDance/SDXL-Lightning:sdxl_lightning_1step_unet_x0.safetensors"},
    ),
    # Ren et al. 2024, arXiv 2404.13686. The one-step LoRA serves more steps too, with less of η.
    *(
        hyper(str(steps), f"{{}}-{steps}steps-lora.safetensors", sampler="ddim", scheduler=TRAILING)
        for steps in (4, 2, 8)
    ),
    hyper("1", "{}-1step-lora.safetensors", sampler="tcd", eta=1.0, made_for=tuple(range(1, 9))),
    *(
        hyper(
            f"{steps}-cfg",
            f"{{}}-{steps}steps-CFG-lora.safetensors",
            sampler="ddim",
            scheduler=TRAILING,
            guidance_scale=5.0,
        )
        for steps in (8, 12)
    ),
    FewStep(
        "hyper",
        "1-unet",
        sampler="lcm",
        steps=1,
        made_for=(1,),
        scheduler={"timesteps": [800]},
        unets={"sdxl": "ByteDance/Hyper-SD:Hyper-SDXL-1step-Unet.safetensors"},
    ),
    # Zheng et al. 2024, arXiv 2402.19159.
    FewStep(
        "tcd",
        "4",
        sampler="tcd",
        steps=4,
        made_for=tuple(range(2, 51)),
        eta=0.3,
        weights={
            "sd15": f"h1t/TCD-SD15-LoRA:{LCM_LORA_FILE}",
            "sd21": f"h1t/TCD-SD21-base-LoRA:{LCM_LORA_FILE}",
            "sdxl": f"h1t/TCD-SDXL-LoRA:{LCM_LORA_FILE}",
        },
    ),
    # Wang et al. 2024, arXiv 2405.18407: for little guidance, for guidance, and like an LCM.
    *(
        pcm(str(n), f"smallcfg_{n}step", sampler="ddim", steps=n, made_for=(n,), scheduler=DDIM)
        for n in (4, 2, 8, 16)
    ),
    *(
        pcm(
            f"{n}-cfg",
            f"normalcfg_{n}step",
            sampler="ddim",
            steps=n,
            made_for=(n,),
            scheduler=DDIM,
            guidance_scale=7.5,
        )
        for n in (4, 8, 16)
    ),
    pcm("lcm", "lcmlike_lora", sampler="lcm", steps=4, made_for=LCM_STEPS),
    # Chadebec et al. 2024, arXiv 2406.02347. Its cards ask LCMScheduler for trailing timesteps, in vain.
    FewStep(
        "flash",
        "4",
        sampler="lcm",
        steps=4,
        made_for=(2, 3, 4),
        weights={
            "sd15": f"jasperai/flash-sd:{LCM_LORA_FILE}",
            "sdxl": f"jasperai/flash-sdxl:{LCM_LORA_FILE}",
        },
    ),
    # Sauer et al. 2023, arXiv 2311.17042: complete models, stabilityai/sdxl-turbo and stabilityai/sd-turbo.
    FewStep("turbo", "1", sampler="euler-a", steps=1, made_for=(1, 2, 3, 4), scheduler=TRAILING),
    FewStep(
        "turbo", "1", sampler="euler", steps=1, made_for=(1, 2, 3, 4), scheduler=TRAILING, families=("sd21",)
    ),
)

# Of the repositories above and of the Turbo models, as the hub names them; PCM's states none.
LICENCES = {
    "latent-consistency/lcm-lora-sdv1-5": "openrail++",
    "latent-consistency/lcm-lora-sdxl": "openrail++",
    "latent-consistency/lcm-lora-ssd-1b": "openrail++",
    "tianweiy/DMD2": "cc-by-nc-4.0",
    "ByteDance/SDXL-Lightning": "openrail++",
    "ByteDance/Hyper-SD": "openrail++",
    "h1t/TCD-SD15-LoRA": "mit",
    "h1t/TCD-SD21-base-LoRA": "mit",
    "h1t/TCD-SDXL-LoRA": "mit",
    "jasperai/flash-sd": "cc-by-nc-4.0",
    "jasperai/flash-sdxl": "cc-by-nc-nd-4.0",
    "stabilityai/sdxl-turbo": "sai-nc-community",
    "stabilityai/sd-turbo": "stabilityai-nc-research-community",
}


def find_few_step(name: str, family: str | None) -> FewStep:
    """Returns the row of `METHOD` or `METHOD:VARIANT` for a base of a family, or of none that is known.

    Raises UsageError if there is no such method or variant.
    """
    method, colon, variant = name.partition(":")
    if method not in METHODS:
        raise unknown_name("few-step method", method, METHODS)
    rows = [row for row in FEW_STEP if row.method == method]
    variant = variant if colon else rows[0].variant
    fitting = [row for row in rows if row.variant == variant]
    if not fitting:
        known = dict.fromkeys(row.name for row in rows)
        raise UsageError(f"there is no {method} of {variant!r}", f"--few-step {' or '.join(known)}")
    return max(fitting, key=lambda row: (family in row.families, not row.families))


def variants_of(method: str) -> tuple[str, ...]:
    """Returns the variants of a method that are LoRAs, the default first."""
    return tuple(row.variant for row in FEW_STEP if row.method == method and row.weights)


def few_step_of(spec: BuildSpec, checkpoint: Checkpoint) -> FewStep | None:
    """Returns how a spec's pictures are drawn in few steps, or None for an ordinary base or a full LCM.

    A base in which `fuse` noted its few-step weights, or whose own scheduler is LCM's or TCD's, draws as they
    do. Raises UsageError as
    find_few_step does, or if the base is a full LCM and another method is asked for.
    """
    family = checkpoint.family.name if checkpoint.family else None
    if checkpoint.has_guidance_embedding:
        if spec.few_step not in (None, "lcm"):
            raise UsageError(
                f"{spec.base} is a full LCM, and can't be drawn with as {spec.few_step}",
                "drop --few-step, or give the base that it was made of",
            )
        return None
    if spec.few_step is not None:
        return find_few_step(spec.few_step, family)
    if fused := checkpoint.scheduler_config.get(FUSED_FEW_STEP):
        return find_few_step(str(fused), family)
    if not spec.no_lcm:
        return find_few_step("lcm", family)
    own = OWN.get(str(checkpoint.scheduler_config.get("_class_name")))
    return find_few_step(own, family) if own else None


OWN = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}  # the methods with a scheduler of their own
# An ordinary base: the sampler for those whose own scheduler is none of SAMPLERS, and the steps of a picture.
ORDINARY_SAMPLER, ORDINARY_STEPS = "euler", 25
ORDINARY_GUIDANCE = {"sd15": 7.5, "sdxl": 5.0}  # the defaults of diffusers' pipelines, by architecture


@dataclass(frozen=True)
class Defaults:
    """What is drawn with if nothing else is asked for; `eta` is for this sampler alone."""

    sampler: str
    steps: int
    guidance_scale: float
    eta: float | None = None


def defaults_of(row: FewStep | None, checkpoint: Checkpoint) -> Defaults:
    """Returns the defaults of a base with few-step weights, of a full LCM, or of an ordinary base.

    An ordinary base has its own scheduler's sampler if there is one of it.
    """
    if row is not None:
        return Defaults(row.sampler, row.steps, row.guidance_scale, row.eta)
    if checkpoint.has_guidance_embedding:
        return Defaults("lcm", 4, checkpoint.default_guidance)
    config = checkpoint.scheduler_config
    sde = config.get("algorithm_type") == "sde-dpmsolver++"
    samplers = {sampler.scheduler: name for name, sampler in reversed(SAMPLERS.items())}
    own = samplers.get(str(config.get("_class_name")), ORDINARY_SAMPLER)
    own = "dpm++2m-sde" if own == "dpm++2m" and sde else own
    return Defaults(own, ORDINARY_STEPS, ORDINARY_GUIDANCE[checkpoint.architecture])


def licence_of(source: str) -> str | None:
    """Returns the licence of the weights of a hub repository, `OWNER/NAME` or `OWNER/NAME:FILE`, or None."""
    return LICENCES.get(source.partition(":")[0])


def is_non_commercial(licence: str | None) -> bool:
    """Returns whether a licence forbids commercial use."""
    return licence is not None and licence.startswith(NON_COMMERCIAL)
