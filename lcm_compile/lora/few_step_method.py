"""Tells which few-step method a LoRA is of: by its content, its metadata, its name, or the modules it adapts.

The files that are published say nothing of their method inside, and those of most methods have one layout.
So only the digest of a published file is proof, and the name is the next best evidence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lcm_compile.lora.few_step import METHODS, variants_of
from lcm_compile.lora.find import LORA_FILES
from lcm_compile.lora.metadata import describe_metadata
from lcm_compile.lora.peft_folder import WEIGHTS
from lcm_compile.lora.read import Lora

# The variants of each method's LoRAs, empty where there is one alone.
VARIANTS: Mapping[str, tuple[str, ...]] = {
    method: variants if len(variants := variants_of(method)) > 1 else () for method in METHODS
}
# The sha256 of published files, with the method and the variant.
PUBLISHED: Mapping[str, tuple[str, str | None]] = {
    # latent-consistency/lcm-lora-sdv1-5, -sdxl, -ssd-1b
    "8f90d840e075ff588a58e22c6586e2ae9a6f7922996ee6649a7f01072333afe4": ("lcm", None),
    "a764e6859b6e04047cd761c08ff0cee96413a8e004c9f07707530cd776b19141": ("lcm", None),
    "7adaaa69db6f011058a19fd1d5315fdf19ef79fcd513cdab30e173833fd5c59b": ("lcm", None),
    # tianweiy/DMD2: dmd2_sdxl_4step_lora, and in fp16; then the first upload of both
    "a374289e9446d7f14d2037c4b3770756b7b52c292142a691377c3c755010a1bb": ("dmd2", None),
    "b3d9173815a4b595991c3a7a0e0e63ad821080f314a0b2a3cc31ecd7fcf2cbb8": ("dmd2", None),
    "dd3dfdd1f212798b86100e029606d60c53a52b76a19d1f024acdf3c50987d581": ("dmd2", None),
    "7de75d21cb3f04bc3e734424157b2c3b799b862069c8dd9f4ad76fe66c57ba7c": ("dmd2", None),
    # ByteDance/SDXL-Lightning
    "04fafc778385b24144498a8247498ae4fb7a69f702ea0566bdce2845a31fcc43": ("lightning", "2"),
    "bf56cf2657efb15e465d81402ed481d1e11c4677e4bcce1bc11fe71ad8506b79": ("lightning", "4"),
    "5aa30d94cdf7950a8b53a693682650ee061eddb128c5435a8f88defea73b2ac6": ("lightning", "8"),
    # ByteDance/Hyper-SD: SD1.5
    "a04fd9a535c1e56d38f7590ee72a13fd5ca0409853b4fff021e5a9482cf1ca3b": ("hyper", "1"),
    "2f26dcc1d883feb07557a552315baae2ca2a04ac08556b08a355a244547e8c3a": ("hyper", "2"),
    "c5dd058616461ed5053e2b14eec4dbe3fa0eea3b13688642f6d6c80ea2ba5958": ("hyper", "4"),
    "91fc3186236e956d64dbb4357f2e120c69b968b78af7d2db9884a5ca74d3cd13": ("hyper", "8"),
    "f6123d5b950d5250ab6c33600e27f4dcf71b3099ebf888685e01e9e8117ce482": ("hyper", "8-cfg"),
    "64b98437383537cd968fda6f87a05c33160ece9c79ff4757949a1e212ff78361": ("hyper", "12-cfg"),
    # ByteDance/Hyper-SD: SDXL
    "c912df184c5116792d2c604d26c6bc2aa916685f4a793755255cda1c43a3c78a": ("hyper", "1"),
    "69b25c0187ced301c3603c599c0bc509ac99b8ac34db89a2aecc3d5f77a35187": ("hyper", "2"),
    "12f81a27d00a751a40d68fd15597091896c5a90f3bd632fb6c475607cbdad76e": ("hyper", "4"),
    "ca689190e8c46038550384b5675488526cfe5a40d35f82b27acb75c100f417c1": ("hyper", "8"),
    "55b51334c85061afff5eff7c550b61963c8b8607a5868bbe4f26db49374719b1": ("hyper", "8-cfg"),
    "0b97f447b5878323a28fbe7c51ba7acebd21f4d77552ba77b04b11c8911825b6": ("hyper", "12-cfg"),
    # h1t/TCD-SDXL-LoRA
    "2c777bc60abf41d3eb0fe405d23d73c280a020eea5adf97a82a141592c33feba": ("tcd", None),
    # wangfuyun/PCM_Weights: SD1.5, then SDXL; of some both the first upload and the later one
    "8497b036de4057a0a301c2417164f4ebec05b917795e19aa1d65fed8c8c718c4": ("pcm", "2"),
    "41a7f0b966d18f643d16c4401f0b5ef6b9ef7362c20e17128322f17874709107": ("pcm", "8"),
    "212150d7953627fb89df99aad579d6763645a1cb2ef26b19fee8b398d5e5ff4d": ("pcm", "4"),
    "20ae7599d21cfab03591841edc74468969bedb4945750856d7355bd4702d8d86": ("pcm", "8"),
    "3442eff271aa3b60a094fd6f9169d03e49e4051044a974f6fcf690507959191f": ("pcm", "16"),
    "843a17193078d3667c940b5eaa75ec6220f248978fa80d87f9642569e515c42c": ("pcm", "4-cfg"),
    "9f7f13bb019925eacd89aeff678e4fd831f7b60245b986855dff6634aee4eba9": ("pcm", "4-cfg"),
    "2339e96d0879b854e43563c45f238d03b668ad5571643030bf8e6ecf7a35fade": ("pcm", "4-cfg"),
    "d65b67599fab33b8d124e202266b4b5cd0df971c2b8a47473d461a74a56e5875": ("pcm", "8-cfg"),
    "7eb353b2abcaabab6251ba4e17d6cbe2e763feb0674b0f950555552212b44621": ("pcm", "16-cfg"),
    # jasperai/flash-sdxl: comfy/FlashSDXL
    "fd925177abbcf0a8e290f00e0264e1badbc292ef25cf99f455a5edb9c6b43c1b": ("flash", None),
    # shiroppo: sd_xl_turbo_lora_v1 with 64 and 128 dimensions
    "fe223afc1a165834bdd9cf2d3bfc82374468ded5f3ea8b6ab8018f02f380c557": ("turbo", None),
    "a599c42a9f4f7494c7f410dbc0fd432cf0242720509e9d52fa41aac7a88d1b69": ("turbo", None),
}

# Names are compared in lower case, with a space for each run of other characters than letters and digits, and
# a space at both ends.
STEPS = r"(?<!\d)(\d\d?) ?steps?(?![a-z])"
# The names that leave no doubt, with the method and the variant, in which {} stands for the number of steps.
# The first that is found counts.
NAMES = (
    (r"hyper ?sd.*cfg|cfg.*hyper ?sd", "hyper", "{}-cfg"),
    (r"hyper ?sd", "hyper", "{}"),
    (r" pcm .*normal ?cfg", "pcm", "{}-cfg"),
    (r" pcm .*small ?cfg", "pcm", "{}"),
    (r" pcm .*lcm ?like", "pcm", "lcm"),
    (r" pcm (sd|lora)", "pcm", ""),
    (r"dmd ?2(?!\d)| dmd (sd|lora)", "dmd2", ""),
    (r" tcd (sd|lora)|sd(xl|15) tcd ", "tcd", ""),
    (r"flash ?sd", "flash", ""),
    (r"sd ?xl ?lightning (lora|$)", "lightning", "{}"),
    (r"sd ?(xl)? ?turbo (lora|v\d|rank|\d+ ?dim|$)", "turbo", ""),
    (r" lcm ?(lora|sd|xl)|(lora|sd|sd ?xl|15|1b) lcm ", "lcm", ""),
)
# Words that may mean something else in a name, unless it has the number of steps or the file has the layout.
ABBREVIATIONS = {"lcm": "lcm", "tcd": "tcd", "pcm": "pcm", "dmd": "dmd2"}
WORDS = {**ABBREVIATIONS, **{word: word for word in ("lightning", "hyper", "flash", "turbo")}}
# The names of what looks like one of these but draws otherwise, and of models that can't be built.
UNSUPPORTED = (
    (r"sd ?xl ?flash", "sd-community's SDXL-Flash, which draws with DPM++ and guidance in 6 to 9 steps"),
    (r"animate ?lcm", "AnimateLCM, which draws videos"),
    (r"tdd (lora|adv)|(xl|15|vis) tdd ", "TDD, which has a sampler of its own"),
    (r"flux.* turbo alpha", "a LoRA of FLUX"),
)
OTHER_MODELS = r" (flux|sd ?3|svd|animatediff|qwen|wan|hunyuan|pixart)\d? (?!steps? )"
# The files that are named after their format, so that only the folder's name tells what they are.
UNNAMED = {*LORA_FILES, *WEIGHTS, "diffusion_pytorch_model.safetensors"}
# The ends of modules that most published files adapt, under diffusers' and the original names.
DISTILLED = (r"conv1$|in_layers.2$", r"time_emb_proj$|emb_layers.1$", r"attn1.to_q$", r"ff.net.2$")


@dataclass(frozen=True)
class FewStepMethod:
    """The few-step method of a LoRA, as far as it can be told.

    `method` is a key of VARIANTS, or None if it isn't known or isn't supported. `variant` is one of its
    variants, or None if it has none or if it isn't known. `sure` is `certain`, `likely` or `possible`, and
    `because` is the reason in words. `unsupported` says what the LoRA is if no bundle can draw with it.
    """

    method: str | None
    variant: str | None
    sure: str
    because: str
    unsupported: str | None = None


def few_step_method(lora: Lora, sha256: str) -> FewStepMethod | None:
    """Returns which few-step method a LoRA is of, or None if nothing points to one.

    `sha256` is that of the LoRA's content.
    """
    if sha256 in PUBLISHED:
        return FewStepMethod(*PUBLISHED[sha256], "certain", "its content is that of a published file")
    if (method := distilled_by_this_package(lora.metadata)) in VARIANTS:
        return FewStepMethod(method, None, "certain", "its metadata says that distill made it")
    alike = is_like_published(lora)
    for what, name in names_of(lora):
        if found := named_method(what, name, alike):
            if found.method and lora.guess.startswith("a transformer"):
                return replace(
                    found, method=None, variant=None, unsupported=f"{found.method} for {lora.guess}"
                )
            return found
    if alike and lora.ranks == [64]:
        reason = "its modules and its rank are those of such files, which do not tell the method"
        return FewStepMethod(None, None, "possible", reason)
    return None


def distilled_by_this_package(metadata: Mapping[str, str]) -> str | None:
    """Returns the method of a LoRA that `distill` made, by its metadata, or None for any other LoRA."""
    try:
        made = json.loads(metadata.get("lcm_compile", "{}"))
        return str(made.get("method", "lcm")) if "guidance_min" in made else None
    except (ValueError, TypeError, AttributeError, RecursionError):  # not what `distill` writes
        return None


def is_like_published(lora: Lora) -> bool:
    """Returns whether a LoRA is for a UNet alone, adapts DISTILLED modules, and all with one rank.

    A LoRA of a style may do so too, but its trainer writes its settings into the metadata; such a LoRA is not
    like published ones.
    """
    modules = [layer.module for layer in lora.layers]
    return (
        {layer.component for layer in lora.layers} == {"unet"}
        and lora.kinds.keys() == {"LoRA"}
        and len(lora.ranks) == 1
        and all(any(re.search(end, module) for module in modules) for end in DISTILLED)
        and not any(key.startswith(("ss_", "lcm_compile")) for key in lora.metadata)
    )


def names_of(lora: Lora) -> list[tuple[str, str]]:
    """Returns the names that may tell a LoRA's method, each after words for what has that name."""
    path = lora.path.absolute()
    names = [("its name", path.name if path.is_dir() else path.stem)]
    if path.name in UNNAMED:
        names = [("its folder's name", path.parent.name)]
    if cached := re.search(r"/models--(.+?)/snapshots/", path.as_posix()):
        names.append(("its repository's name", cached[1]))
    return [*names, ("the title in its metadata", describe_metadata(lora.metadata).get("title", ""))]


def named_method(what: str, name: str, alike: bool) -> FewStepMethod | None:
    """Returns the method that a name tells, or None if it tells none.

    `what` has that name, in words. `alike` is whether the LoRA is like published ones.
    """
    plain = f" {re.sub('[^a-z0-9]+', ' ', name.lower()).strip()} "
    for pattern, unsupported in UNSUPPORTED:
        if re.search(pattern, plain):
            return FewStepMethod(None, None, "likely", f"{what} says so", unsupported)
    clear = [(method, variant) for pattern, method, variant in NAMES if re.search(pattern, plain)]
    words = {method for word, method in WORDS.items() if re.search(rf" (?:sd|xl|sdxl)?{word}[ \d]", plain)}
    method, variant = next(iter(clear or [(word, "{}") for word in words]), (None, ""))
    # A name with two methods is that of a mixture, but LCM's sampler draws for other methods too.
    if method is None or words - {method} - ({"lcm"} if clear and method != "lcm" else set()):
        return None
    steps = re.search(STEPS, plain)
    if clear or steps or (alike and method in ABBREVIATIONS.values()):
        sure, because = "likely", f"{what} says so"
    elif alike or method in ABBREVIATIONS.values():
        sure, because = "possible", f"{what} may say so"
    else:
        return None
    if re.search(OTHER_MODELS, plain):
        return FewStepMethod(None, None, sure, because, f"{method} for a model that can't be built")
    variant = variant.format(steps[1] if steps else "")
    return FewStepMethod(method, variant if variant in VARIANTS[method] else None, sure, because)
