"""Textual inversions: files of every layout, against diffusers with the same vectors loaded."""

from __future__ import annotations

import json
import re
import shutil

import factories
import pytest
import torch
from diffusers_reference import FLOOR, Pair, reference
from safetensors.torch import load_file, save_file

from lcm_compile import BuildSpec, build, load
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_tokenizer
from lcm_compile.checkpoint.open import open_base
from lcm_compile.errors import CheckpointError
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import psnr_db
from lcm_compile.spec import EmbeddingSpec
from lcm_compile.training.encode import Encoder

WORD = "<zed>"
PROMPT = f"a large {WORD} star on white{WORD}"
WIDTHS = {"sd15": {"clip_l": 32}, "sdxl": {"clip_l": 32, "clip_g": 48}}


def vectors(family, count, seed=5):
    random = torch.Generator().manual_seed(seed)
    return {name: 4 * torch.randn(count, width, generator=random) for name, width in WIDTHS[family].items()}


def save_as(layout, folder, found):
    """Writes the vectors in a layout of real files, and returns the file."""
    (alone,) = [*found.values()][:1]
    webui = {"string_to_token": {"*": 265}, "name": "other", "step": 9, "sd_checkpoint": None}
    if layout == "diffusers":
        torch.save({WORD: alone}, path := folder / "learned_embeds.bin")
    elif layout == "diffusers safetensors":
        save_file({WORD: alone}, path := folder / "learned_embeds.safetensors")
    elif layout == "webui":
        torch.save({**webui, "string_to_param": {"*": torch.nn.Parameter(alone)}}, path := folder / "a.pt")
    elif layout == "the authors'":
        params = torch.nn.ParameterDict({"*": torch.nn.Parameter(alone)})
        torch.save(
            {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": params}, path := folder / "a.pt"
        )
    elif layout == "webui safetensors":
        save_file({"emb_params": alone}, path := folder / f"{WORD}.safetensors")
    elif layout == "a tensor":
        torch.save(alone, path := folder / f"{WORD}.pt")
    elif layout == "training scripts":
        names = {"clip_l": "text_encoders_0", "clip_g": "text_encoders_1"}
        save_file({names[n]: t for n, t in found.items()}, path := folder / f"{WORD}.safetensors")
    elif layout == "in a LoRA":
        lora = {"lora_unet_mid_block.alpha": torch.ones(())}
        bundled = {f"bundle_emb.{WORD}.{n}": t for n, t in found.items()}
        if len(found) == 1:
            bundled = {f"bundle_emb.{WORD}.string_to_param.*": alone}
        save_file({**bundled, **lora}, path := folder / "lora.safetensors")
    else:
        save_file(found, path := folder / f"{WORD}.safetensors")
    return path


def with_vectors(base, family, found, word=WORD):
    """Diffusers' pipeline once it has loaded the vectors, each into its own text encoder."""
    pipe = reference(base)
    for name, place in zip(WIDTHS[family], ("", "_2"), strict=False):
        encoder, tokenizer = getattr(pipe, f"text_encoder{place}"), getattr(pipe, f"tokenizer{place}")
        pipe.load_textual_inversion({name: found[name]}, word, tokenizer, encoder)
    return pipe


def texts(pipe, prompt):
    """The text states of a prompt by diffusers, as float arrays."""
    found = pipe.encode_prompt(
        prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return [states.detach() for states in found if states is not None]


def our_texts(checkpoint, prompt):
    states = Encoder(checkpoint, torch.device("cpu")).prompts([prompt])
    return [states[name] for name in ("encoder_hidden_states", "text_embeds") if name in states]


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def with_embedding(base, *embeddings):
    return open_base(
        BuildSpec(str(base), embeddings=tuple(EmbeddingSpec.parse(str(e)) for e in embeddings)), half=False
    )


@pytest.fixture
def base_of(sd15_checkpoint, sdxl_checkpoint):
    return {"sd15": sd15_checkpoint, "sdxl": sdxl_checkpoint}.__getitem__


@pytest.mark.parametrize("family", WIDTHS)
def test_pictures_are_those_of_diffusers(base_of, tmp_path, family):
    base, found = base_of(family), vectors(family, 4)
    path = save_as("ComfyUI" if family == "sdxl" else "webui", tmp_path, found)
    spec = BuildSpec(
        str(base),
        no_lcm=True,
        few_step="lcm",
        embeddings=(EmbeddingSpec(str(path), WORD),),
        backend="torchscript",
    )
    with load(build(spec, tmp_path / "bundle")) as ours:
        pair = Pair(ours, with_vectors(base, family, found), 64, 64)
        assert min(pair.psnr(PROMPT)) >= FLOOR
        assert min(pair.psnr(PROMPT, guidance_scale=1.5, negative_prompt=f"{WORD} circle")) >= FLOOR
        plain = pair.ours.draw(Request("a large star on white", 7)).pictures[0]
        assert psnr_db(plain, pair.ours.draw(Request(PROMPT, 7)).pictures[0]) < 40


LAYOUTS = {
    "sd15": [
        *("diffusers", "diffusers safetensors", "webui", "the authors'", "webui safetensors", "a tensor"),
        *("ComfyUI", "training scripts", "in a LoRA"),
    ],
    "sdxl": ["ComfyUI", "training scripts", "in a LoRA"],
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("family", "layout"), [(f, layout) for f in LAYOUTS for layout in LAYOUTS[f]])
def test_every_layout(base_of, tmp_path, family, layout, count):
    base, found = base_of(family), vectors(family, count)
    path = save_as(layout, tmp_path, found)
    named = f"{path}:{WORD}" if layout in ("webui", "the authors'") else str(path)
    theirs = texts(with_vectors(base, family, found), PROMPT)
    assert_close(our_texts(with_embedding(base, named), PROMPT), theirs)


def test_a_single_vector_without_rows(base_of, tmp_path):
    found = vectors("sd15", 1)
    torch.save({WORD: found["clip_l"][0]}, tmp_path / "learned_embeds.bin")
    theirs = texts(with_vectors(base_of("sd15"), "sd15", found), PROMPT)
    assert_close(our_texts(with_embedding(base_of("sd15"), tmp_path), PROMPT), theirs)


def test_several_words_and_a_prompt_that_is_too_long(base_of, tmp_path):
    base, one, two = base_of("sdxl"), vectors("sdxl", 5), vectors("sdxl", 2, seed=6)
    for place, found in (("1", one), ("2", two)):
        save_file(found, tmp_path / f"{place}.safetensors")
    pipe = with_vectors(base, "sdxl", one, "<one>")
    for place, name in (("", "clip_l"), ("_2", "clip_g")):
        encoder, tokenizer = getattr(pipe, f"text_encoder{place}"), getattr(pipe, f"tokenizer{place}")
        pipe.load_textual_inversion({name: two[name]}, "<two>", tokenizer, encoder)
    checkpoint = with_embedding(base, tmp_path / "1.safetensors:<one>", tmp_path / "2.safetensors:<two>")
    for prompt in ("<two> red <one>", "red <one> star " * 20, "a <two>, <two>"):
        assert_close(our_texts(checkpoint, prompt), texts(pipe, prompt))


@pytest.mark.parametrize("eos", [2, None])
def test_pooled_states_where_transformers_takes_the_largest_id(base_of, tmp_path, eos):
    """With the eos_token_id of the hub's CLIP, 2, that is the id of the word."""
    base = shutil.copytree(base_of("sdxl"), tmp_path / "base")
    config = json.loads((base / "text_encoder_2/config.json").read_text())
    config["eos_token_id"] = eos or config["eos_token_id"]
    (base / "text_encoder_2/config.json").write_text(json.dumps(config))
    found = vectors("sdxl", 2)
    path = save_as("ComfyUI", tmp_path, found)
    assert_close(
        our_texts(with_embedding(base, path), PROMPT), texts(with_vectors(base, "sdxl", found), PROMPT)
    )


@pytest.mark.parametrize("family", WIDTHS)
def test_a_word_in_the_vocabulary_of_a_base(base_of, tmp_path, family):
    """A folder that diffusers saved with its textual inversion loaded."""
    pipe = with_vectors(base_of(family), family, vectors(family, 3))
    pipe.save_pretrained(tmp_path / "saved")
    theirs = texts(reference(tmp_path / "saved"), PROMPT)
    assert_close(theirs, texts(pipe, PROMPT))
    assert_close(our_texts(open_checkpoint(str(tmp_path / "saved")), PROMPT), theirs)


def test_all_vectors_of_a_word_with_capitals(base_of, tmp_path):
    """Diffusers with transformers 5 finds no capitals in the tokens, and uses the first vector alone."""
    found = vectors("sd15", 3)
    save_file(found, tmp_path / "EasyWord.safetensors")
    lower = texts(with_vectors(base_of("sd15"), "sd15", found, "easyword"), "a easyword star")
    checkpoint = with_embedding(base_of("sd15"), tmp_path / "EasyWord.safetensors")
    for prompt in ("a EasyWord star", "a easyword star"):
        assert_close(our_texts(checkpoint, prompt), lower)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        # In diffusers too, a prompt's "fox" stands for fox, fox_1, fox_2 and so on, as far as they are there.
        ([("fox", 1), ("fox_1", 1)], "'fox_1': it would be read as one more vector"),
        ([("fox", 2), ("fox_2", 1)], "'fox_2': it would be read as one more vector"),
        ([("fox_1", 1), ("fox", 1)], "'fox': the tokenizer has the token 'fox_1' already"),
        ([("fox_2", 1), ("fox", 3)], "'fox': the tokenizer has the token 'fox_2' already"),
        # CLIP's tokenizer reads prompts in lower case.
        ([("Fox", 1), ("fox", 2)], "prompts with it are read as"),
        ([("<zed>", 2), ("<ZED>", 2)], "prompts with it are read as"),
    ],
)
def test_words_that_prompts_cannot_tell_apart_are_refused(base_of, tmp_path, words, told):
    named = []
    for number, (word, count) in enumerate(words):
        save_file(vectors("sd15", count, seed=number), path := tmp_path / f"{number}.safetensors")
        named.append(f"{path}:{word}")
    with pytest.raises(CheckpointError, match=re.escape(told)):
        load_tokenizer(with_embedding(base_of("sd15"), *named), "tokenizer")


def test_numbered_words_that_prompts_can_tell_apart(base_of, tmp_path):
    base, places = base_of("sd15"), {"fox_1": 2, "fox_3": 1, "cat": 3, "dog_01": 1, "dog": 1}
    pipe, named = reference(base), []
    for number, (word, count) in enumerate(places.items()):
        found = vectors("sd15", count, seed=number)
        save_file(found, path := tmp_path / f"{number}.safetensors")
        pipe.load_textual_inversion({"clip_l": found["clip_l"]}, word)
        named.append(f"{path}:{word}")
    checkpoint = with_embedding(base, *named)
    for prompt in ("red fox_1", "fox_3", "a cat", "dog_01", "a dog star"):
        assert_close(our_texts(checkpoint, prompt), texts(pipe, prompt))


def test_a_lora_of_the_table_of_tokens(base_of, command, tmp_path):
    """It changes the base's own rows, and the words' rows come after them."""
    base, found = base_of("sd15"), vectors("sd15", 3)
    path = save_as("ComfyUI", tmp_path, found)
    pipe = reference(base)
    with torch.no_grad():
        table = pipe.text_encoder.get_input_embeddings().weight
        moved = torch.randn(table.shape, generator=torch.Generator().manual_seed(4))
        table += moved
    key = "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.diff"
    save_file({key: moved}, lora := tmp_path / "lora.safetensors")
    pipe.load_textual_inversion({"clip_l": found["clip_l"]}, WORD)
    theirs = texts(pipe, PROMPT)
    words = ["--base", base, "--no-lcm", "--lora", lora, "--embedding", f"{path}:{WORD}"]
    code, _, err = command("fuse", *words, "--precision", "fp32", "--out", tmp_path / "fused")
    assert code == 0, err
    assert_close(our_texts(open_checkpoint(str(tmp_path / "fused")), PROMPT), theirs)
    words += ["--gpu", "cpu", "--backend", "torchscript", "--out", tmp_path / "bundle"]
    code, _, err = command("build", *words)
    assert code == 0, err
    with load(tmp_path / "bundle") as ours:
        assert min(Pair(ours, pipe, 64, 64).psnr(PROMPT)) >= FLOOR


def test_fuse_writes_a_folder_that_diffusers_reads_the_words_of(base_of, command, tmp_path):
    base, found = base_of("sdxl"), vectors("sdxl", 3)
    path = save_as("ComfyUI", tmp_path, found)
    words = ["fuse", "--base", base, "--no-lcm", "--embedding", f"{path}:{WORD}", "--precision", "fp32"]
    assert command(*words, "--out", tmp_path / "fused")[0] == 0
    theirs = texts(with_vectors(base, "sdxl", found), PROMPT)
    assert_close(texts(reference(tmp_path / "fused"), PROMPT), theirs)
    assert_close(our_texts(open_checkpoint(str(tmp_path / "fused")), PROMPT), theirs)


def test_a_bundle_tells_its_words_and_a_changed_one_is_a_miss(base_of, command, tmp_path):
    path = save_as("webui", tmp_path, vectors("sd15", 3))
    words = ["build", "--base", base_of("sd15"), "--gpu", "cpu", "--no-lcm", "--backend", "torchscript"]
    words += ["--out", tmp_path / "bundle", "--embedding", path]
    assert command(*words)[0] == 0
    told = json.loads(command("inspect", tmp_path / "bundle", "--json")[1])["embeddings"]
    assert told == [{"source": str(path), "word": "other", "vectors": 3}]
    hit = json.loads(command(*words, "--dry-run", "--json")[1])
    assert hit["hit"] and hit["embeddings"] == [str(path)]
    named = json.loads(command(*words[:-1], f"{path}:zed", "--dry-run", "--json")[1])
    assert not named["hit"] and any("embedding 1 word changed" in reason for reason in named["reasons"])
    save_as("webui", tmp_path, vectors("sd15", 3, seed=8))
    changed = json.loads(command(*words, "--dry-run", "--json")[1])
    assert not changed["hit"] and any("embedding 1 changed" in reason for reason in changed["reasons"])
    without = json.loads(command(*words[:-2], "--dry-run", "--json")[1])
    assert any("embedding 1 is gone" in reason for reason in without["reasons"])


def test_words_that_a_lora_brings_along(base_of, command, tmp_path):
    base, found = base_of("sdxl"), vectors("sdxl", 3)
    lora = factories.write_lora(reference(base), tmp_path / "lora.safetensors", "kohya")
    bundled = {f"bundle_emb.{WORD}.{name}": tensor for name, tensor in found.items()}
    factories.save_tensors({**load_file(lora), **bundled}, lora)
    words = ["fuse", "--base", base, "--no-lcm", "--lora", f"{lora}:0", "--precision", "fp32", "--out"]
    code, _, err = command(*words, tmp_path / "fused")
    assert code == 0 and f"brings the textual inversion '{WORD}' along" in err
    theirs = texts(with_vectors(base, "sdxl", found), PROMPT)
    assert_close(our_texts(open_checkpoint(str(tmp_path / "fused")), PROMPT), theirs)
    renamed = ["--embedding", f"{lora}:renamed"]
    code, _, err = command(*words, tmp_path / "renamed", *renamed)
    assert code == 0 and "along" not in err
    theirs = texts(with_vectors(base, "sdxl", found, "renamed"), f"{WORD} renamed")
    assert_close(our_texts(open_checkpoint(str(tmp_path / "renamed")), f"{WORD} renamed"), theirs)
    assert command(*words, tmp_path / "skipped", "--lora-skip", "bundle_emb.*")[0] == 0
    theirs = texts(reference(base), PROMPT)
    assert_close(our_texts(open_checkpoint(str(tmp_path / "skipped")), PROMPT), theirs)


def bad_files(folder):
    """Files that are no textual inversion for SD1.5, each with what must be said of it."""
    random = torch.randn(2, 32)
    yield {"clip_l": random, "clip_g": torch.randn(2, 48)}, ["text_encoder_2", "width 32"]
    yield {"emb_params": torch.randn(2, 48)}, ["(2, 48)", "width 32"]
    yield {"emb_params": torch.full((2, 32), torch.nan)}, ["NaN"]
    yield {"emb_params": torch.zeros(0, 32)}, ["0 vectors"]
    yield {"<a>": random, "<b>": random.clone()}, ["2 textual inversions", "'<a>'", ":<a>"]
    yield {"clip_l": random, "t5xxl": torch.randn(2, 64)}, ["other text encoders", "t5xxl"]
    yield {"lora_unet_x.lora_down.weight": torch.randn(4, 32, 3, 3)}, ["no textual inversion", "--lora"]
    yield {"bundle_emb.one.clip_l": random, "bundle_emb.two.clip_l": random.clone()}, ["'one', 'two'", ":one"]


def test_files_that_do_not_fit(base_of, refused, tmp_path):
    for number, (tensors, told) in enumerate(bad_files(tmp_path)):
        save_file(tensors, path := tmp_path / f"{number}.safetensors")
        words = ["build", "--base", base_of("sd15"), "--gpu", "cpu", "--no-lcm", "--out", tmp_path / "bundle"]
        refused(1, [path, *told], *words, "--embedding", path)
        refused(1, [path, *told], *words, "--embedding", path, "--dry-run")
        assert not (tmp_path / "bundle").exists()


def test_files_that_cannot_be_read(base_of, refused, tmp_path):
    words = ["build", "--base", base_of("sd15"), "--gpu", "cpu", "--no-lcm", "--out", tmp_path / "bundle"]
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "page.safetensors").write_text("<html>")
    (tmp_path / "folder").mkdir()
    refused(1, "empty.pt", *words, "--embedding", tmp_path / "empty.pt")
    refused(1, "web page", *words, "--embedding", tmp_path / "page.safetensors")
    refused(1, "learned_embeds", *words, "--embedding", tmp_path / "folder")
    refused(2, "nothing.pt does not exist", *words, "--embedding", tmp_path / "nothing.pt")
    path = save_as("webui", tmp_path, vectors("sd15", 2))
    refused(1, "'red</w>' already", *words, "--embedding", f"{path}:red</w>")
    refused(1, "'x' already", *words, "--embedding", f"{path}:x", "--embedding", f"{path}:x")
    refused(2, "lacks its file or its word", *words, "--embedding", f"{path}: ")
    fuse = ["fuse", "--base", base_of("sd15"), "--no-lcm", "--embedding", path]
    refused(2, "no place in one file", *fuse, "--out", tmp_path / "a.safetensors")
