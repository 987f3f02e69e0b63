"""Draws docs/uses.png with the demo model: what a bundle does besides drawing a prompt from noise.

`python -m lcm_compile.benchmarks.pages.uses_sheet` builds a bundle that takes pictures and a LoRA's weight.
`--controlnet DIR` adds what `python -m lcm_compile.demo.train_controlnet --out DIR` has trained.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from PIL import Image, ImageDraw

from lcm_compile import BuildSpec, LoraSpec, build, load
from lcm_compile.benchmarks.pages.demo_sheet import contact_sheet
from lcm_compile.benchmarks.pages.readme_table import ROOT
from lcm_compile.spec import ControlNetSpec

STYLE = ROOT / "lcm_compile" / "demo" / "zebra_lora.safetensors"
STAR = "a large red star on a striped pink background"
SEED = 7


def square(side: int, edge: int) -> Image.Image:
    """Returns a white square in the middle of black, as a mask of what is repainted."""
    image = Image.new("L", (side, side))
    ImageDraw.Draw(image).rectangle((edge, edge, side - edge - 1, side - edge - 1), fill=255)
    return image


@click.command()
@click.option("--controlnet", type=click.Path(path_type=Path), help="The demo's, if it was trained.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "docs" / "uses.png")
def main(controlnet: Path | None, out: Path) -> None:
    """Draws a sheet with a picture of each use."""
    style = LoraSpec(str(STYLE), 0.0, name="zebra")
    plain = BuildSpec(base="demo", gpu="cpu", image=True, loras=(style,))
    with tempfile.TemporaryDirectory() as folder:
        bundle = build(plain, Path(folder) / "bundle").folder
        with load(bundle) as pipeline:
            [star] = pipeline(STAR, seed=SEED)
            drawn = [(star, f"run '{STAR}'")]
            [other] = pipeline(STAR, seed=SEED, lora_weights={"zebra": 1.0})
            drawn.append((other, "--lora-weight zebra=1"))
            [other] = pipeline(
                "a large blue ring on a striped pink background", seed=SEED, image=star, strength=0.75
            )
            drawn.append((other, "'a large blue ring …' --image star.png --strength 0.75"))
            [other] = pipeline(
                "a large green cross on a striped pink background", seed=SEED, image=star, mask=square(64, 12)
            )
            drawn.append((other, "'a large green cross …' --image star.png --mask middle.png"))
            [other] = pipeline(STAR, seed=SEED, image=star, outpaint=(24, 24, 24, 24))
            drawn.append((other, "--image star.png --outpaint 24,24,24,24"))
        if controlnet is not None:
            lines = Image.new("RGB", (64, 64))
            ImageDraw.Draw(lines).ellipse((20, 8, 56, 44), outline="white", width=2)
            guided = BuildSpec(base="demo", gpu="cpu", controlnets=(ControlNetSpec(str(controlnet)),))
            with load(build(guided, Path(folder) / "guided")) as pipeline:
                [other] = pipeline("a blue circle on a plain white background", seed=SEED, control=lines)
            drawn += [(lines, "outlines.png"), (other, "'a blue circle …' --control outlines.png")]
        contact_sheet(drawn).save(out)
    print(out)


if __name__ == "__main__":
    main()
