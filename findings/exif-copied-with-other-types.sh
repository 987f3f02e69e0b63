#!/bin/sh
# Pillow 13.0.0 with piexif 1.1.3: a picture opened and saved with its own EXIF block, `save(exif=getexif())`, has
# the comment and the maker note under the type of a list of numbers instead of raw bytes, and piexif can no longer
# read the comment. Pillow itself reads both pictures alike, so the change does not show in it.
#
# Pillow forgets the type that a tag of the Exif part had in the file, knows none for these two, and takes BYTE for
# any bytes; the EXIF standard wants UNDEFINED.
#
# Seen:
#   original.jpg: user comment is of type 7, maker note of type 7; piexif reads 'a cat'
#   copy.jpg: user comment is of type 1, maker note of type 1; piexif raises ValueError
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile pillow==13.0.0 piexif==1.1.3
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import piexif, piexif.helper
from PIL import Image

COMMENT, NOTE = piexif.ExifIFD.UserComment, piexif.ExifIFD.MakerNote
tags = {COMMENT: piexif.helper.UserComment.dump("a cat", "unicode"), NOTE: b"a note of the maker"}
Image.new("RGB", (8, 8)).save("original.jpg", exif=piexif.dump({"Exif": tags}))
with Image.open("original.jpg") as picture:
    picture.save("copy.jpg", exif=picture.getexif())


def type_of(data, tag):
    order = "little" if b"Exif\0\0II" in data else "big"
    place = data.index(tag.to_bytes(2, order), data.index(b"Exif\0\0"))
    return int.from_bytes(data[place + 2 : place + 4], order)


seen = {}
for name in ("original.jpg", "copy.jpg"):
    data = open(name, "rb").read()
    types = type_of(data, COMMENT), type_of(data, NOTE)
    try:
        text = f"reads {piexif.helper.UserComment.load(piexif.load(name)['Exif'][COMMENT])!r}"
    except ValueError:
        text = "raises ValueError"
    print(f"{name}: user comment is of type {types[0]}, maker note of type {types[1]}; piexif {text}")
    seen[name] = (*types, text)
    assert Image.open(name).getexif().get_ifd(0x8769)[COMMENT] == tags[COMMENT]
assert seen == {"original.jpg": (7, 7, "reads 'a cat'"), "copy.jpg": (1, 1, "raises ValueError")}, seen
PYTHON
