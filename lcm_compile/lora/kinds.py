"""The kinds of update that LoRA files hold, each with the change that it makes to one weight.

W is (out, in) for a linear layer and (out, in, k, k) for a convolution. r is the rank, and s = α/r.

- LoRA (Hu 2021) and LoCon: ΔW = s·B·A, with `down` A: (r, in, k, k) and `up` B: (out, r, 1, 1). With a Tucker
  core `mid` T: (r, r, k, k), A is (r, in, 1, 1) and ΔW[p, q] = s·Σᵢⱼ B[p, i]·T[i, j]·A[j, q].
- LoHa (FedPara, Hyeon-Woo 2021): ΔW = s·(w1_a·w1_b) ⊙ (w2_a·w2_b), with w_a: (out, r) and w_b: (r, in·k·k).
  With Tucker cores t1, t2: (r, r, k, k), w_a is (r, out) and w_b is (r, in).
- LoKr (LyCORIS, Yeh 2023): ΔW = s·w1 ⊗ w2. Each of w1 and w2 may be stored as a product w_a·w_b, and w2 also
  as a product around a Tucker core t2. If both are stored in full, there is no rank, and s = 1.
- Full difference: ΔW itself, without α.
- DoRA (Liu 2024) on top of any of these except the last: W' = m·(W + ΔW)/‖W + ΔW‖, and the change is W' − W.
  The norm is taken over all axes except the one that the magnitude m runs along. That axis is the outputs, or
  the inputs if the file's `dora_scale` is (1, in, 1, 1), as LyCORIS writes it with `wd_on_out=False`.

To support another kind, add an entry to KIND_TABLE. The key pattern and the error texts of `read.py` are
built from that table. `base_by_width` in `read.py` and `refuse_others` in `checkpoint/single_file.py` also
look for the endings of a LoRA's keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import torch

Factors = Mapping[str, torch.Tensor]


def low_rank(f: Factors) -> torch.Tensor:
    """Returns B·A in W's shape for LoRA and LoCon factors, around the Tucker core if there is one."""
    down, up = f["down"], f["up"]
    if "mid" in f:
        return tucker(f["mid"], up.flatten(1).T, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def hadamard(f: Factors) -> torch.Tensor:
    """Returns ΔW/s for LoHa factors: (out, in·k·k), or (out, in, k, k) with Tucker cores."""
    if "hada_t1" in f:
        return tucker(f["hada_t1"], f["hada_w1_a"], f["hada_w1_b"]) * tucker(
            f["hada_t2"], f["hada_w2_a"], f["hada_w2_b"]
        )
    return (f["hada_w1_a"] @ f["hada_w1_b"].flatten(1)) * (f["hada_w2_a"] @ f["hada_w2_b"].flatten(1))


def kronecker(f: Factors) -> torch.Tensor:
    """Returns ΔW/s for LoKr factors: (out, in·k·k)."""
    w1 = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    if "lokr_w2" in f:
        w2 = f["lokr_w2"]
    elif "lokr_t2" in f:
        w2 = tucker(f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"])
    else:
        w2 = f["lokr_w2_a"] @ f["lokr_w2_b"].flatten(1)
    # Within the flattened inputs, the kernel's axes vary fastest. So the product of the flattened matrices is
    # the flattened product.
    return torch.kron(w1.flatten(1), w2.flatten(1).contiguous())


def difference(f: Factors) -> torch.Tensor:
    """Returns ΔW, which the file holds in full."""
    return f["diff"]


def tucker(core: torch.Tensor, outs: torch.Tensor, ins: torch.Tensor) -> torch.Tensor:
    """Returns the Tucker product (out, in, k, k) of core: (i, j, k, k), outs: (i, out) and ins: (j, in)."""
    return torch.einsum("ij...,ip,jq->pq...", core, outs, ins)


@dataclass(frozen=True)
class Kind:
    """A kind of update, in one of the forms that files store it in.

    `make` computes ΔW/s from the factors. `rank_of` names the factor whose first axis is r; None means that
    there is no rank, and s is 1. `endings` names all factors of this form, each with a regular expression for
    the end of its key in a file, which follows the module's name.
    """

    name: str
    make: Callable[[Factors], torch.Tensor]
    rank_of: str | None
    endings: Mapping[str, str]


# Some keys hold the name of PEFT's adapter, `default`: `.lora_A.default.weight`.
ADAPTER = r"(?:\.default)?"


def own_endings(*factors: str) -> dict[str, str]:
    """Returns the key endings of factors that files call by the factor's own name: `.hada_w1_a`."""
    return {factor: rf"\.{factor}{ADAPTER}" for factor in factors}


def lora_ending(names: str) -> str:
    """Returns the key ending of a LoRA's or LoCon's factor; `names` are its names in files: `down|A`.

    It matches kohya's `.lora_down.weight`, PEFT's `.lora_A.weight`, and `_lora.down.weight` and
    `.lora_linear_layer.down.weight` of older diffusers versions.
    """
    return rf"[._]lora(?:_linear_layer)?[._](?:{names}){ADAPTER}\.weight"


LORA = {"down": lora_ending("down|A"), "up": lora_ending("up|B")}
LOHA = own_endings("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR_W1 = (own_endings("lokr_w1"), own_endings("lokr_w1_a", "lokr_w1_b"))
LOKR_W2 = (
    own_endings("lokr_w2"),
    own_endings("lokr_w2_a", "lokr_w2_b"),
    own_endings("lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)

# Every form of every kind. Forms of one kind share its name.
KIND_TABLE = (
    Kind("LoRA", low_rank, "down", LORA),
    Kind("LoCon", low_rank, "down", LORA | {"mid": lora_ending("mid")}),
    Kind("LoHa", hadamard, "hada_w1_b", LOHA),
    Kind("LoHa", hadamard, "hada_w1_b", LOHA | own_endings("hada_t1", "hada_t2")),
    *(
        Kind("LoKr", kronecker, next((n for n in (*w1, *w2) if n.endswith("_b")), None), w1 | w2)
        for w1, w2 in product(LOKR_W1, LOKR_W2)
    ),
    Kind("difference", difference, None, {"diff": rf"\.(?:diff|w_norm){ADAPTER}"}),
)
DORA = "DoRA"
KIND_NAMES = (*dict.fromkeys(kind.name for kind in KIND_TABLE), DORA)

# The kind that a complete set of factors belongs to. A file may also change a bias alone, with no factors.
KINDS: dict[frozenset[str], Kind | None] = {
    frozenset(): None,
    **{frozenset(kind.endings): kind for kind in KIND_TABLE},
}

# What a file may hold for a module besides the factors of a kind, with the same key endings as in Kind.
# `dora_scale` (LyCORIS) and `magnitude` (PEFT) are both the m of a DoRA; `diff_b` is the change of a bias.
EXTRAS: dict[str, str] = {
    **own_endings("alpha", "dora_scale"),
    "magnitude": rf"\.lora_magnitude_vector{ADAPTER}(?:\.weight)?",
    "diff_b": rf"\.(?:diff_b|b_norm){ADAPTER}",
}
# Tensors that may have a single axis: magnitudes, biases and the weights of norms. All others have two axes
# or more, except `alpha`, which is one number.
MAY_BE_VECTORS = ("dora_scale", "magnitude", "diff", "diff_b")


@dataclass
class Update:
    """What a file says about one module.

    `factors` are those of one kind, or none if only the bias changes. `alpha` is None if the file has none: α
    is r then. `magnitude` is a DoRA's m. `bias` is added to the module's bias.
    """

    factors: dict[str, torch.Tensor]
    alpha: float | None = None
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def kind(self) -> Kind | None:
        """The kind that the factors belong to; None if only the bias changes."""
        return KINDS[frozenset(self.factors)]

    @property
    def name(self) -> str:
        """The name for reports: `DoRA` if there is a magnitude, `bias` for a bias alone, else the kind's."""
        if self.magnitude is not None:
            return DORA
        return "bias" if self.kind is None else self.kind.name

    @property
    def rank(self) -> int | None:
        """r; None for a kind that has no rank, or if only the bias changes."""
        if self.kind is None or self.kind.rank_of is None:
            return None
        return self.factors[self.kind.rank_of].shape[0]

    def scale(self) -> float:
        """Returns s = α/r, or 1 without a rank or without α."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    def norm(self) -> float | None:
        """Returns the Frobenius norm of ΔW and Δb together; None for a DoRA, which depends on the base.

        The norm of a product does not need the product: ‖B·A‖² = Σ (BᵀB) ⊙ (AAᵀ), where both are r×r.
        """

        if self.magnitude is not None:
            return None
        made = torch.zeros(())
        if self.factors.keys() == {"down", "up"}:
            down, up = (self.factors[name].float().flatten(1) for name in ("down", "up"))
            made = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()
        elif self.kind is not None:
            made = self.kind.make({name: tensor.float() for name, tensor in self.factors.items()}).norm()
        bias = 0.0 if self.bias is None else float(self.bias.float().norm())
        return math.hypot(float(made) * self.scale(), bias)

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the change of a base's unmodified weight, in fp32 and in the weight's shape.

        Raises ValueError if the factors do not fit each other, or the update does not fit the weight. A
        weight on torch's meta device is enough to find that out, and costs nothing.
        """

        if self.kind is None:
            return torch.zeros_like(weight, dtype=torch.float32)
        factors = {name: tensor.to(weight.device).float() for name, tensor in self.factors.items()}
        try:
            made = self.kind.make(factors) * self.scale()
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{self.kind.name} factors that don't fit each other") from error
        if not same_matrix(made, weight):
            rank = "" if self.rank is None else f" of rank {self.rank}"
            raise ValueError(f"{self.kind.name} update {size(made)}{rank}, weight {size(weight)}")
        made = made.reshape(weight.shape)
        return made if self.magnitude is None else decomposed(weight, made, self.magnitude)


def same_matrix(made: torch.Tensor, weight: torch.Tensor) -> bool:
    """Returns whether an update has as many outputs and values as the weight that it changes.

    The shapes may differ: 1×1 convolutions and flattened kernels are often stored as matrices, and a norm's
    weight is a vector.
    """
    return made.shape[0] == weight.shape[0] and made.numel() == weight.numel()


def size(tensor: torch.Tensor) -> str:
    """Returns a weight's size as a matrix, for error texts: `64×80`."""
    out = tensor.shape[0]
    return f"{out}×{tensor.numel() // out}"


def decomposed(weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Returns DoRA's W' − W.

    `magnitude` is (out,) or (out, 1, …) for norms along the outputs, and (1, in, …) for norms along the
    inputs. Raises ValueError if its length is not that of the weight's axis.
    """
    entries = magnitude.numel()
    axis = 0 if magnitude.shape[0] == entries else 1
    if weight.ndim < 2 or not magnitude.shape[axis] == entries == weight.shape[axis]:
        raise ValueError(f"DoRA magnitude {list(magnitude.shape)}, weight {size(weight)}")
    moved = weight.float() + delta
    others = [n for n in range(weight.ndim) if n != axis]
    norm = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
    # A row of zeros has no direction that could be scaled, so it stays zero.
    norm = norm.clamp(min=torch.finfo(norm.dtype).eps)
    return moved * (magnitude.to(weight.device).float().reshape(norm.shape) / norm) - weight
