#!/bin/sh
# diffusers 0.42.1: TCDScheduler draws at other timesteps if original_inference_steps is given, though the number that
# is given never counts: 50, which is the scheduler's own default, moves them just as 100 or 1000 does. LCMScheduler,
# from which the argument comes, keeps its timesteps when it is given its default.
#
# Seen, the timesteps of 4 steps:
#   TCDScheduler, original_inference_steps not given (its config has 50): 999 759 499 259
#   TCDScheduler, original_inference_steps=50: 999 749 499 249
#   TCDScheduler, original_inference_steps=100: 999 749 499 249
#   TCDScheduler, original_inference_steps=1000: 999 749 499 249
#   LCMScheduler, original_inference_steps not given (its config has 50): 999 759 499 259
#   LCMScheduler, original_inference_steps=50: 999 759 499 259
#   LCMScheduler, original_inference_steps=100: 999 749 499 249
#   LCMScheduler, original_inference_steps=1000: 999 749 499 249
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from diffusers import LCMScheduler, TCDScheduler

fine, coarse = [999, 749, 499, 249], [999, 759, 499, 259]
for kind, expected in ((TCDScheduler, [coarse, fine, fine, fine]), (LCMScheduler, [coarse, coarse, fine, fine])):
    seen = []
    for given in (None, 50, 100, 1000):
        scheduler = kind()
        assert scheduler.config.original_inference_steps == 50
        scheduler.set_timesteps(4, original_inference_steps=given)
        seen.append(scheduler.timesteps.tolist())
        how = "=" + str(given) if given else " not given (its config has 50)"
        print(f"{kind.__name__}, original_inference_steps{how}:", *seen[-1])
    assert seen == expected, seen
PYTHON
