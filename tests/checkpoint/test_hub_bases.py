"""Bases on the hub: what is fetched of a repository, which revision, and what is found without a network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import factories
import pytest
import torch

from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for a model; each revision is a folder under `root`."""

    root: Path
    fetched: list[str]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, *_):
        pass

    def answer(self, body):
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/(own/model)(?:/(revision|tree)/(.+))?", path):
            repository, listing, revision = found.groups()
            commit = COMMITS.get(revision or "main", revision)
            data = {
                "id": repository,
                "sha": commit,
                "siblings": [{"rfilename": f} for f in self.files(commit)],
            }
            if listing == "tree":
                data = [self.entry(commit, file) for file in self.files(commit)]
            self.send(json.dumps(data).encode(), body, {"Content-Type": "application/json"})
        elif found := re.fullmatch(r"/own/model/resolve/(\w+)/(.+)", path):
            commit, name = found.groups()
            data = (self.root / commit / name).read_bytes()
            if body:
                self.fetched.append(f"{commit[0]} {name}")
            self.send(data, body, {"ETag": f'"{digest(data)}"', "X-Repo-Commit": commit})
        else:
            self.send_error(404)

    def send(self, data, body, headers):
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def files(self, commit):
        folder = self.root / commit
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

    def entry(self, commit, name):
        data = (self.root / commit / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": digest(data)}


def digest(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def hub(sdxl_checkpoint, tmp_path_factory):
    """A hub with the model own/model: its revision v1 has another UNet than its newest."""
    root = tmp_path_factory.mktemp("hub")
    for commit in COMMITS.values():
        folder = shutil.copytree(sdxl_checkpoint, root / commit)
        for name in ("unet", "vae", "text_encoder"):
            weights = next((folder / name).glob("*.safetensors"))
            shutil.copyfile(weights, weights.with_name(weights.name.replace(".safe", ".fp16.safe")))
        for junk in (
            "model.ckpt",
            "base.safetensors",
            "unet/diffusion_pytorch_model.bin",
            "unet/model.onnx",
            "vae_decoder/model.onnx",
            "text_encoder/flax_model.msgpack",
            "safety_checker/model.safetensors",
        ):
            (folder / junk).parent.mkdir(exist_ok=True)
            (folder / junk).write_text("not needed")
    adapter = root / COMMITS["main"] / "sdxl_models"
    factories.write_ip_adapter(sdxl_checkpoint, adapter / "ip.safetensors")
    factories.write_image_encoder(adapter / "image_encoder", hidden=48, projection=40)  # which does not fit
    factories.write_image_encoder(root / COMMITS["main"] / "models/image_encoder")
    with (root / COMMITS["v1"] / "unet/config.json").open("a") as config:
        config.write("\n")
    handler = type("Handler", (Hub,), {"root": root, "fetched": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.fetched
        server.shutdown()


def plan(home, base, *words, **environment):
    """A dry run in a process of its own: its JSON, and stderr."""
    command = ["build", "--base", base, "--gpu", "cpu", "--dry-run", "--json", *words]
    done = subprocess.run(
        [sys.executable, "-m", "lcm_compile", *command],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"} | environment,
        cwd=home,
    )
    return json.loads(done.stdout) if done.returncode == 0 else None, done.stderr


SETTINGS = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{name}/config.json" for name in ("unet", "vae", "text_encoder", "text_encoder_2")),
    *(
        f"{name}/{file}"
        for name in ("tokenizer", "tokenizer_2")
        for file in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
    ),
}
WEIGHTS = {
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors",
}
HALF = {name.replace(".safe", ".fp16.safe") for name in WEIGHTS if "text_encoder_2" not in name}


def files_in(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_only_what_is_needed_is_fetched_and_found_again(hub, tmp_path):
    found, err = plan(tmp_path, "own/model", "--no-lcm", HF_ENDPOINT=hub[0])
    assert found is not None, err
    assert err == ""  # no bars where there is no terminal
    assert COMMITS["main"] in found["base"] and Path(found["bundle"]).name.startswith("own-model-cpu-")
    assert files_in(found["base"]) == SETTINGS | WEIGHTS
    offline, err = plan(tmp_path, "own/model", "--no-lcm", HF_HUB_OFFLINE="1")
    assert offline == found, err


def test_in_fp16_the_fp16_weights_are_fetched_where_there_are_any(hub, tmp_path):
    words = ("--no-lcm", "--precision", "fp16")
    found, err = plan(tmp_path, "own/model", *words, HF_ENDPOINT=hub[0])
    assert found is not None, err
    assert files_in(found["base"]) == SETTINGS | HALF | {"text_encoder_2/model.safetensors"}
    full, _ = plan(tmp_path, "own/model", "--no-lcm", HF_ENDPOINT=hub[0])
    assert full is not None and plan(tmp_path, "own/model", *words, HF_ENDPOINT=hub[0])[0] == found


def test_a_revision(hub, tmp_path):
    address, fetched = hub
    fetched.clear()
    keys = []
    for base in ("own/model", "own/model@v1", f"own/model@{COMMITS['v1']}"):
        found, err = plan(tmp_path, base, "--no-lcm", HF_ENDPOINT=address)
        assert found is not None, err
        keys.append(found["key"])
    assert keys[0] != keys[1] == keys[2]
    assert {name[0] for name in fetched} == {"a", "b"}
    found, err = plan(tmp_path, "own/model@v1", "--no-lcm", HF_HUB_OFFLINE="1")
    assert found and found["key"] == keys[1], err


def test_of_image_encoders_the_one_that_fits_is_fetched(hub, sdxl_checkpoint, tmp_path):
    address, fetched = hub
    fetched.clear()
    words = "--no-lcm", "--ip-adapter", "own/model:sdxl_models/ip.safetensors:0.6"
    found, err = plan(tmp_path, str(sdxl_checkpoint), *words, HF_ENDPOINT=address)
    assert found is not None and found["ip_adapter"] == words[-1], err
    of_encoder = {"models/image_encoder/config.json", "models/image_encoder/model.safetensors"}
    others = {"sdxl_models/ip.safetensors", "sdxl_models/image_encoder/config.json"}
    assert {name.partition(" ")[2] for name in fetched} == of_encoder | others


def test_a_path_wins(sdxl_checkpoint, hub, tmp_path):
    shutil.copytree(sdxl_checkpoint, tmp_path / "own/model")
    found, err = plan(tmp_path, "own/model", "--no-lcm", HF_ENDPOINT=hub[0])
    assert found and found["base"] == "own/model", err


def test_what_the_hub_does_not_have(hub, tmp_path):
    found, err = plan(tmp_path, "own/other", "--no-lcm", HF_ENDPOINT=hub[0])
    assert found is None and "Traceback" not in err
    assert "own/other" in err and "no path here" in err and "HF_TOKEN" in err


def snapshot(home, repository, folders):
    """A hub cache that holds a repository with these folders' files; "" is its root."""
    place = home / "hub" / f"models--{repository.replace('/', '--')}"
    for name, source in folders.items():
        shutil.copytree(source, place / "snapshots" / ("c" * 40) / name, dirs_exist_ok=True)
    (place / "refs").mkdir()
    (place / "refs/main").write_text("c" * 40)
    return place / "snapshots" / ("c" * 40)


@pytest.mark.parametrize("base", ["lcm-sdxl", "latent-consistency/lcm-sdxl", "folder"])
def test_a_full_lcm_that_is_a_unet_alone(sdxl_checkpoint, tmp_path, base):
    """With the other models of the checkpoint it was made of; no LoRA is looked for."""
    unet = shutil.copytree(sdxl_checkpoint / "unet", tmp_path / "lcm")
    config = json.loads((unet / "config.json").read_text())
    config |= {"time_cond_proj_dim": 256, **FAMILIES["lcm-sdxl"].signature}
    (unet / "config.json").write_text(json.dumps(config))
    alone = snapshot(tmp_path, "latent-consistency/lcm-sdxl", {"": unet})
    others = snapshot(tmp_path, "stabilityai/stable-diffusion-xl-base-1.0", {"": sdxl_checkpoint})
    shutil.rmtree(others / "unet")
    base = str(unet) if base == "folder" else base
    found, err = plan(tmp_path, base, HF_HUB_OFFLINE="1")
    assert found is not None, err
    assert (found["base"], found["loras"]) == (str(others), [])
    for folder in (alone, unet):
        with (folder / "config.json").open("a") as file:
            file.write("\n")
    assert plan(tmp_path, base, HF_HUB_OFFLINE="1")[0]["key"] != found["key"]


def test_a_unet_alone_computes_what_it_does_in_its_checkpoint():
    demo = open_checkpoint("demo")
    alone = open_checkpoint(str(Path(FAMILIES["demo"].base) / "unet"))
    assert alone.content(str) == demo.content(str)
    weights = load_component(demo, "unet").state_dict()
    found = load_component(alone, "unet").state_dict()
    assert all(torch.equal(weight, found[key]) for key, weight in weights.items())


def test_a_full_lcm_that_is_a_whole_pipeline(sd15_checkpoint, tmp_path):
    place = snapshot(tmp_path, "SimianLuo/LCM_Dreamshaper_v7", {"": sd15_checkpoint})
    config = json.loads((place / "unet/config.json").read_text())
    (place / "unet/config.json").write_text(json.dumps(config | FAMILIES["lcm-dreamshaper"].signature))
    for base in ("lcm-dreamshaper", "SimianLuo/LCM_Dreamshaper_v7"):
        found, err = plan(tmp_path, base, HF_HUB_OFFLINE="1")
        assert found and found["loras"] == [], err
