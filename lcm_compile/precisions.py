"""The number types that stages compute in.

A stage computes in fp32, fp16 or bf16, or it has 8-bit matrix products and one of these for everything else.
"""

from __future__ import annotations

from enum import StrEnum

# The 8-bit types. Only matrix products and convolutions of the step are computed in them.
EIGHT_BITS = ("int8", "fp8")
# The values of `--precision` besides "auto". With an 8-bit type alone, the target decides the other type.
ASKED_PRECISIONS = ("fp32", "fp16", "bf16", *EIGHT_BITS, "fp8+bf16")


class Precision(StrEnum):
    """The types that a stage computes in. "int8+bf16" computes products in int8, everything else in bf16."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8_FP32 = "int8+fp32"
    INT8_FP16 = "int8+fp16"
    INT8_BF16 = "int8+bf16"
    FP8_FP32 = "fp8+fp32"
    FP8_FP16 = "fp8+fp16"
    FP8_BF16 = "fp8+bf16"

    @classmethod
    def of(cls, asked: str, floats: str) -> Precision:
        """Returns the precision that `--precision` asks for.

        With an 8-bit type alone, everything else is computed in `floats`. An unknown name raises ValueError.
        """
        return cls(f"{asked}+{floats}" if asked in EIGHT_BITS else asked)

    @property
    def product(self) -> str:
        """The type that weights are stored and multiplied in."""
        return self.value.partition("+")[0]

    @property
    def floats(self) -> str:
        """The type of everything that is not an 8-bit product."""
        return self.value.rpartition("+")[2]

    @property
    def types(self) -> tuple[str, ...]:
        """Every type that a device must compute in."""
        return tuple(self.value.split("+"))

    @property
    def is_quantized(self) -> bool:
        """Whether the products are computed in 8 bits."""
        return self.product in EIGHT_BITS

    @property
    def without_eight_bits(self) -> Precision:
        """The precision of the stages other than the step, next to a quantized step."""
        return Precision(self.floats)
