"""The proof: its Euler loop against diffusers, its figures, and the whole of it, small."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from lcm_compile import BuildSpec, build, load
from lcm_compile.benchmarks.quality import proof
from lcm_compile.benchmarks.quality import rows as row_table
from lcm_compile.benchmarks.quality.rows import Row, contrary, rows_of
from lcm_compile.benchmarks.quality.tables import cost
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.demo.world import is_held_out, parse_caption, proof_prompts
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import psnr_db

CHECKPOINT = FAMILIES["demo"].base


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (3.0, None), (3.0, "a small blue ring")])
def test_euler_pictures_equal_diffusers(guidance, negative):
    theirs = DiffusionPipeline.from_pretrained(CHECKPOINT)
    theirs.set_progress_bar_config(disable=True)
    prompt = "a purple cross and a green triangle on a striped gray background"
    wanted = theirs(
        prompt,
        negative_prompt=negative,
        num_inference_steps=8,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="np",
    ).images[0]
    bundle = build(BuildSpec("demo", no_lcm=True, few_step="lcm"))
    with load(bundle) as pipeline:
        drawn = pipeline.draw(Request(prompt, 5, negative, 8, guidance, sampler="euler")).pictures[0]
    assert psnr_db(eight_bits(wanted), drawn) > 50


def test_wilsons_interval():
    """Against the two roots of (p̂ - p)² = z² p (1 - p) / n, which define it."""
    for right, wrong in ((9, 1), (0, 20), (300, 0), (37, 63)):
        count = right + wrong
        share = proof.share("1" * right + "-" * 3 + "0" * wrong)
        part, z = right / count, 1.96
        roots = np.roots([1 + z**2 / count, -(2 * part + z**2 / count), part**2])
        assert share["of"] == count and share["part"] == part
        assert [share["low"], share["high"]] == pytest.approx(sorted(roots), abs=1e-12)
    assert proof.share("---") is None


def test_a_row_that_was_not_timed_has_dashes():
    assert cost({"passes": 3}, [0.5, 0.6]) == ["3", "–", "–"]
    assert cost({"passes": 3}, None) == ["3", "–"]
    assert cost({"passes": 3, "seconds": [0.1, 0.3, 0.2]}, [0.2, 0.9, 0.4]) == ["3", "0.200", "2.0"]


def test_the_contrary_shares_nothing_with_its_prompt():
    for text, _ in proof_prompts(100):
        asked, other = parse_caption(text), parse_caption(contrary(text))
        assert len(asked.things) == len(other.things)
        assert asked.background != other.background and asked.pattern != other.pattern
        for one, two in zip(asked.things, other.things, strict=True):
            assert one.colour != two.colour and one.shape != two.shape
            assert (one.size is None) == (two.size is None) and (one.size is None or one.size != two.size)


def test_rows_ask_for_the_proofs_own_prompts():
    row = Row("style", "x", row_table.DEMO, "lcm", 4, zebra=True, count=20)
    asked = row_table.requests(row)
    assert [(r.prompt.removesuffix(", in zebra style"), r.seed) for r in asked] == proof_prompts(20)
    assert all(r.prompt.endswith(", in zebra style") for r in asked)
    assert all(is_held_out(text) for text, _ in proof_prompts(20))


def test_rows_of_a_tuned_base_need_one():
    assert not rows_of("universal", 10, "")
    assert {row.spec.base for row in rows_of("universal", 10, "tuned")} == {"tuned", "demo"}


@pytest.fixture
def prove(tmp_path, capsys):
    """Runs the proof on four pictures a row; returns what it writes and tells."""

    def run(*more):
        proof.main(["--out", str(tmp_path), "--count", "4", *more], standalone_mode=False)
        out, err = capsys.readouterr()
        assert out.strip() == str(tmp_path)
        return json.loads((tmp_path / "proof.json").read_text()), err

    return run


def only(monkeypatch, chosen):
    monkeypatch.setattr(proof, "rows_of", lambda *given: [row for row in rows_of(*given) if chosen(row)])


def test_a_proof_tells_good_from_bad_and_draws_nothing_twice(prove, tmp_path, monkeypatch):
    only(monkeypatch, lambda row: (row.label, row.steps) in (("LCM-LoRA", 4), ("Euler", 1)))
    data, _ = prove("--part", "steps")
    good, bad = data["rows"].values()
    assert good["right"]["all"]["part"] > bad["right"]["all"]["part"] == 0
    assert good["distances"]["frechet"] < bad["distances"]["frechet"]
    assert (good["passes"], bad["passes"]) == (4, 2)
    assert data["prompts"] == [list(pair) for pair in proof_prompts(4)]
    for record in (good, bad):
        assert len(record["seconds"]) == proof.ROUNDS and min(record["seconds"]) > 0
        assert all(len(marks) == 4 for marks in record["verdicts"].values())
        assert set(record["verdicts"]["binding"][1::2]) <= {"0", "1"}
        assert record["verdicts"]["binding"][::2] == "--"
    for name in ("accuracy-against-time", "steps"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png")).std() > 5, "a blank figure"
    ratio = np.median(np.divide(good["seconds"], bad["seconds"]))
    assert 1.1 < ratio < 4, "four passes and a decoding against two"
    monkeypatch.setattr(proof, "build", lambda *_, **__: pytest.fail("what is known is drawn again"))
    assert prove("--part", "steps")[0] == data


def test_every_row_is_a_measurement_of_its_own(monkeypatch):
    """By the digests of all that it is made of: nothing is built for that."""
    monkeypatch.setattr(row_table, "STYLE_STRENGTHS", (0.0, 1.0))
    rows = [row for part in row_table.PARTS for row in rows_of(part, 2, CHECKPOINT)]
    assert len({proof.row_key(row) for row in rows}) == len(rows) > 30


@pytest.mark.slow
def test_every_part_of_the_proof(prove, tmp_path, monkeypatch):
    """The shipped base stands for a tuned one."""
    monkeypatch.setattr(row_table, "STYLE_STRENGTHS", (0.0, 1.0))
    monkeypatch.setattr(row_table, "LCM_STRENGTHS", (0.0, 1.0))
    only(monkeypatch, lambda row: row.steps <= 8)
    assert "universal is left out" in prove("--part", "universal")[1]
    data, _ = prove("--tuned", CHECKPOINT)
    rows = list(data["rows"].values())
    assert {record["part"] for record in rows} == {"steps", "guidance", "style", "universal"}
    (other_look,) = (r for r in rows if r["label"] == "not tuned, LCM-LoRA")
    assert other_look["right"]["clean"]["part"] < 0.5
    text = (tmp_path / "proof.md").read_text()
    assert all(title in text for title in ("How many steps", "Guidance", "A style", "another palette"))
    for name in ("accuracy-against-time", "steps", "styles", "universal"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png")).std() > 20
