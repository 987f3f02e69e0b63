#!/bin/sh
# sd-prompt-reader 1.3.5: it cannot read back a JPEG that it wrote itself if the prompt has one of the letters from
# Ø to ß (U+00D8 to U+00DF: Ø Ù Ú Û Ü Ý Þ ß). It reports a wrong format and shows no prompt. Their small letters,
# and every other accented letter of Latin-1, are read.
#
# It first decodes the comment as UTF-16 with the low byte first, to see whether SwarmUI wrote it, while it is
# written with the high byte first. The eight letters then look like the first half of a pair, which does not
# decode, and that error ends the reading.
#
# Seen:
#   letters from À to ÿ that it writes and cannot read: ØÙÚÛÜÝÞß
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile --no-deps sd-prompt-reader==1.3.5 piexif==1.1.3 pillow==10.3.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from PIL import Image
from sd_prompt_reader.image_data_reader import ImageDataReader

Image.new("RGB", (8, 8)).save("plain.jpg")
settings = "Steps: 4, Sampler: LCM, CFG scale: 1.0, Seed: 1, Size: 8x8, Model: some"
unread = ""
for letter in map(chr, range(0xC0, 0x100)):
    prompt = f"a sign that says {letter}"
    ImageDataReader.save_image("plain.jpg", "written.jpg", "JPEG", f"{prompt}\nNegative prompt: blur\n{settings}")
    reader = ImageDataReader("written.jpg")
    if reader.status.name != "READ_SUCCESS" or reader.positive != prompt:
        assert reader.status.name == "FORMAT_ERROR", reader.status
        unread += letter
print("letters from À to ÿ that it writes and cannot read:", unread)
assert unread == "ØÙÚÛÜÝÞß", unread
PYTHON
