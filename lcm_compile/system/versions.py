"""Reads the versions of installed packages without importing them."""

from __future__ import annotations

from collections.abc import Iterable

# The packages whose versions a benchmark records.
RECORDED_PACKAGES = (
    *("lcm-compile", "torch", "triton", "diffusers", "transformers", "numpy", "onnx", "onnxscript"),
    *("onnxruntime", "onnxruntime-gpu", "openvino", "nncf", "tensorrt", "tensorrt-cu13", "tensorrt-rtx"),
    *("openvino-genai", "cyllama"),
)


def installed_version(packages: tuple[str, ...]) -> str | None:
    """Returns `name version` of the first of these distributions that is installed, or None."""
    from importlib import metadata  # 16 ms, which no `run` needs

    for package in packages:
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Returns the version of each of these distributions that is installed, by its name."""
    found = {package: installed_version((package,)) for package in packages}
    return {package: version.partition(" ")[2] for package, version in found.items() if version}
