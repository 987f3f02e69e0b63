#!/bin/sh
# diffusers 0.42.1: with timestep_spacing="trailing", which the few-step models ask for, set_timesteps(61) makes 62
# timesteps, of which the last is -1. So it is for 62 of the numbers of steps from 1 to 1000. A model would be asked
# for the noise at a timestep that does not exist.
#
# The timesteps are np.arange(1000, 0, -1000 / n), rounded, less 1. The length of that array is 1000 / (1000 / n)
# rounded up, and in floating point this is a little more than n for some n.
#
# Seen, in each of EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DDIMScheduler, DPMSolverMultistepScheduler:
#   60 steps asked: 60 timesteps, the last three are 49 32 16
#   61 steps asked: 62 timesteps, the last three are 32 15 -1
#   62 numbers of steps get a timestep more, the first are 61 103 121 122 201 206
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import diffusers

ONE_MORE = [61, 103, 121, 122, 201, 206]
for name in ("EulerDiscrete", "EulerAncestralDiscrete", "DDIM", "DPMSolverMultistep"):
    scheduler = getattr(diffusers, f"{name}Scheduler")(timestep_spacing="trailing")
    print(f"{name}Scheduler:")
    made = {}
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        made[steps] = [int(t) for t in scheduler.timesteps]
    for steps in (60, 61):
        print(f"  {steps} steps asked: {len(made[steps])} timesteps, the last three are", *made[steps][-3:])
    more = [steps for steps, timesteps in made.items() if len(timesteps) == steps + 1 and timesteps[-1] == -1]
    print(f"  {len(more)} numbers of steps get a timestep more, the first are", *more[:6])
    assert all(len(timesteps) == steps for steps, timesteps in made.items() if steps not in more)
    assert (len(more), more[:6]) == (62, ONE_MORE), more
    assert made[60][-3:] == [49, 32, 16] and made[61][-3:] == [32, 15, -1], (made[60], made[61])
PYTHON
