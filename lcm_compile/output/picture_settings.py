"""The settings that a picture was drawn with, as text in its file.

All settings are there as JSON, which `run --again` reads: in a PNG as the text `lcm-compile`, in a JPEG or
WebP in XMP. Next to it are those that other programs look for, as A1111's web UI writes them: in a PNG as the
text `parameters`, in a JPEG or WebP as the EXIF tag UserComment.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.errors import LcmCompileError, UsageError
from lcm_compile.pipeline.control_picture import for_each
from lcm_compile.pipeline.hires import larger_folder
from lcm_compile.pipeline.request import UPSCALERS, Request
from lcm_compile.samplers import SAMPLERS
from lcm_compile.spec import BuildSpec, LoraSpec
from lcm_compile.system.dataclass_json import from_json
from lcm_compile.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

    from lcm_compile.bundles.bundle import EngineBundle

SETTINGS = "lcm-compile"  # the name of the JSON text in a PNG
NAMESPACE = "urn:lcm-compile:"  # of the JSON text in XMP
WEIGHT_FILES = (".safetensors", ".ckpt", ".bin")  # the endings of a base that is one file
SEGMENT = 65_000  # bytes: what a JPEG has room for in EXIF and in XMP each
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:lcm="{namespace}" lcm:settings={text}/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


@dataclass(frozen=True)
class Origin:
    """What drew a picture: the request, with the picture's index, and the bundle's digest.

    `model` is the name of the base, without a path. `weights` says that they are random. `few_step` are its
    few-step weights, as METHOD:VARIANT. `lora_sha256` are the digests of the LoRAs in its slots. `larger` is
    the digest of the bundle's size that drew the second pass, if there was one.
    """

    request: Request
    bundle: str
    model: str
    software: str
    weights: str | None = None
    few_step: str | None = None
    lora_sha256: tuple[str, ...] = ()
    larger: str | None = None


def origin_of(bundle: EngineBundle, request: Request) -> Origin:
    """Returns what draws a picture, for its file."""
    manifest = bundle.manifest
    if request.control and not request.control_weight:  # which the bundle's own then stands for
        request = replace(request, control_weight=manifest.pipeline.control_weights)
    if request.ip_image and request.ip_weight is None:
        request = replace(request, ip_weight=manifest.pipeline.ip_weight)
    weights = manifest.pipeline.few_step
    return Origin(
        request,
        bundle.digest,
        model_name(manifest.spec),
        f"lcm-compile {__version__}",
        manifest.spec.weights,
        weights.name if weights else None,
        digests_of(request.loras),
        larger_digest(bundle, request),
    )


def larger_digest(bundle: EngineBundle, request: Request) -> str | None:
    """Returns the digest of the size of a bundle that draws a request's second pass, if it has one.

    Raises UsageError if the bundle has no such size.
    """
    if request.hires is None:
        return None
    return read_manifest(larger_folder(bundle.folder, request, bundle.manifest.pipeline.shape))[1]


def model_name(spec: BuildSpec) -> str:
    """Returns the name of a base, without its folder and ending."""
    name = Path(spec.base).name
    for ending in WEIGHT_FILES:
        name = name.removesuffix(ending)
    return name


def digests_of(loras: Sequence[LoraSpec]) -> tuple[str, ...]:
    """Returns the sha256 of each LoRA's file. Raises LoraError if one can't be found."""
    if not loras:
        return ()
    from lcm_compile.lora.find import find_lora, lora_digest
    from lcm_compile.system.cache import Digests

    digests = Digests()
    found = tuple(lora_digest(find_lora(lora), digests) for lora in loras)
    digests.save()
    return found


def settings_of(origin: Origin) -> dict[str, Any]:
    """Returns the settings of a picture for its JSON text, which `read_origin` reads."""
    return asdict(origin)


def control_facts(request: Request) -> list[dict[str, Any]]:
    """Returns each control picture of a request: its file's name, its digest, and how strongly it guides."""
    count = len(request.control)
    numbers = zip(
        request.control,
        for_each(request.control_weight, count, 1.0),
        for_each(request.control_start, count, 0.0),
        for_each(request.control_end, count, 1.0),
        strict=True,
    )
    return [
        {
            "file": one.name,
            "sha256": one.sha256,
            "detector": one.detector or None,
            "weight": weight,
            "start": start,
            "end": end,
        }
        for one, weight, start, end in numbers
    ]


def hires_facts(request: Request) -> dict[str, Any] | None:
    """Returns how a second pass is drawn, with the defaults in place of None; None without one."""
    if request.hires is None:
        return None
    return {
        "factor": request.hires,
        "upscaler": request.upscaler,
        "strength": request.second_strength,
        "steps": request.second_steps,
    }


def parameters(origin: Origin, width: int, height: int) -> str:
    """Returns the settings of a picture of this size in pixels, as A1111's web UI writes them.

    Readers look for `Negative prompt:` and a line that begins with `Steps:`, so a prompt's own lose the
    colon. They split the last line at commas and colons, so no value has one, or quotes. The size of a
    picture of two passes is that of the first.
    """
    request = origin.request
    factor, second = request.hires or 1, hires_facts(request) or {}
    values = {
        "Steps": request.steps,
        "Sampler": SAMPLERS[request.sampler].label,
        "CFG scale": request.guidance_scale,
        "Seed": request.seed,
        **({"Denoising strength": request.denoising_strength} if request.image else {}),
        **({"Denoising strength": second["strength"]} if second else {}),
        "Size": f"{round(width / factor)}x{round(height / factor)}",
        "Model hash": origin.bundle[:10],
        "Model": origin.model,
        **({"Few-step weights": origin.few_step} if origin.few_step else {}),
        **{
            f"ControlNet {i}": f"{fact['file']} weight {fact['weight']:g} from {fact['start']:g} to "
            f"{fact['end']:g}"
            for i, fact in enumerate(control_facts(request))
        },
        **(
            {"IP-Adapter": f"{image.name or image.sha256[:12]} weight {request.ip_weight or 0:g}"}
            if (image := request.ip_image)
            else {}
        ),
        **({"Hires upscale": f"{factor:g}", "Hires steps": second["steps"]} if second else {}),
        **({"Hires upscaler": UPSCALERS[second["upscaler"]]} if second else {}),
        "Version": origin.software,
    }
    last = ", ".join(f"{name}: {plain(str(value))}" for name, value in values.items())
    text = without_names(request.prompt)
    if request.negative_prompt:
        text += f"\nNegative prompt: {without_names(request.negative_prompt)}"
    # A text that begins with a brace is JSON to some readers. All of them strip blanks.
    return f"{' ' * text.startswith('{')}{text}\n{last}"


def without_names(prompt: str) -> str:
    """Returns a prompt without what readers take for names of settings, and without NUL, which ends texts."""
    return re.sub(r"(?m)(?<=Negative prompt):|(?<=^Steps):", "", prompt).replace("\0", " ")


def plain(value: str) -> str:
    """Returns a value without commas, colons, quotes and breaks of lines."""
    return re.sub(r"""[,:;"'`{}\s]+""", " ", value).strip() or "unknown"


def save_options(form: str, settings: Mapping[str, Any], parameters: str) -> dict[str, Any]:
    """Returns the options of Pillow's `save` that write the texts into a PNG, JPEG or WEBP.

    Without settings there are none. Raises ValueError if they are too long for a JPEG.
    """
    from PIL.PngImagePlugin import PngInfo

    if not settings:
        return {}
    text = json.dumps(settings)
    if form == "PNG":
        info = PngInfo()
        if parameters:
            info.add_text("parameters", parameters)
        info.add_text(SETTINGS, text)
        return {"pnginfo": info}
    from xml.sax.saxutils import quoteattr  # imports http and ssl, which no PNG needs

    exif = user_comment(parameters) if parameters else b""
    xmp = XMP.format(namespace=NAMESPACE, text=quoteattr(text)).encode()
    if form == "JPEG" and max(len(exif), len(xmp)) > SEGMENT:
        raise ValueError("the settings are too long for a JPEG")
    return {"exif": exif, "xmp": xmp}


def user_comment(text: str) -> bytes:
    """Returns EXIF with a text as its UserComment.

    Pillow would give the tag the type of a number, with which piexif, and so the web UI, does not read it.
    """
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    block, tag = struct.pack(">HHII", 0x8769, 4, 1, 26), struct.pack(">HHII", 0x9286, 7, len(comment), 44)
    header, one, last = b"Exif\0\0MM\0*\0\0\0\x08", b"\0\x01", bytes(4)
    return header + one + block + last + one + tag + last + comment


def read_origin(path: Path) -> Origin:
    """Returns what drew the picture in a file. Raises LcmCompileError if the file does not tell."""
    from PIL import Image

    again = "give a picture that lcm-compile run has drawn, as it was saved"
    try:
        with Image.open(path) as image:
            text = settings_text(image)
    # Pillow raises SyntaxError for some broken PNGs, and refuses pictures made to exhaust memory.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or error
        raise LcmCompileError(f"{path} can't be read as a picture: {why}", again) from error
    if text is None:
        raise LcmCompileError(f"{path} does not hold the settings that it was drawn with", again)
    try:
        data = json.loads(text)
        if isinstance(data, dict) and "grid" in data:
            raise LcmCompileError(
                f"{path} is a sheet of many pictures", f"lcm-compile run --grid {data['grid']} draws a sheet"
            )
        return from_json(Origin, data)
    except (ValueError, RecursionError, UsageError) as error:
        raise LcmCompileError(f"{path}: its settings can't be read: {error}", again) from error


def settings_text(image: Image) -> str | None:
    """Returns the JSON text of an opened picture, or None. Raises ValueError if the XMP is broken."""
    text, xmp = image.info.get(SETTINGS), image.info.get("xmp", b"")
    if isinstance(text, str):
        return str(text)
    if not isinstance(xmp, bytes) or NAMESPACE.encode() not in xmp or b"<!DOCTYPE" in xmp:
        return None
    from xml.etree import ElementTree

    try:
        # As text, which is UTF-8 whatever it declares: in no other encoding can a DOCTYPE be hidden.
        root = ElementTree.fromstring(xmp.decode().strip("\0 \n\ufeff"))
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise ValueError(f"its XMP is broken: {error}") from error
    name = f"{{{NAMESPACE}}}settings"  # other programs turn the attribute into an element
    found = [node.get(name) or (node.text if node.tag == name else None) for node in root.iter()]
    return next((one for one in found if one), None)
