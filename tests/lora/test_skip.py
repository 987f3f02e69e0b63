"""Keys of a LoRA's file that belong to no module, which can be left out; and words that come with a LoRA."""

from __future__ import annotations

import json

import factories
import pytest
import torch
from safetensors.torch import load_file

from lcm_compile import BuildSpec, build
from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.errors import LoraError
from lcm_compile.lora.read import read_lora
from lcm_compile.spec import LoraSpec

STRAY = {
    "diffusion_model_extra_0.lora_down.weight": torch.ones(4, 16),
    "diffusion_model_extra_0.lora_up.weight": torch.ones(16, 4),
}
ONETRAINER = {"bundle_emb.my fox.clip_l": torch.ones(2, 32), "bundle_emb.my fox.clip_g": torch.ones(2, 48)}
WEBUI = {"bundle_emb.fox.string_to_param.*": torch.ones(2, 32)}


@pytest.fixture(scope="module")
def base(sdxl_checkpoint):
    return sdxl_checkpoint


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """A LoRA without anything besides."""
    pipe = factories.load_modules(open_checkpoint(str(base)))
    return factories.write_lora(pipe, tmp_path_factory.mktemp("plain") / "lora.safetensors", "kohya")


@pytest.fixture
def with_extra(plain, tmp_path):
    """The same LoRA with more tensors in its file."""
    return lambda extra: factories.save_tensors({**load_file(plain), **extra}, tmp_path / "lora.safetensors")


def weights(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize(
    ("extra", "pattern", "told"),
    [
        (
            STRAY,
            "diffusion_model_extra_0.lora_*",
            "2 keys match no module: diffusion_model_extra_0.lora_down",
        ),
        ({"what.is.this": torch.ones(2)}, "what.is.this*", "1 of 198 keys are of no LoRA layout"),
        (WEBUI, "bundle_emb.*", "(2, 32) for one text encoder"),
    ],
    ids=["stray", "unknown", "a word for SD1.5"],
)
def test_fuse_names_such_keys_and_leaves_them_out_on_request(
    extra, pattern, told, base, plain, with_extra, refused, command, tmp_path
):
    """What is fused then is the LoRA without them."""
    path, start = with_extra(extra), ["fuse", "--base", base, "--no-lcm", "--precision", "fp32"]
    told = told.replace("198", str(len(load_file(path))))
    refused(1, [told, f"--lora-skip '{pattern}'"], *start, "--lora", path, "--out", tmp_path / "no")
    code, _, err = command(*start, "--lora", path, "--lora-skip", pattern, "--out", tmp_path / "skipped")
    assert (code, f"{len(extra)} keys are left out by --lora-skip" in err) == (0, True), err
    command(*start, "--lora", plain, "--out", tmp_path / "plain")
    assert weights(tmp_path / "skipped") == weights(tmp_path / "plain")


def test_what_is_left_out_is_in_the_key_the_manifest_and_the_command(base, with_extra, tmp_path):
    path = with_extra({**STRAY, **WEBUI})
    spec = BuildSpec(
        base=str(base),
        no_lcm=True,
        few_step="lcm",
        loras=(LoraSpec(str(path)),),
        lora_skip=("bundle_emb.*", "*extra_0*"),
        backend="torchscript",
    )
    manifest, _ = read_manifest(build(spec, tmp_path / "bundle").folder)
    assert manifest.loras[0]["skipped"] == {"bundle_emb.*": 1, "*extra_0*": 2}
    assert manifest.key["LoRA keys left out"] == "*extra_0*, bundle_emb.*"
    assert manifest.spec == spec
    assert "--lora-skip 'bundle_emb.*' --lora-skip '*extra_0*'" in spec.command()


@pytest.mark.parametrize("words", [("--dry-run",), ()])
def test_a_pattern_that_matches_nothing_is_an_error(words, base, plain, refused, tmp_path):
    start = ["build", "--base", base, "--no-lcm", "--gpu", "cpu", "--out", tmp_path / "b"]
    told = f"--lora-skip 'bundle_emb.*' matches no key of {plain}"
    refused(1, told, *start, "--lora", plain, "--lora-skip", "bundle_emb.*", *words)
    refused(1, "matches no key of a LoRA, as there is none", *start, "--lora-skip", "x", *words)
    assert not (tmp_path / "b").exists()


def test_patterns_of_inspect(plain, with_extra, command, refused):
    path = with_extra({"what.is.this": torch.ones(2), **ONETRAINER})
    err = refused(1, ["what.is.this", "no LoRA layout", "--lora-skip 'what.is.this*'"], "inspect", path)
    assert "bundle_emb" not in err
    code, out, _ = command("inspect", path, "--lora-skip", "what*", "--json")
    told = json.loads(out)
    assert (code, told["skipped"]) == (0, {"what*": 1})
    assert {word: set(keys) for word, keys in told["embeddings"].items()} == {"my fox": {*ONETRAINER}}
    assert "my fox" in command("inspect", path, "--lora-skip", "what*")[1]
    refused(1, "matches no key", "inspect", plain, "--lora-skip", "what*")
    refused(2, "--lora-skip is for LoRAs", "inspect", "demo", "--lora-skip", "what*")


@pytest.mark.parametrize("lost", ["lora_up.weight", "lora_down.weight"])
def test_a_lost_half_stays_an_error(lost, plain, tmp_path):
    """Also where a pattern leaves it out."""
    tensors = load_file(plain)
    key = next(key for key in tensors if key.endswith(lost))
    with pytest.raises(LoraError, match="lacks factors"):
        read_lora(plain, [key])
    del tensors[key]
    with pytest.raises(LoraError, match="lacks factors"):
        read_lora(factories.save_tensors(tensors, tmp_path / "half.safetensors"))


INVERSIONS = {
    "webui": ({"emb_params": torch.ones(3, 32)}, "3 vectors of 32"),
    "SDXL": ({"clip_l": torch.ones(1, 32), "clip_g": torch.ones(1, 48)}, "1 vector of 32 and 48"),
    "diffusers": ({"<fox>": torch.ones(32)}, "1 vector of 32"),
    "diffusers, words": ({"<fox>": torch.ones(2, 32), "<den>": torch.ones(2, 32)}, "2 vectors of 32"),
}


@pytest.mark.parametrize("layout", INVERSIONS)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_a_textual_inversion_is_told_what_it_is(layout, suffix, tmp_path):
    tensors, told = INVERSIONS[layout]
    path = tmp_path / f"fox{suffix}"
    factories.save_tensors(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    with pytest.raises(LoraError) as error:
        read_lora(path)
    assert error.value.message == f"{path} is a textual inversion ({told}), not a LoRA"
    assert error.value.hint == f"--embedding {path} in place of --lora"


@pytest.mark.parametrize("words", [("fuse", "--out", "x"), ("build", "--gpu", "cpu", "--dry-run")])
def test_a_textual_inversion_given_as_a_lora(words, refused, base, tmp_path):
    path = factories.save_tensors({"emb_params": torch.ones(3, 32)}, tmp_path / "fox.safetensors")
    refused(1, "is a textual inversion", *words, "--base", base, "--no-lcm", "--lora", path)


@pytest.mark.parametrize("container", [dict, torch.nn.ParameterDict])
def test_webuis_pickle_of_a_textual_inversion(container, tmp_path):
    param = (
        torch.nn.Parameter(torch.ones(2, 32)) if container is torch.nn.ParameterDict else torch.ones(2, 32)
    )
    content = {"string_to_token": {"*": 265}, "string_to_param": container({"*": param}), "name": "fox"}
    torch.save(content, tmp_path / "fox.pt")
    with pytest.raises(LoraError, match=r"fox\.pt is a textual inversion \(2 vectors of 32\), not a LoRA"):
        read_lora(tmp_path / "fox.pt")


def test_a_file_of_embeddings_alone_is_no_lora(tmp_path):
    with pytest.raises(LoraError, match="embeddings of words only"):
        read_lora(factories.save_tensors(ONETRAINER, tmp_path / "fox.safetensors"))
    with pytest.raises(LoraError, match="leaves nothing of it"):
        read_lora(factories.save_tensors(STRAY, tmp_path / "stray.safetensors"), ["*"])
