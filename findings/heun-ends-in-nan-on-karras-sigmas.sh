#!/bin/sh
# diffusers 0.42.1: DPMSolverMultistepScheduler with use_karras_sigmas, final_sigmas_type="sigma_min" and
# solver_type="heun" returns NaN at the last step from finite inputs, silently. Each of the three settings is sound
# with the others' alternatives, and so are all three together below 15 steps, where the last step is of first order.
#
# Karras' sigmas end at the schedule's least sigma, and "sigma_min" appends that sigma once more: the last step has
# length 0, by which heun's formula divides. The midpoint's does not.
#
# Seen, with Stable Diffusion's noise schedule and a model that predicts no noise:
#   karras True, sigma_min, heun, 20 steps: NaN at step 20, from sigma 0.029168 to sigma 0.029168
#   karras True, sigma_min, heun, 14 steps: finite
#   karras True, sigma_min, midpoint, 20 steps: finite
#   karras True, zero, heun, 20 steps: finite
#   karras False, sigma_min, heun, 20 steps: finite
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import DPMSolverMultistepScheduler

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
seen = []
for karras, final, solver, steps in (
    (True, "sigma_min", "heun", 20), (True, "sigma_min", "heun", 14), (True, "sigma_min", "midpoint", 20),
    (True, "zero", "heun", 20), (False, "sigma_min", "heun", 20),
):  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, use_karras_sigmas=karras, final_sigmas_type=final, solver_type=solver
    )
    scheduler.set_timesteps(steps)
    sample, result = torch.ones(1, 4, 8, 8), "finite"
    for number, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.step(torch.zeros_like(sample), timestep, sample).prev_sample
        if sample.isnan().any():
            before, after = scheduler.sigmas[number : number + 2].tolist()
            result = f"NaN at step {number + 1}, from sigma {before:.6f} to sigma {after:.6f}"
            break
    seen.append(result)
    print(f"karras {karras}, {final}, {solver}, {steps} steps: {result}")
assert seen == ["NaN at step 20, from sigma 0.029168 to sigma 0.029168", *["finite"] * 4], seen
PYTHON
