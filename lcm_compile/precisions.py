"""What stages compute in: fp32, fp16, bf16, and 8-bit products beside one of them."""

from __future__ import annotations

# Of 8 bits. In these are products of the step alone; all else is in the best that a target has.
EIGHT_BITS = ("int8", "fp8")


# What can be asked for.
PRECISIONS = ("fp32", "fp16", "bf16", *EIGHT_BITS, "fp8+bf16")


# What a stage computes in: "int8+fp16" has its products in int8, and the rest in fp16.
STAGE_PRECISIONS = (
    "fp32",
    "fp16",
    "bf16",
    "int8+fp32",
    "int8+fp16",
    "int8+bf16",
    "fp8+fp16",
    "fp8+bf16",
)


def is_quantized(precision: str) -> bool:
    return product_type(precision) in EIGHT_BITS


def with_floats(precision: str, floats: str) -> str:
    """An 8-bit precision with what it is beside, unless that was told: fp8 → fp8+fp16; others stay."""
    return f"{precision}+{floats}" if precision in EIGHT_BITS else precision


def product_type(precision: str) -> str:
    """What a stage's weights are kept and multiplied in: int8+bf16 → int8."""
    return precision.partition("+")[0]


def float_type(precision: str) -> str:
    """What a stage computes in where it is not in 8 bits: int8+bf16 → bf16."""
    return precision.rpartition("+")[2]
