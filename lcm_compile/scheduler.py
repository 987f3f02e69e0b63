"""The scheduler settings of a checkpoint, and what every sampler and training take from them.

The timesteps, the rounding and the defaults are those of diffusers' LCMScheduler, which follows Luo et al.
2023, "Latent Consistency Models", section 4 and appendix. It uses NumPy and plain floats, so that running
needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from lcm_compile.errors import UsageError
from lcm_compile.system.dataclass_json import from_json

SIGMA_DATA = 0.5  # the standard deviation of the data that the boundary scalings assume
# How diffusers names the schedulers of models whose noisy latents are not √ᾱ·x0 + √(1 − ᾱ)·ε. Their configs
# would be read without an error, and the pictures would be noise.
OTHER_NOISE = ("EDM", "FlowMatch", "CosineDPMSolver", "KarrasVe", "ScoreSdeVe", "CMStochastic")
# Settings that space σ by rules that no sampler here has, each with the values that change nothing.
OTHER_SPACINGS = {
    "use_exponential_sigmas": (None, False),
    "use_beta_sigmas": (None, False),
    "use_lu_lambdas": (None, False),
    "interpolation_type": (None, "linear"),
    "timestep_type": (None, "discrete"),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "lambda_min_clipped": (None, -math.inf),
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class SchedulerSettings:
    """The scheduler settings of a checkpoint. Names are diffusers', and defaults are those of its classes.

    Those that may be None are so if the checkpoint has none; then each sampler has a default of its own.
    `other_spacings` names the settings of σ's spacing that no sampler here follows. `timesteps` are those
    that LCM and TCD take for a picture of so many steps. Raises ValueError if LCM can't sample with the
    settings.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    original_inference_steps: int = 50
    clip_sample: bool | None = None
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    prediction_type: str = "epsilon"
    timestep_scaling: float = 10.0
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str | None = None
    steps_offset: int | None = None
    set_alpha_to_one: bool | None = None
    use_karras_sigmas: bool = False
    final_sigmas_type: str = "zero"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    other_spacings: tuple[str, ...] = ()
    timesteps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type is {self.prediction_type!r}, and must be one of "
                f"{', '.join(PREDICTION_TYPES)}"
            )
        if not 1 <= self.original_inference_steps <= self.num_train_timesteps:
            raise ValueError(
                f"original_inference_steps is {self.original_inference_steps}, and must be from 1 to "
                f"num_train_timesteps, which is {self.num_train_timesteps}"
            )
        if not 0 <= self.dynamic_thresholding_ratio <= 1:
            raise ValueError(
                f"dynamic_thresholding_ratio is {self.dynamic_thresholding_ratio}, and must be from 0 to 1"
            )
        betas = self.trained_betas or (self.beta_start, self.beta_end)
        if not all(0 <= beta <= 1 for beta in betas):
            raise ValueError(f"the betas, from {betas[0]} to {betas[-1]}, are not all between 0 and 1")
        alphas = alphas_cumprod(self)
        if len(alphas) != self.num_train_timesteps:
            raise ValueError(f"there are {len(betas)} betas for {self.num_train_timesteps} timesteps")
        if not np.isfinite(alphas).all():
            raise ValueError("the betas give no noise schedule: a part of it is NaN")
        if self.prediction_type == "epsilon" and alphas.min() == 0:
            zero = "rescale_betas_zero_snr is true" if self.rescale_betas_zero_snr else "a beta is 1"
            raise ValueError(
                f"prediction_type is 'epsilon' and {zero}: where only noise is left (zero SNR), a model that "
                "predicts the noise says nothing of the picture; such models have prediction_type "
                "'v_prediction'"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as a dictionary for JSON, which from_dict reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> SchedulerSettings:
        """Returns the settings in a diffusers scheduler config of any class.

        Raises ValueError if LCM can't sample with them. A config without `beta_*` keys gets the defaults of
        LCMScheduler, as in `LCMScheduler.from_config`.
        """
        kind = str(config.get("_class_name", ""))
        if kind.startswith(OTHER_NOISE) or config.get("use_flow_sigmas"):
            raise ValueError(
                f"the model was trained for {kind or 'use_flow_sigmas'}, which adds noise by another rule "
                "than LCM does (EDM, flow matching or another)"
            )
        known = {field.name for field in fields(cls)}
        other = [name for name, usual in OTHER_SPACINGS.items() if config.get(name) not in usual]
        found = {k: v for k, v in config.items() if k in known and v is not None}
        return from_json(cls, {"other_spacings": other, **found})


def alphas_cumprod(settings: SchedulerSettings) -> np.ndarray:
    """Returns ᾱ_t for every training timestep: float32 (num_train_timesteps,).

    Raises ValueError for an unknown beta schedule.
    """
    n = settings.num_train_timesteps
    if settings.trained_betas is not None:
        betas = np.asarray(settings.trained_betas, np.float64)
    elif settings.beta_schedule == "linear":
        betas = np.linspace(settings.beta_start, settings.beta_end, n)
    elif settings.beta_schedule == "scaled_linear":
        betas = np.linspace(settings.beta_start**0.5, settings.beta_end**0.5, n) ** 2
    elif settings.beta_schedule == "squaredcos_cap_v2":
        t = np.arange(n + 1) / n
        alpha_bar = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    else:
        raise ValueError(
            f"beta_schedule is {settings.beta_schedule!r}, and must be one of linear, scaled_linear, "
            "squaredcos_cap_v2"
        )
    alpha_bar = np.cumprod(1 - betas)
    if settings.rescale_betas_zero_snr:  # Lin et al. 2023, arXiv 2305.08891, Algorithm 1
        root = np.sqrt(alpha_bar)
        with np.errstate(invalid="ignore"):  # NaN for betas of zero, which the settings refuse
            alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alpha_bar.astype(np.float32)


def boundary_scalings(timestep: int, timestep_scaling: float = 10.0) -> tuple[float, float]:
    """Returns c_skip and c_out of the consistency function f(x, t) = c_skip·x + c_out·x̂0 at a timestep."""
    scaled = timestep * timestep_scaling
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / math.sqrt(scaled**2 + SIGMA_DATA**2)
    return c_skip, c_out


def lcm_timesteps(num_steps: int, settings: SchedulerSettings) -> list[int]:
    """Returns the timesteps of a picture drawn in `num_steps`, from noisy to clean.

    Raises UsageError if `num_steps` is not from 1 to `original_inference_steps`.
    """
    most = settings.original_inference_steps
    if not 1 <= num_steps <= most:
        raise UsageError(f"steps must be from 1 to {most}, not {num_steps}")
    if settings.timesteps and len(settings.timesteps) == num_steps:
        return list(settings.timesteps)
    skip = settings.num_train_timesteps // most
    origin = np.arange(1, most + 1)[::-1] * skip - 1
    indices = np.floor(np.linspace(0, most, num=num_steps, endpoint=False)).astype(np.int64)
    return [int(t) for t in origin[indices]]
