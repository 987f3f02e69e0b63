"""Measures what LoRAs at run time cost, and fills their table in docs/performance.md.

A bundle with a fused LoRA is timed in turn with one that takes its weight as an input, and with one that has
a slot for it, of rank 64, which computes as much whatever is in it.

Run `python -m lcm_compile.benchmarks.pages.loras_table --base demo --lora FILE` in a clone. Without a LoRA it
makes one of random factors for the UNet's attention. It builds the bundles and keeps the raw samples in
benchmarks/results/.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from lcm_compile.benchmarks.pages.rewrites_table import measure, publish, table_of
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.checkpoint.open import open_base
from lcm_compile.spec import BuildSpec, LoraSpec

FUSED, WEIGHT, SLOT = "the LoRA is fused", "its weight is an input", "a slot of rank 64"


def random_lora(spec: BuildSpec, rank: int, path: Path) -> Path:
    """Writes a LoRA of random factors for the attention and the feed-forward layers of a base's UNet."""
    import torch
    from safetensors.torch import save_file

    unet = empty_module(open_base(spec, half=False).components["unet"])
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear) and "transformer_blocks" in name:
            down = torch.randn(rank, layer.in_features, generator=generator) * layer.in_features**-0.5
            up = torch.randn(layer.out_features, rank, generator=generator) * 0.01
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file(tensors, path)
    return path


@click.command()
@click.option("--base", default="demo", show_default=True)
@click.option("--backend", default="onnxruntime", show_default=True)
@click.option("--precision", default="fp32", show_default=True)
@click.option("--weights", help="random, for a base whose weights are not here.")
@click.option("--lora", type=click.Path(path_type=Path), help="The LoRA.")
@click.option("--rank", type=int, default=16, show_default=True, help="Of random factors.")
@click.option("--runs", type=int, default=40, show_default=True)
@click.option("--seconds", type=float, default=600, show_default=True)
def main(
    base: str,
    backend: str,
    precision: str,
    weights: str | None,
    lora: Path | None,
    rank: int,
    runs: int,
    seconds: float,
) -> None:
    """Measures LoRAs at run time, keeps the samples, and fills the table."""
    spec = BuildSpec(base, backend=backend, precision=precision, weights=weights)
    with tempfile.TemporaryDirectory() as folder:
        source = str(lora or random_lora(spec, rank, Path(folder) / f"rank-{rank}.safetensors"))
        others = {
            WEIGHT: replace(spec, loras=(LoraSpec(source, name="lora"),)),
            SLOT: replace(spec, lora_slots=1, lora_rank=64),
        }
        report = measure(replace(spec, loras=(LoraSpec(source),)), others, runs, seconds)
    publish(report, "loras", partial(table_of, own=FUSED, others=(WEIGHT, SLOT)), "loras")


if __name__ == "__main__":
    main()
