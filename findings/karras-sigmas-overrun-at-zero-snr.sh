#!/bin/sh
# diffusers 0.42.1: DPMSolverMultistepScheduler with Karras' sigmas on a schedule of zero terminal SNR
# (rescale_betas_zero_snr, v_prediction) begins with the second sigma and raises an IndexError at the last step, from
# 21 steps on. 20 steps, or the usual schedule, or the usual sigmas, draw as they should.
#
# The largest sigma is 4096 there, and Karras' next ones are so near that they are rounded to the same timestep. The
# place to begin is looked up by the timestep, and of two equal ones the second is taken, on purpose, for pictures
# that begin in the middle. Every step is then one sigma too far.
#
# Seen:
#   zero SNR True, karras True, 50 steps: timesteps 999 999 999, sigmas 4096 3642 3231, first step to sigma 3231
#     step 50: IndexError: index 51 is out of bounds for dimension 0 with size 51
#   zero SNR True, karras True, 21 steps: timesteps 999 999 998, sigmas 4096 3060 2257, first step to sigma 2257
#     step 21: IndexError: index 22 is out of bounds for dimension 0 with size 22
#   zero SNR True, karras True, 20 steps: timesteps 999 998 998, sigmas 4096 3012 2184, first step to sigma 3012
#     all steps done
#   zero SNR False, karras True, 50 steps: timesteps 999 985 970, sigmas 14.61 13.43 12.33, first step to sigma 13.43
#     all steps done
#   zero SNR True, karras False, 50 steps: timesteps 999 979 959, sigmas 4096 108 51.62, first step to sigma 108
#     all steps done
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import DPMSolverMultistepScheduler

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction")
seen = []
for zero_snr, karras, steps in (
    (True, True, 50), (True, True, 21), (True, True, 20), (False, True, 50), (True, False, 50),
):  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(**BETAS, rescale_betas_zero_snr=zero_snr, use_karras_sigmas=karras)
    scheduler.set_timesteps(steps)
    sample, result = torch.ones(1, 4, 8, 8), "all steps done"
    for number, timestep in enumerate(scheduler.timesteps, 1):
        try:
            sample = scheduler.step(torch.zeros_like(sample), timestep, sample).prev_sample
        except IndexError as error:
            result = f"step {number}: IndexError: {error}"
        if number == 1:
            first = scheduler.step_index
    times = " ".join(str(t) for t in scheduler.timesteps[:3].tolist())
    sigmas = [f"{sigma:.4g}" for sigma in scheduler.sigmas.tolist()]
    print(f"zero SNR {zero_snr}, karras {karras}, {steps} steps: timesteps {times}, ", end="")
    print(f"sigmas {' '.join(sigmas[:3])}, first step to sigma {sigmas[first]}\n  {result}")
    seen.append((first, result))
expected = "step {0}: IndexError: index {1} is out of bounds for dimension 0 with size {1}"
failed = [(2, expected.format(steps, steps + 1)) for steps in (50, 21)]
assert seen == [*failed, *[(1, "all steps done")] * 3], seen
PYTHON
