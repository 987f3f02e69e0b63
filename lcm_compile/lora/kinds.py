"""The kinds of update that adapter files hold, each as the change it makes to one weight.

W is (out, in) for a linear layer and (out, in, k, k) for a convolution; r is the rank, s = α/r.

- LoRA (Hu 2021) and LoCon: ΔW = s·B·A. `down` A: (r, in, k, k), `up` B: (out, r, 1, 1). With a Tucker core
  `mid` T: (r, r, k, k) and A: (r, in, 1, 1), ΔW[p, q] = s·Σᵢⱼ B[p, i]·T[i, j]·A[j, q].
- LoHa (FedPara, Hyeon-Woo 2021): ΔW = s·(w1_a·w1_b) ⊙ (w2_a·w2_b), w_a: (out, r), w_b: (r, in·k·k); with
  cores t1, t2: (r, r, k, k), w_a is (r, out) and w_b (r, in).
- LoKr (LyCORIS, Yeh 2023): ΔW = s·w1 ⊗ w2, where each may be a product w_a·w_b, and w2 one around a Tucker
  core t2. With both in full there is no rank, and s = 1.
- Full difference: ΔW as it is, with no α.
- DoRA (Liu 2024) on top of any of these but the last: W' = m·(W + ΔW)/‖W + ΔW‖, and the change is W' − W.
  The norm is over all axes but the one that the magnitude m runs along: the outputs, or the inputs where the
  file's `dora_scale` is (1, in, 1, 1), as LyCORIS writes it with `wd_on_out=False`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import torch

Factors = Mapping[str, torch.Tensor]


def low_rank(f: Factors) -> torch.Tensor:
    down, up = f["down"], f["up"]
    if "mid" in f:
        return tucker(f["mid"], up.flatten(1).T, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def hadamard(f: Factors) -> torch.Tensor:
    if "hada_t1" in f:
        return tucker(f["hada_t1"], f["hada_w1_a"], f["hada_w1_b"]) * tucker(
            f["hada_t2"], f["hada_w2_a"], f["hada_w2_b"]
        )
    return (f["hada_w1_a"] @ f["hada_w1_b"].flatten(1)) * (f["hada_w2_a"] @ f["hada_w2_b"].flatten(1))


def kronecker(f: Factors) -> torch.Tensor:
    w1 = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    if "lokr_w2" in f:
        w2 = f["lokr_w2"]
    elif "lokr_t2" in f:
        w2 = tucker(f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"])
    else:
        w2 = f["lokr_w2_a"] @ f["lokr_w2_b"].flatten(1)
    # A kernel's axes are the fastest of the inputs', so a flat product is the kernel's own, flattened.
    return torch.kron(w1.flatten(1), w2.flatten(1).contiguous())


def difference(f: Factors) -> torch.Tensor:
    return f["diff"]


def tucker(core: torch.Tensor, outs: torch.Tensor, ins: torch.Tensor) -> torch.Tensor:
    """core: (i, j, k, k), outs: (i, out), ins: (j, in) → (out, in, k, k)."""
    return torch.einsum("ij...,ip,jq->pq...", core, outs, ins)


@dataclass(frozen=True)
class Kind:
    """How a kind makes ΔW/s of its factors, and the factor whose first axis is r (None: s is 1)."""

    name: str
    make: Callable[[Factors], torch.Tensor]
    rank_of: str | None


LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})

# What factors make a whole update, and of which kind. A file may also change biases alone.
KINDS: dict[frozenset[str], Kind | None] = {
    frozenset(): None,
    frozenset({"diff"}): Kind("difference", difference, None),
    frozenset({"down", "up"}): Kind("LoRA", low_rank, "down"),
    frozenset({"down", "mid", "up"}): Kind("LoCon", low_rank, "down"),
    LOHA: Kind("LoHa", hadamard, "hada_w1_b"),
    LOHA | {"hada_t1", "hada_t2"}: Kind("LoHa", hadamard, "hada_w1_b"),
    **{
        frozenset({*first, *second}): Kind(
            "LoKr", kronecker, next((n for n in (*first, *second) if n.endswith("_b")), None)
        )
        for first, second in product(
            [["lokr_w1"], ["lokr_w1_a", "lokr_w1_b"]],
            [["lokr_w2"], ["lokr_w2_a", "lokr_w2_b"], ["lokr_w2_a", "lokr_w2_b", "lokr_t2"]],
        )
    },
}


@dataclass
class Update:
    """What a file says about one module. α is r where it has none; `bias` is added to the module's bias."""

    factors: dict[str, torch.Tensor]
    alpha: float | None = None
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def kind(self) -> Kind | None:
        return KINDS[frozenset(self.factors)]

    @property
    def name(self) -> str:
        if self.magnitude is not None:
            return "DoRA"
        return "bias" if self.kind is None else self.kind.name

    @property
    def rank(self) -> int | None:
        if self.kind is None or self.kind.rank_of is None:
            return None
        return self.factors[self.kind.rank_of].shape[0]

    def scale(self) -> float:
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    def norm(self) -> float | None:
        """‖ΔW‖ and ‖Δb‖ together, Frobenius's; None for a DoRA, whose change depends on the base.

        That of a product needs no product: ‖B·A‖² = Σ (BᵀB) ⊙ (AAᵀ), both r×r.
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
        """The change of an unmodified weight in fp32, of its shape. ValueError where the two don't fit.

        It costs nothing for a weight on torch's meta device, and says as well whether they fit.
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
    """1×1 convolutions and flattened kernels are often stored as matrices; a norm's weight is a vector."""
    return made.shape[0] == weight.shape[0] and made.numel() == weight.numel()


def size(tensor: torch.Tensor) -> str:
    out = tensor.shape[0]
    return f"{out}×{tensor.numel() // out}"


def decomposed(weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """DoRA's W' − W. magnitude: (out,) or (out, 1, …), or (1, in, …) for norms along the inputs."""
    entries = magnitude.numel()
    axis = 0 if magnitude.shape[0] == entries else 1
    if weight.ndim < 2 or not magnitude.shape[axis] == entries == weight.shape[axis]:
        raise ValueError(f"DoRA magnitude {list(magnitude.shape)}, weight {size(weight)}")
    moved = weight.float() + delta
    others = [n for n in range(weight.ndim) if n != axis]
    norm = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
    # A row of zeros has no direction to scale, and stays as it is.
    norm = norm.clamp(min=torch.finfo(norm.dtype).eps)
    return moved * (magnitude.to(weight.device).float().reshape(norm.shape) / norm) - weight
