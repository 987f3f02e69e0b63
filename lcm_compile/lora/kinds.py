"""The kinds of update that LoRA files hold, each with the change that it makes to one weight.

W is (out, in) for a linear layer and (out, in, k, k) for a convolution. r is the rank, and s = α/r.

- LoRA (Hu 2021) and LoCon: ΔW = s·B·A, with `down` A: (r, in, k, k) and `up` B: (out, r, 1, 1). With a Tucker
  core `mid` T: (r, r, k, k), A is (r, in, 1, 1) and ΔW[p, q] = s·Σᵢⱼ B[p, i]·T[i, j]·A[j, q].
  PEFT can give B a bias b, and then Δb = s·b.
- LoHa (FedPara, Hyeon-Woo 2021): ΔW = s·(w1_a·w1_b) ⊙ (w2_a·w2_b), with w_a: (out, r) and w_b: (r, in·k·k).
  OneTrainer stores those of a convolution as (out, r, 1, 1) and (r, in, k, k). With Tucker cores t1, t2:
  (r, r, k, k), w_a is (r, out) and w_b is (r, in).
- LoKr (LyCORIS, Yeh 2023): ΔW = s·w1 ⊗ w2. Each of w1 and w2 may be stored as a product w_a·w_b, and w2 also
  as a product around a Tucker core t2. If both are stored in full, there is no rank, and s = 1.
- Full difference: ΔW itself, without α.
- DoRA (Liu 2024) on top of any of the above except the full difference: W' = m·(W + ΔW)/‖W + ΔW‖, and the
  change is W' − W. The norm is taken over all axes except the one that the magnitude m runs along. That axis
  is the outputs, or the inputs if the file's `dora_scale` is (1, in, 1, 1), as LyCORIS writes it with
  `wd_on_out=False`.

The following kinds multiply W, and are those of LyCORIS. They have a strength λ, for which W' is:

- OFT (Qiu 2023): W' = c ⊙ (I + λ(R − I))ᵀ·W, where R is block-diagonal: (n, b, b) with n·b = out. A block is
  R = (I + Q)(I − Q)⁻¹, with Q = S − Sᵀ and S in `oft_blocks`. If α > 0, Q is shortened to the norm α·out. The
  scale c: (out, 1) is 1 without `rescale`. It does not depend on λ.
- BOFT (Liu 2023): W' = c ⊙ Bₘ·…·B₁·W, with `oft_blocks`: (m, n, b, b). Bᵢ is I + λ(R − I) on the rows that
  the i-th stage of a butterfly puts next to each other.
- (IA)³ (Liu 2022): W' = W ⊙ (1 + λ·l), where l: (out, 1), or (1, in) if `on_input` is 1.
- GLoRA (Chavan 2023): W' = W + λ·s·(W·a1·a2 + b1·b2), with a1: (in, r), a2: (r, in), b1: (out, r) and b2:
  (r, in, k, k).

To support another kind, add an entry to KIND_TABLE. The key pattern and the error texts of `read.py` are
built from that table. `base_by_width` in `read.py` and `refuse_others` in `checkpoint/single_file.py` also
look for the endings of a LoRA's keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch

Factors = Mapping[str, torch.Tensor]
# Makes (W' − W)/s of the factors, W, α and λ.
Transform = Callable[[Factors, torch.Tensor, float | None, float], torch.Tensor]


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
    one, other = (f[f"hada_w{n}_a"].flatten(1) @ f[f"hada_w{n}_b"].flatten(1) for n in (1, 2))
    return one * other


def kronecker(f: Factors) -> torch.Tensor:
    """Returns ΔW/s for LoKr factors: (out, in·k·k)."""
    w1 = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"].flatten(1) @ f["lokr_w1_b"].flatten(1)
    if "lokr_w2" in f:
        w2 = f["lokr_w2"]
    elif "lokr_t2" in f:
        w2 = tucker(f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"])
    else:
        w2 = f["lokr_w2_a"].flatten(1) @ f["lokr_w2_b"].flatten(1)
    # Within the flattened inputs, the kernel's axes vary fastest. So the product of the flattened matrices is
    # the flattened product.
    return torch.kron(w1.flatten(1), w2.flatten(1).contiguous())


def difference(f: Factors) -> torch.Tensor:
    """Returns ΔW, which the file holds in full."""
    return f["diff"]


def orthogonal(blocks: torch.Tensor, alpha: float | None, outs: int) -> torch.Tensor:
    """Returns R − I for each block S: (…, b, b) of an OFT, by Cayley's formula."""
    skew = (blocks - blocks.mT).double()
    if alpha:
        skew = skew * (alpha * outs / (skew.norm() + 1e-8)).clamp(max=1)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    # (I − Q)⁻¹ and I + Q commute.
    return (torch.linalg.solve(eye - skew, eye + skew) - eye).float()


def rotate(f: Factors, weight: torch.Tensor, alpha: float | None, strength: float) -> torch.Tensor:
    """Returns W' − W for an OFT."""
    blocks, rows = f["oft_blocks"], weight.flatten(1)
    turn = strength * orthogonal(blocks, alpha, len(rows))
    moved = (turn.mT @ rows.unflatten(0, blocks.shape[:2])).flatten(0, 1)
    return rescaled(f, rows, moved)


def rotate_in_stages(f: Factors, weight: torch.Tensor, alpha: float | None, strength: float) -> torch.Tensor:
    """Returns W' − W for a BOFT."""
    blocks, rows = f["boft_blocks"], weight.flatten(1)
    turned, half = rows, blocks.shape[-1] // 2
    for stage, turn in enumerate(strength * orthogonal(blocks, alpha, len(rows))):
        # Stage i takes rows that are half·2ⁱ apart: the order is (c, 2, half·2ⁱ) → (c, half·2ⁱ, 2) and back.
        apart = half * 2**stage
        near = turned.unflatten(0, (-1, 2, apart)).transpose(1, 2)
        moved = (turn @ near.flatten(0, 2).unflatten(0, blocks.shape[1:3])).flatten(0, 1)
        turned = turned + moved.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return rescaled(f, rows, turned - rows)


def rescaled(f: Factors, rows: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """Returns c ⊙ (W + ΔW) − W for the `rescale` c of an OFT, or ΔW, which is `moved`, if it has none."""
    if "rescale" not in f:
        return moved
    scale = f["rescale"].reshape(len(rows), 1)
    return scale * moved + (scale - 1) * rows


def scale_axis(f: Factors, weight: torch.Tensor, alpha: float | None, strength: float) -> torch.Tensor:
    """Returns W' − W for an (IA)³, whose vector lies along the axis that it scales: (out, 1) or (1, in)."""
    vector = f["ia3_weight"]
    axis = 0 if vector.shape[1] == 1 else 1
    if vector.shape[axis] != weight.shape[axis]:
        raise RuntimeError("a vector of another length")
    return strength * weight * vector.reshape(*vector.shape, *[1] * (weight.ndim - 2))


def generalized(f: Factors, weight: torch.Tensor, alpha: float | None, strength: float) -> torch.Tensor:
    """Returns λ·ΔW/s for a GLoRA."""
    inner = weight
    for name in ("glora_a1", "glora_a2"):
        inner = torch.einsum("oi...,ij->oj...", inner, f[name].flatten(1))
    added = low_rank({"down": f["glora_b2"], "up": f["glora_b1"]})
    return strength * (inner + added.reshape(weight.shape))


def tucker(core: torch.Tensor, outs: torch.Tensor, ins: torch.Tensor) -> torch.Tensor:
    """Returns the Tucker product (out, in, k, k) of core: (i, j, k, k), outs: (i, out) and ins: (j, in)."""
    return torch.einsum("ij...,ip,jq->pq...", core, outs, ins)


@dataclass(frozen=True)
class Kind:
    """A kind of update, in one of the forms that files store it in.

    `make` computes ΔW/s from the factors. If W is needed for that, `make` is None, and `transform` computes
    (W' − W)/s from the factors, W, α and λ. `rank_of` names the factor whose first axis is r; None means that
    there is no rank, and s is 1. `endings` names all factors of this form, each with a regular expression for
    the end of its key in a file, which follows the module's name.
    """

    name: str
    make: Callable[[Factors], torch.Tensor] | None
    rank_of: str | None
    endings: Mapping[str, str]
    transform: Transform | None = None


# Some keys hold the name of PEFT's adapter, which is any word: `.lora_A.default.weight`.
ADAPTER = r"(?:\.[^.]+)?"


def own_endings(*factors: str) -> dict[str, str]:
    """Returns the key endings of factors that files call by the factor's own name: `.hada_w1_a`."""
    return {factor: rf"\.{factor}{ADAPTER}" for factor in factors}


def lora_ending(names: str, parameter: str = "weight") -> str:
    """Returns the key ending of a LoRA's or LoCon's factor; `names` are its names in files: `down|A`.

    It matches kohya's `.lora_down.weight`, PEFT's `.lora_A.weight`, and `_lora.down.weight` and
    `.lora_linear_layer.down.weight` of older diffusers versions.
    """
    return rf"[._]lora(?:_linear_layer)?[._](?:{names}){ADAPTER}\.{parameter}"


LORA = {"down": lora_ending("down|A"), "up": lora_ending("up|B")}
LOHA = own_endings("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR_W1 = (own_endings("lokr_w1"), own_endings("lokr_w1_a", "lokr_w1_b"))
LOKR_W2 = (
    own_endings("lokr_w2"),
    own_endings("lokr_w2_a", "lokr_w2_b"),
    own_endings("lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)

# Files call the blocks of OFT and BOFT by one name: `settle_factors` tells them apart.
OFT = own_endings("oft_blocks")
BOFT = {"boft_blocks": OFT["oft_blocks"]}
RESCALE = own_endings("rescale")
IA3 = {"ia3_weight": r"\.weight", "on_input": r"\.on_input"}
GLORA = {f"glora_{name}": rf"\.{name}\.weight" for name in ("a1", "a2", "b1", "b2")}

# Every form of every kind. Forms of one kind share its name.
KIND_TABLE = (
    Kind("LoRA", low_rank, "down", LORA),
    Kind("LoRA", low_rank, "down", LORA | {"up_bias": lora_ending("up|B", "bias")}),
    Kind("LoCon", low_rank, "down", LORA | {"mid": lora_ending("mid")}),
    Kind("LoHa", hadamard, "hada_w1_b", LOHA),
    Kind("LoHa", hadamard, "hada_w1_b", LOHA | own_endings("hada_t1", "hada_t2")),
    *(
        Kind("LoKr", kronecker, next((n for n in (*w1, *w2) if n.endswith("_b")), None), w1 | w2)
        for w1, w2 in product(LOKR_W1, LOKR_W2)
    ),
    Kind("difference", difference, None, {"diff": rf"\.(?:diff|w_norm){ADAPTER}"}),
    Kind("OFT", None, None, OFT, rotate),
    Kind("OFT", None, None, OFT | RESCALE, rotate),
    Kind("BOFT", None, None, BOFT, rotate_in_stages),
    Kind("BOFT", None, None, BOFT | RESCALE, rotate_in_stages),
    Kind("(IA)³", None, None, IA3, scale_axis),
    Kind("GLoRA", None, "glora_a2", GLORA, generalized),
)
DORA = "DoRA"
KIND_NAMES = (*dict.fromkeys(kind.name for kind in KIND_TABLE), DORA)

# The kind that a complete set of factors belongs to. A file may also change a bias alone, with no factors.
KINDS: dict[frozenset[str], Kind | None] = {
    frozenset(): None,
    **{frozenset(kind.endings): kind for kind in KIND_TABLE},
}

# What a file may hold for a module besides the factors of a kind, with the same key endings as in Kind.
# `dora_scale` (LyCORIS) and `magnitude` (PEFT, ai-toolkit) are both the m of a DoRA. `diff_b` is the change
# of a bias.
EXTRAS: dict[str, str] = {
    **own_endings("alpha", "dora_scale"),
    "magnitude": rf"\.(?:lora_magnitude_vector{ADAPTER}(?:\.weight)?|magnitude)",
    "diff_b": rf"\.(?:diff_b|b_norm){ADAPTER}",
}
# Tensors that may have a single axis: magnitudes, biases and the weights of norms. All others have two axes
# or more, except NUMBERS, which are one number each.
MAY_BE_VECTORS = ("dora_scale", "magnitude", "diff", "diff_b", "up_bias", "ia3_weight", "rescale")
NUMBERS = ("alpha", "on_input")


def settle_factors(factors: dict[str, torch.Tensor]) -> None:
    """Changes factors from the form that files have them in to that of KIND_TABLE's functions, in place.

    The blocks of a BOFT have a fourth axis. The vector of an (IA)³ becomes a column or, if it scales the
    inputs, a row.
    """
    if "oft_blocks" in factors and factors["oft_blocks"].ndim == 4:
        factors["boft_blocks"] = factors.pop("oft_blocks")
    if "ia3_weight" in factors and "on_input" in factors:
        shape = (1, -1) if factors["on_input"].item() else (-1, 1)
        factors["ia3_weight"] = factors["ia3_weight"].reshape(shape)


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

    @property
    def is_additive(self) -> bool:
        """Whether the factors alone make ΔW, without the base's weight. A magnitude is no factor."""
        return self.kind is None or self.kind.make is not None

    def scale(self) -> float:
        """Returns s = α/r, or 1 without a rank or without α."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    def norm(self) -> float | None:
        """Returns the Frobenius norm of ΔW and Δb together; None if ΔW depends on the base, as a DoRA's does.

        The norm of a product does not need the product: ‖B·A‖² = Σ (BᵀB) ⊙ (AAᵀ), where both are r×r.
        """

        if self.magnitude is not None or not self.is_additive:
            return None
        made = torch.zeros(())
        if self.factors.keys() == {"down", "up"}:
            down, up = (self.factors[name].float().flatten(1) for name in ("down", "up"))
            made = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()
        elif self.kind is not None and self.kind.make is not None:
            made = self.kind.make({name: tensor.float() for name, tensor in self.factors.items()}).norm()
        bias = 0.0 if self.bias is None else float(self.bias.float().norm())
        return math.hypot(float(made) * self.scale(), bias)

    def settle_bias(self) -> None:
        """Moves the up-projection's bias from the factors into `bias`, scaled by s, which must be final."""
        if "up_bias" in self.factors:
            added = self.factors.pop("up_bias").float() * self.scale()
            self.bias = added if self.bias is None else self.bias.float() + added

    def check_factors(self) -> None:
        """Raises ValueError if the factors do not fit each other, as far as that shows without the base."""
        if self.kind is not None and self.kind.make is not None:
            factors = {name: tensor.to("meta").float() for name, tensor in self.factors.items()}
            with self.explaining():
                self.kind.make(factors)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Raises ValueError in place of torch's errors about shapes."""
        try:
            yield
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.factors.items())
            raise ValueError(f"{self.name} factors that don't fit each other: {shapes}") from error

    def delta(self, weight: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        """Returns the change of a base's unmodified weight at strength λ, in fp32 and in the weight's shape.

        It is λ·(W' − W), except for OFT and BOFT, whose formula has λ in it. Raises ValueError if the factors
        do not fit each other, or the update does not fit the weight. A weight on torch's meta device is
        enough to find that out, and costs nothing.
        """

        if self.kind is None:
            return torch.zeros_like(weight, dtype=torch.float32)
        factors = {name: tensor.to(weight.device).float() for name, tensor in self.factors.items()}
        if self.kind.transform is not None:
            return self.transformed(self.kind.transform, factors, weight, strength)
        assert self.kind.make is not None
        with self.explaining():
            made = self.kind.make(factors) * self.scale()
        if not same_matrix(made, weight):
            rank = "" if self.rank is None else f" of rank {self.rank}"
            raise ValueError(f"{self.kind.name} update {size(made)}{rank}, weight {size(weight)}")
        made = made.reshape(weight.shape)
        return strength * (made if self.magnitude is None else decomposed(weight, made, self.magnitude))

    def transformed(
        self, transform: Transform, factors: Factors, weight: torch.Tensor, strength: float
    ) -> torch.Tensor:
        """Returns the change of a weight by a kind that multiplies it. Raises ValueError if it can't."""
        try:
            made = transform(factors, weight.float(), self.alpha, strength) * self.scale()
            return made.reshape(weight.shape)
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.factors.items())
            raise ValueError(f"{self.name} update with {shapes}, weight {size(weight)}") from error


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
