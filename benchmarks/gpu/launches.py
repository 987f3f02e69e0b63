"""Counts what a compiled engine launches on a GPU, what it moves and what it multiplies, without the GPU.

`python -m lcm_compile.benchmarks.gpu.launches BUNDLE`

It reads the host code that torch's compiler wrote into each engine of `aotinductor`. A Triton kernel moves
each of its arrays once, or twice where it reads and writes one. It can move no less, unless it reads but a
part of an array, as rows of an embedding. FLOP are those of the libraries' products, convolutions and
attention, two for a multiplication and an addition.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

from lcm_compile.benchmarks.markdown import markdown_table
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.errors import LcmCompileError, UsageError
from lcm_compile.graphs import StageContract

BYTES = {"bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float16": 2, "bfloat16": 2, "int32": 4}
BYTES |= {"float32": 4, "int64": 8, "float64": 8}
# How torch names its calls of libraries, and what they are called here.
KINDS = {
    "mm_out": "products",
    "addmm_out": "products",
    "bmm_out": "products",
    "_scaled_mm_out": "products",
    "convolution": "convolutions",
    "_scaled_dot_product_cudnn_attention": "attention",
    "_scaled_dot_product_flash_attention": "attention",
    "_scaled_dot_product_efficient_attention": "attention",
}
# The lines of the host code that are read: what an array's sizes are, and what is called with it.
WRAPPED = r"wrap_with_raii_handle_if_needed\(reinterpret_tensor_wrapper\("
LIST = re.compile(r"int64_t (int_array_\d+)\[\] = \{(.*)\};")
INPUT = re.compile(r"auto (\w+) = std::move\(inputs\[(\d+)\]\);")
REUSED = re.compile(r"auto (\w+) = std::move\((\w+)\);")
AGAIN = re.compile(r"_new_tensor_handle\((\w+), &(\w+)\)")
MADE = re.compile(r"_empty_strided\(\d+, (\w+), \w+, cached_torch_dtype_(\w+),.*&(\w+)_handle\)")
RESIZED = re.compile(rf"auto (\w+) = {WRAPPED}(\w+), \d+, (\w+), ")
KERNEL = re.compile(r"\s*call_(triton_\w+)\((.*)\);")
LIBRARY = re.compile(r"aoti_torch_cuda_(\w+)\((.*)\)\);")


@dataclass(frozen=True)
class Array:
    """The sizes of an array, and the bytes of an element."""

    sizes: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """The bytes of all elements."""
        return math.prod(self.sizes) * self.itemsize


@dataclass
class Launches:
    """What one call of an engine launches: how many of each kind, and what these move and multiply.

    `kernels` are the bytes of each of Triton's kernels, added up over its launches.
    """

    counts: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    flop: Counter[str] = field(default_factory=Counter)


def launches_of(path: Path, contract: StageContract) -> Launches:
    """Returns what an engine launches. Raises UsageError if it was not compiled for a GPU."""
    with zipfile.ZipFile(path) as package:
        [name] = [n for n in package.namelist() if n.endswith("wrapper.cpp")]
        source = package.read(name).decode()
    if "aoti_torch_cuda_" not in source and "call_triton_" not in source:
        raise UsageError(f"{path} was not compiled for a GPU", "a bundle of --backend aotinductor --gpu h100")
    return read_launches(source, [Array(s.shape, np.dtype(s.dtype).itemsize) for s in contract.inputs])


def read_launches(source: str, inputs: Sequence[Array]) -> Launches:
    """Returns what the host code of an engine launches, which has arrays of these sizes as its inputs.

    Raises UsageError for a call of a library that is not among KINDS.
    """
    found, arrays, lists = Launches(), constants_of(source), dict[str, tuple[int, ...]]()
    in_place = read_and_written(source)
    body = source.partition("AOTInductorModel::run_impl(")[2]
    for line in body.splitlines():
        if match := LIST.search(line):
            lists[match[1]] = numbers(match[2])
        elif match := INPUT.search(line):
            arrays[match[1]] = inputs[int(match[2])]
        elif match := REUSED.search(line):
            arrays[match[1]] = arrays[match[2]]
        elif match := AGAIN.search(line):
            arrays[match[2]] = arrays[match[1]]
        elif match := MADE.search(line):
            arrays[match[3]] = Array(lists[match[1]], BYTES[match[2]])
        elif match := RESIZED.search(line):
            arrays[match[1]] = Array(lists[match[3]], arrays[match[2]].itemsize)
        elif match := KERNEL.match(line):
            given, twice = arguments(match[2], arrays, lists), in_place[match[1]]
            moved = sum(array.nbytes * (2 if i in twice else 1) for i, array in given.items())
            found.counts["Triton"] += 1
            found.kernels[match[1]] += moved
        elif match := LIBRARY.search(line):
            if match[1] not in KINDS:
                raise UsageError(f"a call of {match[1]} can't be counted", "add it to KINDS in this module")
            kind, given = KINDS[match[1]], arguments(match[2], arrays, lists)
            made, flop = RESULTS[kind](match[2], [given[i] for i in sorted(given)])
            found.counts[kind] += 1
            found.flop[kind] += flop
            for name in re.findall(r"&(\w+)_handle", match[2])[:1]:
                arrays[name] = made
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Returns the integers in a text."""
    return tuple(map(int, re.findall(r"-?\d+", text)))


def constants_of(source: str) -> dict[str, Array]:
    """Returns the weights and the other constants of an engine, under their names in its host code."""
    known = re.findall(r"constants_info_\[(\d+)\]\.(name|dtype|shape) = (.+);", source)
    fields = {(i, key): value for i, key, value in known}
    return {
        value.strip('"'): Array(
            numbers(fields[i, "shape"]), BYTES[fields[i, "dtype"].removeprefix("cached_torch_dtype_")]
        )
        for (i, key), value in fields.items()
        if key == "name"
    }


def read_and_written(source: str) -> Mapping[str, set[int]]:
    """Returns for each of Triton's kernels which of its arguments it both reads and writes."""
    heads = re.findall(r"static inline void call_(triton_\w+)\((.*?)\n\)", source, re.DOTALL)
    return {
        name: {i for i, line in enumerate(head.strip().splitlines()) if " in_out_ptr" in line}
        for name, head in heads
    }


def arguments(
    text: str, arrays: Mapping[str, Array], lists: Mapping[str, tuple[int, ...]]
) -> dict[int, Array]:
    """Returns the arrays among the arguments of a call, by their places."""
    # An array may be given with other sizes than it was made with.
    text = re.sub(rf"{WRAPPED}(\w+), \d+, (\w+), \w+, \d+L\)\)", r"\1@\2", text)
    text = re.sub(r"(?:&temporary_reference|RAIIAtenTensorHandle)\((\w+)(?:\.get\(\))?\)", r"\1", text)
    found = {}
    for i, argument in enumerate(text.split(", ")):
        name, _, sizes = argument.partition("@")
        if name in arrays:
            found[i] = Array(lists[sizes], arrays[name].itemsize) if sizes else arrays[name]
    return found


def product(text: str, given: Sequence[Array]) -> tuple[Array, int]:
    """Returns the result (…, m, n) of a product, which is the first argument, and its FLOP."""
    made = given[0]
    _made, *_bias, first, _second = (one for one in given if len(one.sizes) == len(made.sizes))
    return made, 2 * math.prod(made.sizes) * first.sizes[-1]


def attention(text: str, given: Sequence[Array]) -> tuple[Array, int]:
    """Returns the result (…, tokens, width) of attention, and its FLOP."""
    query, key, value = given[:3]
    made = Array((*query.sizes[:-1], value.sizes[-1]), query.itemsize)
    return made, 2 * math.prod(query.sizes[:-1]) * key.sizes[-2] * (query.sizes[-1] + value.sizes[-1])


def convolution(text: str, given: Sequence[Array]) -> tuple[Array, int]:
    """Returns the result (b, c', h', w') of a convolution, and its FLOP."""
    x, weight = given[:2]
    settings = [numbers(one) for one in re.findall(r"int64_t, 2>\{(.*?)\}", text)]
    stride, padding, dilation, output_padding = settings
    kernel = [d * (size - 1) + 1 for d, size in zip(dilation, weight.sizes[2:], strict=True)]
    sides = list(zip(x.sizes[2:], kernel, stride, padding, output_padding, strict=True))
    if re.search(r"cbegin\(\), 2, 1, std", text):  # it is transposed
        doubled = [(side - 1) * s - 2 * p + k + extra for side, k, s, p, extra in sides]
        made = Array((x.sizes[0], weight.sizes[1], *doubled), x.itemsize)
        return made, 2 * math.prod(x.sizes) * math.prod(weight.sizes[1:])
    plain = [(side + 2 * p - k) // s + 1 for side, k, s, p, _ in sides]
    made = Array((x.sizes[0], weight.sizes[0], *plain), x.itemsize)
    return made, 2 * math.prod(made.sizes) * math.prod(weight.sizes[1:])


RESULTS = {"products": product, "convolutions": convolution, "attention": attention}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--kernels", default=0, help="Also show so many of Triton's kernels, which move the most.")
def main(bundle: Path, kernels: int) -> None:
    """Count what the engines of a bundle launch on a GPU."""
    try:
        opened = open_bundle(bundle)
        found = {
            stage.contract.name: launches_of(opened.path(stage.file), stage.contract)
            for stage in opened.manifest.stages
        }
    except LcmCompileError as error:
        raise click.ClickException(f"{error.message}\ntry: {error.hint}") from error
    kinds = ("Triton", *dict.fromkeys(KINDS.values()))
    rows = [
        [
            name,
            *(str(one.counts[kind]) for kind in kinds),
            f"{sum(one.kernels.values()) / 1e9:.2f}",
            f"{sum(one.flop.values()) / 1e12:.2f}",
        ]
        for name, one in found.items()
    ]
    print("\n".join(markdown_table(["a call of", *kinds, "GB by Triton", "TFLOP by others"], rows)))
    for name, one in found.items():
        for kernel, moved in one.kernels.most_common(kernels):
            print(f"{name} {moved / 1e9:6.3f} GB  {kernel}")


if __name__ == "__main__":
    main()
