"""Eight-bit weights for the layers' matrices, in two ways.

`weights` is this file's own: each row of W is int8 with one scale, from its absolute maximum; x
stays as it is. The kernel converts W on its way into the matrix unit, so a decoding step reads
one byte per weight.

`bitsandbytes` is LLM.int8 (Dettmers et al., 2022), the paper's way: x is quantized too, and columns
of x with a value above a threshold are multiplied in 16 bit. It synchronizes with the host in every
layer, and it picks those columns over all rows of a batch, so a row's result depends on its
neighbors. With threshold 0 it does neither and is less exact.
"""

import logging
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WAYS = ("weights", "bitsandbytes")
FEW = 128  # rows of x up to which the product reads int8; for more, converting W first costs little

if torch.cuda.is_available():
    import triton
    import triton.language as tl

    @triton.jit
    def _product(
        x, w, parts, M, N, K,
        SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        """Add up x (M, K) w^T (N, K) over every SPLIT-th block of K from s on: parts[s] (M, N)."""
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        part, m = tl.program_id(1), tl.arange(0, BM)
        product = tl.zeros((BN, BM), dtype=tl.float32)
        for block in range(part, tl.cdiv(K, BK), SPLIT):
            k = block * BK + tl.arange(0, BK)
            rows = tl.load(
                w + n[:, None] * K + k[None], mask=(n[:, None] < N) & (k[None] < K), other=0
            )
            columns = tl.load(
                x + m[None] * K + k[:, None], mask=(m[None] < M) & (k[:, None] < K), other=0.0
            )
            product = tl.dot(rows.to(x.dtype.element_ty), columns, product)
        place = parts + part * M * N + m[None] * N + n[:, None]
        tl.store(place, product, mask=(n[:, None] < N) & (m[None] < M))


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (M, K) weight^T (N, K) in fp32, for an int8 weight and few rows on a GPU.

    The partial sums are added in a fixed order, so the result is the same in every call.
    """
    (m, k), n = x.shape, len(weight)
    bm, bn, bk, warps, stages = max(16, triton.next_power_of_2(m)), 128, 128, 8, 3
    if bm <= 32 and n > 132 * bn:  # enough columns for smaller blocks on 132 multiprocessors
        bn, warps, stages = 64, 4, 4

    columns = triton.cdiv(n, bn)
    split = max(1, min(k // (4 * bk), 264 // columns))
    parts = torch.empty(split, m, n, device=x.device, dtype=torch.float32)
    _product[(columns, split)](
        x, weight, parts, m, n, k, split, bm, bn, bk, num_warps=warps, num_stages=stages
    )
    return parts.sum(0)


class Int8Linear(nn.Linear):
    """y = (x W^T) * scale + b, with W (out, in) in int8 and scale (out,) in fp32."""

    kind = "int8"

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.scale = nn.Parameter(
            torch.empty(base.out_features, device="meta"), requires_grad=False
        )
        self.weight = nn.Parameter(
            torch.empty_like(self.weight, dtype=torch.int8), requires_grad=False
        )
        self.bias = base.bias

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Return what holds a weight (out, in), by the names that it has here."""
        return dict(zip(("weight", "scale"), quantize(weight), strict=True))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        rows = x.numel() // x.shape[-1]
        if x.is_cuda and rows <= FEW and not torch.is_grad_enabled():
            y = few_rows_product(x.reshape(rows, -1).contiguous(), self.weight).view(
                *x.shape[:-1], -1
            )
        else:
            y = F.linear(x, self.weight.to(x.dtype))
        y = (y * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (N, K) as int8, and the scale of each row (N,) in fp32."""
    scale = weight.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 127
    return (weight / scale).round().to(torch.int8), scale[:, 0]


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every linear layer inside a Llama's layers by make(linear)."""
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, old in list(parent.named_children()):
                if isinstance(old, nn.Linear):
                    setattr(parent, name, make(old))


def told(model: nn.Module) -> str:
    """Return in words how a Llama's matrices are held, to be put behind its dtype; "" if in it."""
    found = model.model.layers.named_modules()
    linears = [m for name, m in found if isinstance(m, nn.Linear) and "lora_" not in name]
    kinds = Counter(linear.kind for linear in linears if hasattr(linear, "kind"))
    parts = (f" ({n} of {len(linears)} matrices)" * (n < len(linears)) for n in kinds.values())
    return "".join(f", {kind}{part}" for kind, part in zip(kinds, parts, strict=True))


def quantized(base: nn.Linear) -> Int8Linear:
    """Return a copy of base with int8 weights."""
    linear = Int8Linear(base)
    weight, scale = quantize(base.weight.data)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.scale = nn.Parameter(scale, requires_grad=False)
    return linear


def bitsandbytes_linear(base: nn.Linear, threshold: float = 6.0) -> nn.Module:
    """Return base as bitsandbytes' LLM.int8; it quantizes CPU weights when they move to a GPU."""
    from bitsandbytes.functional import int8_vectorwise_quant  # imported here: it takes seconds
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    # It would warn about every bf16 input.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    options = {"has_fp16_weights": False, "threshold": threshold, "device": "meta"}
    linear = Linear8bitLt(base.in_features, base.out_features, base.bias is not None, **options)

    weight, options = base.weight.data, {"requires_grad": False, "has_fp16_weights": False}
    if weight.is_cuda:
        weight, scales, _ = int8_vectorwise_quant(weight.half())
        options |= {"CB": weight, "SCB": scales}
    linear.weight = Int8Params(weight, **options)
    linear.bias = base.bias
    return linear
