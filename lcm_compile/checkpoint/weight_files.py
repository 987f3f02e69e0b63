"""Reads files of weights: safetensors, and pickles that hold weights only. Neither runs code.

A safetensors file begins with the length of its header; see `tensor_stream`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]
PICKLES = (".bin", ".pt", ".pth")
NO_PICKLE = "get the weights as .safetensors"
MOST_HEADER = 100_000_000  # bytes: the library's own limit


def is_pickle(path: Path) -> bool:
    """Returns whether a file's name says that it is a pickle. Under other names no pickle is opened."""
    return path.suffix.lower() in PICKLES


def read_header(path: Path) -> tuple[Shapes, Mapping[str, str]]:
    """Returns the shapes of a file's tensors by key, and its metadata, which a pickle has not.

    Raises CheckpointError if the file can't be read.
    """
    from safetensors import SafetensorError, safe_open

    if is_pickle(path):
        return {key: tuple(tensor.shape) for key, tensor in read_pickle(path).items()}, {}
    try:
        with safe_open(path, framework="numpy") as handle:
            shapes = {k: tuple(handle.get_slice(k).get_shape()) for k in handle.keys()}  # noqa: SIM118
            return shapes, handle.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, error) from error


def read_layout(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the shapes and types of a file's tensors by key; a type is safetensors' name for it, as F16.

    Raises CheckpointError if the file can't be read.
    """
    from safetensors import SafetensorError, safe_open

    if is_pickle(path):
        return {
            key: (tuple(t.shape), str(t.dtype).removeprefix("torch.").upper().replace("LOAT", ""))
            for key, t in read_pickle(path).items()
        }
    try:
        with safe_open(path, framework="numpy") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
            return {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, error) from error


def read_tensors(path: Path, prefix: str = "") -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """Returns a file's tensors whose keys begin with a prefix, and its metadata, which a pickle has not.

    Data is read when it is first used. Raises CheckpointError if the file can't be read.
    """
    from safetensors import SafetensorError, safe_open

    if is_pickle(path):
        return {key: tensor for key, tensor in read_pickle(path).items() if key.startswith(prefix)}, {}
    try:
        with safe_open(path, framework="pt") as handle:
            keys = [key for key in handle.keys() if key.startswith(prefix)]  # noqa: SIM118
            return {key: handle.get_tensor(key) for key in keys}, handle.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, error) from error


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a pickle by key. Raises CheckpointError if it holds anything else."""
    return named_tensors(path, unpickle(path))


def unpickle(path: Path) -> Any:
    """Returns what a pickle of weights holds, through torch's unpickler for weights, which runs no code.

    Raises CheckpointError if it holds anything else.
    """
    import torch

    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty", "download it again")
    try:
        # The first textual inversions hold a ParameterDict, a plain container of tensors.
        with torch.serialization.safe_globals([torch.nn.ParameterDict]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # The errors that torch's unpickler raises for damaged files share no narrower class.
    except Exception as error:
        reason = str(error).partition("\n")[0].split(". ")[0]
        message = f"{path} is not a pickle of weights only, and no other pickle is opened: {reason}"
        raise CheckpointError(message, NO_PICKLE) from error


def named_tensors(path: Path, content: Any) -> dict[str, torch.Tensor]:
    """Returns the content of a pickle. Raises CheckpointError if it is anything but named tensors.

    The two dicts of an IP-Adapter become one, in which the keys begin with their names.
    """
    import torch

    if isinstance(content, dict) and content.keys() == {"image_proj", "ip_adapter"}:
        parts = [(name, part) for name, part in content.items() if isinstance(part, dict)]
        content = {f"{name}.{key}": tensor for name, part in parts for key, tensor in part.items()}
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in content.items()
    ):
        raise CheckpointError(f"{path} is a pickle that holds no named tensors", NO_PICKLE)
    return content


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Returns the error for a file that the safetensors library did not open: what the file is instead."""
    again = "download it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
            file.seek(8)
            length = int.from_bytes(head[:8], "little")
            header = file.read(min(length, MOST_HEADER))
    except OSError as reason:
        return CheckpointError(f"{path} can't be read: {reason.strerror or reason}", "check its permissions")
    what = f"{path} is no whole safetensors file"
    if size == 0:
        return CheckpointError(f"{what}: it is empty", again)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return CheckpointError(
            f"{what}: it is a pickle, and a pickle is opened only if its name ends in {', '.join(PICKLES)}",
            f"{NO_PICKLE}, or name the file .bin if it holds a pickle of weights",
        )
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError(f"{what}: it is Git LFS's pointer to one", "git lfs pull fetches the file")
    if head.lstrip()[:1] == b"<":
        return CheckpointError(f"{what}: it is a web page", "download the file itself, logged in if need be")
    if size < 8 or (header[:1] == b"{" and 8 + length > size):
        return CheckpointError(f"{what}: it ends within its header, after {size} bytes", again)
    try:
        tensors = json.loads(header)
        end = max((t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return CheckpointError(f"{what}: {error}", "get the weights as .safetensors")
    if 8 + length + end > size:
        return CheckpointError(f"{what}: it has {size} of {8 + length + end} bytes", again)
    return CheckpointError(f"{what}: {error}", "save it again with the safetensors library")
