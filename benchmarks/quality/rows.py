"""Lists what the proof measures: for every row of its tables, the build and the requests for its pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from lcm_compile.checkpoint.families import DEMO_STYLE, FAMILIES
from lcm_compile.demo.world import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    SHAPES,
    SIZES,
    STYLE,
    Description,
    Thing,
    parse_caption,
    proof_prompts,
)
from lcm_compile.pipeline.request import Request
from lcm_compile.spec import BuildSpec, LoraSpec

PARTS = ("steps", "guidance", "style", "universal")
# The weights λ1 of the style LoRA and λ2 of the LCM-LoRA. They were chosen on the prompts for tuning.
TOGETHER = (1.1, 0.7)
# The weights of the style part's grid, and the number of pictures in each cell of it.
STYLE_STRENGTHS = (0.0, 0.6, 0.9, 1.2, 1.5)
LCM_STRENGTHS = (0.0, 0.3, 0.6, 1.0)
GRID_COUNT = 40
GUIDANCE = 3.0  # the guidance scale of the base, with which it draws best
SCALES = (1.25, 1.5, 2.0, 3.0)  # guidance scales in the LCM loop
FOREIGN = 1.5  # the guidance scale in the LCM loop on a base that the LCM-LoRA was not distilled from
LCM_LORA = str(FAMILIES["demo"].lcm_lora)
TCD_ETA = 0.3  # of the sampler tcd, as its authors draw
TCD_LORA = str(Path(__file__).with_name("tcd_lora.safetensors"))

DEMO = BuildSpec("demo")
TCD = BuildSpec("demo", few_step="tcd", few_step_lora=LoraSpec(TCD_LORA))
BASE = BuildSpec("demo", no_lcm=True)


@dataclass(frozen=True)
class Row:
    """One row of a table: the settings of one measurement.

    `part` is one of PARTS, and `sampler` is `lcm`, `tcd` or `euler`. `negative` gives each picture the
    contrary of its prompt as negative prompt. `zebra` asks for the zebra style. `look` is the palette that
    pictures are judged by. `strengths` are λ1 and λ2 of a cell in the style part's grid, empty for other
    rows. `count` is the number of pictures.
    """

    part: str
    label: str
    spec: BuildSpec
    sampler: str
    steps: int
    guidance: float = 1.0
    negative: bool = False
    zebra: bool = False
    look: str = "day"
    strengths: tuple[float, ...] = ()
    count: int = 300

    @property
    def passes(self) -> int:
        """The number of UNet calls per picture."""
        return self.steps * (2 if self.guidance > 1 else 1)

    @property
    def timed(self) -> bool:
        """Whether the row is timed. The cells of a grid are not, because all of them take the same time."""
        return not self.strengths


def rows_of(part: str, count: int, tuned: str) -> list[Row]:
    """Returns the rows of one part. The part `universal` has none without a tuned base."""
    if part == "steps":
        low = (1, 2, 3, 4)
        kinds = [
            ("LCM-LoRA", DEMO, "lcm", 1.0, (*low, 6, 8)),
            ("TCD-LoRA", TCD, "tcd", 1.0, (*low, 6, 8)),
            ("Euler", BASE, "euler", GUIDANCE, (*low, 8, 15, 25, 50)),
            ("Euler, unguided", BASE, "euler", 1.0, low),
            ("LCM loop, no LoRA", BASE, "lcm", 1.0, low),
        ]
        return [
            Row(part, label, spec, sampler, n, scale, count=count)
            for label, spec, sampler, scale, counts in kinds
            for n in counts
        ]
    if part == "guidance":
        scales = [(False, scale) for scale in (1.0, *SCALES)] + [(True, scale) for scale in SCALES]
        return [
            Row(part, "LCM-LoRA", DEMO, "lcm", 4, scale, negative, count=count) for negative, scale in scales
        ]
    if part == "style":
        few = min(count, GRID_COUNT)
        return [
            Row(part, "style and LCM", styled(*TOGETHER), "lcm", 4, zebra=True, count=count),
            Row(part, "LCM alone", styled(0.0, 1.0), "lcm", 4, zebra=True, count=count),
            *(
                Row(part, "style, Euler", styled(1.0, 0.0), "euler", n, GUIDANCE, zebra=True, count=count)
                for n in (4, 25)
            ),
            *(
                Row(part, "grid", styled(*cell), "lcm", 4, zebra=True, strengths=cell, count=few)
                for cell in product(STYLE_STRENGTHS, LCM_STRENGTHS)
            ),
        ]
    if part == "universal" and tuned:
        fast, slow = BuildSpec(tuned, lcm_lora=LoraSpec(LCM_LORA)), BuildSpec(tuned, no_lcm=True)
        return [
            *(
                Row(part, "tuned, LCM-LoRA", fast, "lcm", 4, scale, look="dusk", count=count)
                for scale in (1.0, FOREIGN)
            ),
            Row(part, "tuned, Euler", slow, "euler", 25, GUIDANCE, look="dusk", count=count),
            Row(part, "not tuned, LCM-LoRA", DEMO, "lcm", 4, look="dusk", count=count),
        ]
    return []


def styled(style: float, lcm: float) -> BuildSpec:
    """Returns the build of the demo base with τ' = λ1·style + λ2·LCM fused into it.

    A LoRA with weight 0 is left out.
    """
    loras = (LoraSpec(str(DEMO_STYLE), style),) if style else ()
    if lcm:
        return BuildSpec("demo", lcm_lora=LoraSpec(LCM_LORA, lcm), loras=loras)
    return BuildSpec("demo", no_lcm=True, loras=loras)


def contrary(text: str) -> str:
    """Returns the contrary of a caption: each name in it is replaced by the next one of its list."""
    words = parse_caption(text)

    def after(name: str, names: Iterable[str]) -> str:
        listed = list(names)
        return listed[(listed.index(name) + 1) % len(listed)]

    things = tuple(
        Thing(after(t.colour, COLOURS), after(t.shape, SHAPES), t.size and after(t.size, SIZES))
        for t in words.things
    )
    return Description(things, after(words.pattern, PATTERNS), after(words.background, BACKGROUNDS)).caption


def requests(row: Row) -> list[Request]:
    """Returns the requests for a row's pictures, always in the same order and with the same seeds."""
    return [
        Request(
            text + STYLE * row.zebra,
            seed,
            contrary(text) if row.negative else None,
            row.steps,
            row.guidance,
            sampler=row.sampler,
            eta=TCD_ETA if row.sampler == "tcd" else None,
        )
        for text, seed in proof_prompts(row.count)
    ]
