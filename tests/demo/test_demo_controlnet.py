"""The demo's ControlNet: the outlines that it reads, how it is judged, and that its script runs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image

from lcm_compile.checkpoint.controlnet import with_controlnets
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.demo.train_controlnet import main, outlines, overlap, shapes_of
from lcm_compile.demo.world import render, sample_scene


def moved(scene):
    """The scene with its shapes somewhere else."""
    places = tuple(replace(place, x=1 - place.x, y=1 - place.y) for place in scene.placements)
    return replace(scene, placements=places)


def test_outlines_are_where_the_shapes_end_and_the_judge_knows_where_they_are():
    rng = np.random.default_rng(0)
    for _ in range(60):
        scene = sample_scene(rng)
        inside, control = shapes_of(scene), outlines(scene)
        assert control.shape == (64, 64, 3) and set(np.unique(control)) <= {0, 255}
        edge = control[..., 0] > 0
        changes = inside[:, 1:] != inside[:, :-1]
        assert (edge[:, 1:] & edge[:, :-1])[changes].all()
        assert 0.02 < edge.mean() < 0.6
        assert overlap(render(scene), scene) > 0.9
        other = moved(scene)
        if not (shapes_of(other) & inside).any():
            assert overlap(render(other), scene) < 0.1


def test_the_script_writes_a_controlnet_of_the_demo(tmp_path, capsys):
    out = tmp_path / "net"
    words = "--steps", 2, "--batch", 2, "--scenes", 4, "--held-out", 1, "--device", "cpu"
    main(["--out", str(out), *map(str, words)])
    assert json.loads(capsys.readouterr().out).keys() == {"controlled", "not controlled"}
    [picture] = out.glob("*.png")
    assert Image.open(picture).size == (64, 64)
    own = load_component(with_controlnets(open_checkpoint("demo"), [str(out)], False), "control")
    net = ControlNetModel.from_pretrained(out)
    assert net.controlnet_mid_block.weight.abs().max() > 0  # zero at first
    assert all(torch.equal(weight, own.state_dict()[key]) for key, weight in net.state_dict().items())
