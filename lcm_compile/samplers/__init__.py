"""The samplers: the timesteps of a picture, the arithmetic of each step, and the scale of the first noise.

Each is the scheduler of diffusers of its name, made from the same config. Latents are always the model's
input, √ᾱ·x0 + √(1 − ᾱ)·ε. Schedulers that count noise in σ = √((1 − ᾱ)/ᾱ) keep latents of √(σ² + 1) times
that size, and the steps here have that factor in their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lcm_compile.errors import UsageError
from lcm_compile.samplers.consistency import lcm, tcd
from lcm_compile.samplers.ddim import ddim
from lcm_compile.samplers.dpm_solver import dpm_solver_2m
from lcm_compile.samplers.euler import euler, euler_ancestral
from lcm_compile.samplers.step import Schedule
from lcm_compile.scheduler import SchedulerSettings


@dataclass(frozen=True)
class Sampler:
    """A sampler: its name in A1111's web UI, diffusers' class, and what gives its schedule.

    `schedule` is called with the number of steps, the settings and η, which only matters if `takes_eta`.
    `in_sigmas` says that the settings of σ's spacing count. `options` are the settings of diffusers' class
    that make it this sampler.
    """

    label: str
    scheduler: str
    schedule: Callable[[int, SchedulerSettings, float | None], Schedule]
    takes_eta: bool = False
    in_sigmas: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def euler_sampler(label: str, karras: bool = False) -> Sampler:
    """Returns Euler's sampler, with Karras' σ or those of the timesteps."""
    options = {"use_karras_sigmas": True} if karras else {}
    method = partial(euler, use_karras=karras)
    return Sampler(label, "EulerDiscreteScheduler", method, in_sigmas=True, options=options)


def dpm_sampler(label: str, karras: bool = False, sde: bool = False) -> Sampler:
    """Returns DPM-Solver++'s sampler for the ODE or the SDE, with Karras' σ or those of the timesteps."""
    options: dict[str, Any] = {"use_karras_sigmas": True} if karras else {}
    options |= {"algorithm_type": "sde-dpmsolver++"} if sde else {}
    method = partial(dpm_solver_2m, use_karras=karras, sde=sde)
    return Sampler(label, "DPMSolverMultistepScheduler", method, in_sigmas=True, options=options)


SAMPLERS = {
    "lcm": Sampler("LCM", "LCMScheduler", lcm),
    "tcd": Sampler("TCD", "TCDScheduler", tcd, takes_eta=True),
    "ddim": Sampler("DDIM", "DDIMScheduler", ddim, takes_eta=True),
    "euler": euler_sampler("Euler"),
    "euler-karras": euler_sampler("Euler Karras", karras=True),
    "euler-a": Sampler("Euler a", "EulerAncestralDiscreteScheduler", euler_ancestral, in_sigmas=True),
    "dpm++2m": dpm_sampler("DPM++ 2M"),
    "dpm++2m-karras": dpm_sampler("DPM++ 2M Karras", karras=True),
    "dpm++2m-sde": dpm_sampler("DPM++ 2M SDE", sde=True),
    "dpm++2m-sde-karras": dpm_sampler("DPM++ 2M SDE Karras", karras=True, sde=True),
}


def schedule(sampler: str, num_steps: int, settings: SchedulerSettings, eta: float | None = None) -> Schedule:
    """Returns the schedule of a picture drawn in `num_steps`.

    `sampler` is a name in SAMPLERS. `eta` is the share of noise that is added again in each step, from 0 to
    1; None is 0. Raises UsageError if it can't draw in that many steps, with these settings
    or with that share.
    """
    chosen = SAMPLERS[sampler]
    if eta is not None and not chosen.takes_eta:
        able = ", ".join(name for name, other in SAMPLERS.items() if other.takes_eta)
        raise UsageError(f"the sampler {sampler} has no eta", f"only {able} have one")
    if chosen.schedule not in (lcm, tcd) and not 1 <= num_steps <= settings.num_train_timesteps:
        raise UsageError(f"steps must be from 1 to {settings.num_train_timesteps}, not {num_steps}")
    if chosen.in_sigmas and settings.other_spacings:
        raise UsageError(
            f"the config of the base's scheduler has {' and '.join(settings.other_spacings)}, which the "
            f"sampler {sampler} does not follow here",
            "--sampler ddim; or take it out of scheduler/scheduler_config.json, and build again",
        )
    return chosen.schedule(num_steps, settings, eta)
