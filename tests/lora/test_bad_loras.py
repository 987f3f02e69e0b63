"""LoRA files that can't be fused: each refusal names the file and its keys; no code in a pickle ever runs."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path

import factories
import pytest
import torch
from factories import load_modules
from safetensors.torch import load_file, save_file

from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.errors import LoraError
from lcm_compile.lora.metadata import method_of
from lcm_compile.lora.read import read_lora

KEY = "lora_unet_down_blocks_1_attentions_0_proj_in"


class Modules:
    """Just enough of a pipeline for the factories."""

    def __init__(self, checkpoint):
        self.__dict__.update(load_modules(open_checkpoint(str(checkpoint))).named())


@pytest.fixture(scope="module")
def sdxl_loras(sdxl_checkpoint, tmp_path_factory):
    """A LoRA of each layout that fits the tiny SDXL."""
    folder, modules = tmp_path_factory.mktemp("loras"), Modules(sdxl_checkpoint)
    return {
        layout: factories.write_lora(modules, folder / f"{layout}.safetensors", layout)
        for layout in ("kohya", "peft")
    }


@pytest.fixture(params=["--lcm-lora", "--lora"])
def option(request):
    return request.param


@pytest.fixture
def refuse(refused, sdxl_checkpoint, tmp_path):
    """Builds with a LoRA, which must be refused."""

    def run(told, path, option="--lora", base=sdxl_checkpoint, code=1):
        out = tmp_path / "out" / "bundle"
        words = ("--no-lcm", option) if option == "--lora" else (option,)
        err = refused(code, told, "build", "--base", base, "--gpu", "cpu", "--out", out, *words, path)
        assert not out.parent.exists() or list(out.parent.iterdir()) == []
        return err

    return run


def test_missing(refuse, tmp_path, option):
    refuse(["nowhere.safetensors", "does not exist", option], tmp_path / "nowhere.safetensors", option)
    refuse("does not exist", "~nobody/lora.safetensors:0.5", option)


def test_a_folder(refuse, tmp_path, option):
    refuse([tmp_path, "folder", ".safetensors"], tmp_path, option)


def huge_header(path):
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def text(path):
    path.write_text("<!DOCTYPE html><html>404</html>")


AGAIN = "download it again"
DAMAGES = {
    "empty": (lambda p: p.write_bytes(b""), "is empty", AGAIN),
    "one byte": (lambda p: p.write_bytes(b"\x01"), "ends within its header", AGAIN),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-7]), " bytes", AGAIN),
    "header cut": (lambda p: p.write_bytes(p.read_bytes()[:100]), "ends within its header", AGAIN),
    "garbage": (lambda p: p.write_bytes(bytes(range(256)) * 16), "no whole safetensors", "get the weights"),
    "huge header": (huge_header, "ends within its header", AGAIN),
    "a web page": (text, "it is a web page", "download the file itself"),
    "no tensors": (lambda p: save_file({}, p), "holds no tensors", "give the LoRA's own file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(refuse, sdxl_loras, tmp_path, damage):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(sdxl_loras["kohya"].read_bytes())
    change, *told = DAMAGES[damage]
    change(path)
    refuse([path, *told], path)


class Malice:
    """A pickle that makes a file when it is opened."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.bin", "lora.pt", "pytorch_lora_weights"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "plain", "protocol 0"])
def test_a_pickle_under_any_name_runs_no_code(refuse, tmp_path, name, kind):
    marker, path = tmp_path / "executed", tmp_path / name
    if kind in ("zip", "legacy"):
        torch.save({KEY: Malice(marker)}, path, _use_new_zipfile_serialization=kind == "zip")
    else:
        path.write_bytes(pickle.dumps({KEY: Malice(marker)}, 0 if kind == "protocol 0" else None))
    err = refuse([path, ".safetensors" if kind != "protocol 0" else "safetensors"], path)
    assert kind == "protocol 0" or "pickle" in err
    assert not marker.exists()
    if kind == "zip":  # the trap does spring
        with zipfile.ZipFile(path) as file:
            inner = next(n for n in file.namelist() if n.endswith("data.pkl"))
            pickle.loads(file.read(inner))
        assert marker.exists()


def pickled(path, loaded):
    torch.save(loaded, path)


PICKLE_DAMAGES = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "not a pickle of weights only"),
    "a web page": (text, "not a pickle of weights only"),
    "safetensors": (lambda p: save_file({KEY: torch.ones(1)}, p), "not a pickle of weights only"),
    "script": (lambda p: torch.jit.save(torch.jit.script(torch.nn.Identity()), p), "not a pickle of weights"),
    "a module": (lambda p: pickled(p, torch.nn.Linear(2, 2)), "not a pickle of weights only"),
    "a list": (lambda p: pickled(p, [torch.ones(1)]), "no named tensors"),
    "nested": (lambda p: pickled(p, {"state_dict": {KEY: torch.ones(1)}}), "no named tensors"),
    "numbered": (lambda p: pickled(p, {0: torch.ones(1)}), "no named tensors"),
    "no tensors": (lambda p: pickled(p, {}), "holds no tensors"),
    "unknown keys": (lambda p: pickled(p, {"state": torch.ones(1)}), "no LoRA layout"),
}


@pytest.mark.parametrize("damage", PICKLE_DAMAGES)
def test_damaged_pickle(sdxl_loras, tmp_path, damage):
    path = tmp_path / "lora.bin"
    torch.save(load_file(sdxl_loras["kohya"]), path)
    assert read_lora(path).layers
    change, told = PICKLE_DAMAGES[damage]
    change(path)
    with pytest.raises(LoraError, match=told) as error:
        read_lora(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["lora.safetensors", "lora", "lora.bin.safetensors"])
def test_a_harmless_pickle_under_another_name(refuse, sdxl_loras, tmp_path, name):
    torch.save(load_file(sdxl_loras["kohya"]), tmp_path / name)
    refuse([tmp_path / name, "is a pickle", "name the file .bin"], tmp_path / name)


@pytest.mark.parametrize("first", [0x80, 0x50], ids=["like a pickle", "like a zip"])
def test_a_right_file_that_begins_like_a_pickle(tmp_path, first):
    """A safetensors file begins with its header's length, whose bytes may be a pickle's."""
    wanted = 0x180 if first == 0x80 else 0x4B50
    tensors = {f"{KEY}.lora_down.weight": torch.ones(2, 64), f"{KEY}.lora_up.weight": torch.ones(64, 2)}
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, {"note": ""})
    padding = wanted - struct.unpack("<Q", path.read_bytes()[:8])[0]
    save_file(tensors, path, {"note": "x" * padding})
    assert path.read_bytes()[:2] in (b"\x80\x01", b"PK")
    assert len(read_lora(path).layers) == 1


def changed(source, path, change):
    tensors = load_file(source)
    change(tensors)
    return factories.save_tensors(tensors, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_not_finite_in_any_precision(tmp_path, dtype, value):
    up = torch.ones(64, 4)
    up[40, 2] = value
    parts = {f"{KEY}.lora_down.weight": torch.ones(4, 64), f"{KEY}.lora_up.weight": up}
    path = factories.save_tensors({k: t.to(dtype) for k, t in parts.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(LoraError, match=r"NaN or infinite weights in .*lora_up"):
        read_lora(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_up.weight", "alpha"])
def test_not_finite(refuse, sdxl_loras, tmp_path, value, part):
    key, path = f"{KEY}.{part}", tmp_path / "lora.safetensors"
    changed(sdxl_loras["kohya"], path, lambda t: t[key].view(-1)[:1].fill_(value))
    refuse([path, "NaN or infinite", key], path)


@pytest.mark.parametrize(
    ("rename", "told"),
    [
        (f"{KEY}s.lora_up.weight", f"lacks factors that go with {KEY}.alpha, {KEY}.lora_down.weight"),
        (f"{KEY}.hada_w1_a", ["mixes the factors of several kinds", f"{KEY}.hada_w1_a"]),
        (f"{KEY}.oft_R.weight", [f"{KEY}.oft_R.weight", "no LoRA layout", "LoHa"]),
        (f"{KEY}.oft_blocks", ["mixes the factors of several kinds", f"{KEY}.oft_blocks"]),
        (f"{KEY}.weight", [f"{KEY}.weight", "no LoRA layout"]),
        ("transformer.blocks.0.attn.to_q.lora_A.weight", "transformer.blocks.0.attn.to_q"),
        ("model.diffusion_model.input_blocks.0.weight", "no LoRA layout"),
    ],
)
def test_a_key_that_is_out_of_place(refuse, sdxl_loras, tmp_path, rename, told):
    def change(tensors):
        tensors[rename] = tensors.pop(f"{KEY}.lora_up.weight")

    refuse(told, changed(sdxl_loras["kohya"], tmp_path / "lora.safetensors", change))


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_keys_that_match_no_module_are_named(refuse, sdxl_loras, tmp_path, layout):
    stem = "lora_unet_mid_block_nothing" if layout == "kohya" else "text_encoder.text_model.nothing.0"
    down, up = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
    extra = {f"{stem}.{down}.weight": torch.ones(2, 8), f"{stem}.{up}.weight": torch.ones(8, 2)}
    path = changed(sdxl_loras[layout], tmp_path / "lora.safetensors", lambda t: t.update(extra))
    refuse([path, "2 keys match no module", *extra], path)


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_for_another_base(refuse, sdxl_loras, sdxl_checkpoint, sd15_checkpoint, tmp_path, layout, option):
    """SD1.5's on SDXL and the reverse: named by what they seem made for."""
    sd15 = factories.write_lora(Modules(sd15_checkpoint), tmp_path / "sd15.safetensors", layout)
    refuse([sd15, "does not fit this base", "text states are 32 wide"], sd15, option)
    sdxl = sdxl_loras[layout]
    refuse([sdxl, "does not fit this base", "text states are 80 wide"], sdxl, option, sd15_checkpoint)


@pytest.mark.parametrize(("width", "name"), [(768, "SD1.5"), (2048, "SDXL"), (1024, "SD2.x")])
def test_for_a_base_of_full_size(refuse, tmp_path, width, name):
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{key}.lora_down.weight": torch.ones(4, width), f"{key}.lora_up.weight": torch.ones(64, 4)}
    path = factories.save_tensors(tensors, tmp_path / "lora.safetensors")
    refuse([f"made for {name}", "rank 4, weight 64×80", "attn2_to_k"], path)


def test_a_refusal_tells_what_the_lora_is(refuse, sdxl_loras, tmp_path):
    """In a few lines: how many keys match, kind, rank, the base it is for, and how to see the rest."""
    path = FAMILIES["demo"].lcm_lora
    told = [
        "have another shape",
        "0 of its 237 keys match",
        "It is a LoRA of rank",
        "in kohya layout",
        "made for demo",
    ]
    err = refuse([*told, f"lcm-compile inspect {path}"], path)
    assert len(err.partition("error: ")[2].splitlines()) == 3
    empty = changed(
        sdxl_loras["peft"], tmp_path / "empty.safetensors", lambda t: [x.zero_() for x in t.values()]
    )
    keys = len(load_file(empty))
    told = [f"{keys} of its {keys} keys match", "It is a LoRA of rank 4 in peft layout"]
    refuse(["changes nothing: every update in it is zero", *told, f"lcm-compile inspect {empty}"], empty)


def test_a_refusal_tells_alpha_metadata_and_trigger_words(refuse, sdxl_loras, sd15_checkpoint, tmp_path):
    """As `inspect` does: of one that is for another base, and of one that changes nothing."""
    metadata = {
        "ss_output_name": "dog_v2",
        "ss_sd_model_name": "my\x1b[2Jbase.safetensors",
        "modelspec.trigger_phrase": "sks dog",
        "ss_tag_frequency": json.dumps({"10_sks": {"grass": 3, "sks dog": 12}}),
    }
    told = ["rank 4, alpha 2,", "title: dog_v2; trained from: my[2Jbase.safetensors; trigger phrase: sks dog"]
    told.append("likely triggers: sks dog (12), grass (3)")
    tensors, path = load_file(sdxl_loras["kohya"]), tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata)
    err = refuse(["does not fit this base", *told], path, base=sd15_checkpoint)
    assert "\x1b" not in err and len(err.partition("error: ")[2].splitlines()) == 4
    nothing = {key: t if key.endswith("alpha") else torch.zeros_like(t) for key, t in tensors.items()}
    save_file(nothing, path, metadata)
    refuse(["changes nothing", *told], path)


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("lora_down.weight", torch.ones(())),
        ("lora_down.weight", torch.ones(4)),
        ("lora_down.weight", torch.ones(0, 64)),
        ("lora_down.weight", torch.ones(4, 63)),
        ("lora_down.weight", torch.ones(3, 64)),
        ("lora_up.weight", torch.ones(64, 4, 3, 3)),
        ("alpha", torch.ones(2)),
        ("alpha", torch.ones(0)),
    ],
    ids=lambda x: str(list(x.shape)) if hasattr(x, "shape") else x,
)
def test_misshapen(refuse, sdxl_loras, tmp_path, part, tensor):
    key = f"{KEY}.{part}"
    path = changed(sdxl_loras["kohya"], tmp_path / "lora.safetensors", lambda t: t.update({key: tensor}))
    refuse([path, "down_blocks_1_attentions_0_proj_in"], path)


def test_one_module_told_twice(tmp_path):
    """The same module with and without `unet.`: neither is silently dropped."""
    key = "down_blocks.1.attentions.0.proj_in"
    tensors = {}
    for stem in (key, f"unet.{key}"):
        tensors |= {f"{stem}.lora_A.weight": torch.ones(2, 64), f"{stem}.lora_B.weight": torch.ones(64, 2)}
    path = factories.save_tensors(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(LoraError, match="twice"):
        read_lora(path)


@pytest.mark.parametrize("made", ["", "no JSON", "[]", "{}", '{"method": 3}', '{"method": "\\u001b"}'])
def test_a_foreign_method_is_none(made):
    assert method_of({"lcm_compile": made}) is None
    assert method_of({"lcm_compile": '{"method": "tcd"}'}) == "tcd"


@pytest.mark.parametrize(
    "metadata",
    [
        "{",
        "[5]",
        '{"unet.lora_alpha": "strong"}',
        '{"unet.lora_alpha": [1]}',
        '{"unet.lora_alpha": NaN}',
        '{"unet.lora_alpha": 4, "unet.alpha_pattern": 7}',
        '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 7}}',
    ],
)
def test_broken_adapter_settings(refuse, sdxl_loras, tmp_path, metadata):
    path = tmp_path / "lora.safetensors"
    save_file(load_file(sdxl_loras["peft"]), path, {"lora_adapter_metadata": metadata})
    refuse([path, "adapter metadata is broken"], path)


def test_a_dora(refuse, sdxl_loras, tmp_path):
    path = tmp_path / "lora.safetensors"
    settings = json.dumps({"unet.use_dora": True})
    save_file(load_file(sdxl_loras["peft"]), path, {"lora_adapter_metadata": settings})
    refuse([path, "DoRA"], path)


def test_a_weight_that_drowns_the_model(refuse, sdxl_loras):
    """Finite, but what it makes is not: the parity gate says so."""
    refuse(["NaN", "LoRA"], f"{sdxl_loras['kohya']}:1e30", code=3)


def test_a_dry_run_checks_that_loras_fit(refused, command, sdxl_loras, sd15_checkpoint, sdxl_checkpoint):
    """By shapes alone, and also where the engines are for a GPU that need not be there."""
    words = ("build", "--no-lcm", "--gpu", "cpu", "--dry-run", "--lora", sdxl_loras["peft"], "--base")
    refused(1, [sdxl_loras["peft"], "does not fit this base", "80 wide"], *words, sd15_checkpoint)
    assert command(*words, sdxl_checkpoint)[0] == 0


UNFIT = {
    "rank": {"lora_down.weight": (4, 64), "lora_up.weight": (64, 3)},
    "kernel of the up-projection": {"lora_down.weight": (4, 64, 1, 1), "lora_up.weight": (64, 4, 3, 3)},
    "core": {
        "lora_down.weight": (4, 64, 1, 1),
        "lora_mid.weight": (5, 5, 3, 3),
        "lora_up.weight": (64, 4, 1, 1),
    },
    "LoHa": {"hada_w1_a": (64, 4), "hada_w1_b": (4, 64), "hada_w2_a": (64, 5), "hada_w2_b": (4, 64)},
    "LoKr": {"lokr_w1": (8, 8), "lokr_w2_a": (8, 4), "lokr_w2_b": (5, 8)},
    "LoHa's halves": {"hada_w1_a": (64, 4), "hada_w1_b": (4, 64), "hada_w2_a": (64, 4), "hada_w2_b": (4, 63)},
    "difference": {"diff": (63, 64), "alpha": ()},
    "OFT": {"oft_blocks": (4, 8, 8), "alpha": ()},
    "OFT of no squares": {"oft_blocks": (8, 8, 7), "alpha": ()},
    "GLoRA": {"a1.weight": (9, 4), "a2.weight": (4, 9), "b1.weight": (64, 4), "b2.weight": (4, 64)},
    "(IA)³": {"weight": (63,), "on_input": ()},
}


@pytest.mark.parametrize("kind", UNFIT)
def test_factors_that_do_not_fit_each_other(kind, refused, command, sdxl_checkpoint, tmp_path):
    """`inspect` says of them what `build` says, where no base could make them fit."""
    shapes = UNFIT[kind]
    path = factories.save_tensors(
        {f"{KEY}.{part}": torch.ones(shape) for part, shape in shapes.items()}, tmp_path / "lora.safetensors"
    )
    told = [path, "down_blocks_1_attentions_0_proj_in ("]
    words = ("build", "--base", sdxl_checkpoint, "--no-lcm", "--gpu", "cpu", "--dry-run", "--lora", path)
    err = refused(1, told, *words).partition("error: ")[2]
    if kind in ("difference", "OFT", "OFT of no squares", "GLoRA", "(IA)³"):
        assert "does not fit this base" in err
        assert all(command("inspect", path, *more)[0] == 0 for more in ((), ("--base", sdxl_checkpoint)))
    else:
        assert "don't fit each other: " in err and "download" not in err
        assert refused(1, told, "inspect", path).partition("error: ")[2] == err


def test_kinds_that_are_known_but_not_fused_are_named(tmp_path):
    for part, name in {"oft_R.weight": "OFT of PEFT", "ia3_l": r"\(IA\)³ of PEFT"}.items():
        path = factories.save_tensors({f"unet.x.{part}": torch.ones(4, 6)}, tmp_path / "lora.safetensors")
        with pytest.raises(LoraError, match=f"no LoRA layout .*which are those of an {name}"):
            read_lora(path)
