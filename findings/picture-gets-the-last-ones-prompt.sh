#!/bin/sh
# sd-parsers 0.6: in a program that reads one JPEG after another it now and then returns the prompt of the picture
# before for one that has another prompt, or none at all. It keeps the last comment that it read, and takes a
# picture for the same one again if Python's id() is the same; but Python gives the id of a picture that is gone to
# a new one. A new ParserManager for each picture does not help.
#
# Seen (the numbers vary from run to run):
#   picture 6 has 'prompt 6', and is said to have 'prompt 5'
#   picture 38 has no prompt, and is said to have 'prompt 37'
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile sd-parsers==0.6 pillow==13.0.0 piexif==1.1.3
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import random
import piexif, piexif.helper
from PIL import Image
from sd_parsers import ParserManager


def write(prompt):
    options = {}
    if prompt:
        text = f"{prompt}\nNegative prompt: blur\nSteps: 4, Sampler: LCM, CFG scale: 1.0, Seed: 1, Size: 8x8"
        comment = {piexif.ExifIFD.UserComment: piexif.helper.UserComment.dump(text, "unicode")}
        options["exif"] = piexif.dump({"Exif": comment})
    Image.new("RGB", (8, 8)).save("picture.jpg", **options)


def read():
    with Image.open("picture.jpg") as picture:
        info = ParserManager().parse(picture)
    return info.prompts[0].value if info else None


def first_wrong(every_second_has_none):
    for number in range(20_000):
        others = [Image.new("L", (1, 1)) for _ in range(random.randrange(100))]  # what else the program holds
        prompt = None if every_second_has_none and number % 2 == 0 else f"prompt {number}"
        write(prompt)
        del others[::2]
        told = read()
        if told and told != prompt:
            has = f"{prompt!r}" if prompt else "no prompt"
            print(f"picture {number} has {has}, and is said to have {told!r}")
            return told, number
    raise SystemExit("every picture is said to have its own prompt")


for every_second_has_none in (False, True):
    told, number = first_wrong(every_second_has_none)
    assert told != f"prompt {number}"
PYTHON
