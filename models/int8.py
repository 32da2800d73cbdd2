"""Eight-bit weights for the layers' matrices, in two ways.

`weights` (this file's): each row of W as int8 with one scale, the absolute maximum's; x stays as it is. The product
converts W on its way into the matrix unit, so that a decoding step reads one byte a weight. `bitsandbytes` is LLM.int8
(Dettmers et al., 2022), the paper's way: x is quantized too, and columns of x with a value above the threshold are
multiplied in 16 bit. It asks the host in every layer and picks those columns over all rows of a batch, so that a row's
result depends on its neighbours; with threshold 0 it does neither and is less exact.
"""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WAYS = ("weights", "bitsandbytes")
FEW = 128  # rows of x up to which the product reads int8; for more, W is converted first, which is little beside them

if torch.cuda.is_available():
    import triton
    import triton.language as tl

    @triton.jit
    def _product(x, w, parts, M, N, K, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
        """parts[s] (M, N), fp32: the share of x (M, K) w^T (N, K) from every SPLIT-th block of K, beginning at s."""
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        part, m = tl.program_id(1), tl.arange(0, BM)
        product = tl.zeros((BN, BM), dtype=tl.float32)
        for block in range(part, tl.cdiv(K, BK), SPLIT):
            k = block * BK + tl.arange(0, BK)
            rows = tl.load(w + n[:, None] * K + k[None], mask=(n[:, None] < N) & (k[None] < K), other=0)
            columns = tl.load(x + m[None] * K + k[:, None], mask=(m[None] < M) & (k[:, None] < K), other=0.0)
            product = tl.dot(rows.to(x.dtype.element_ty), columns, product)
        place = parts + part * M * N + m[None] * N + n[:, None]
        tl.store(place, product, mask=(n[:, None] < N) & (m[None] < M))


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (M, K) weight^T (N, K) in fp32 for few rows x on a GPU and int8 weight, in a fixed order of sums."""
    (m, k), n = x.shape, len(weight)
    bm, bn, bk, warps, stages = max(16, triton.next_power_of_2(m)), 128, 128, 8, 3
    if bm <= 32 and n > 132 * bn:  # a large GPU has 132 processors
        bn, warps, stages = 64, 4, 4
    columns = triton.cdiv(n, bn)
    split = max(1, min(k // (4 * bk), 264 // columns))
    parts = torch.empty(split, m, n, device=x.device, dtype=torch.float32)
    _product[(columns, split)](x, weight, parts, m, n, k, split, bm, bn, bk, num_warps=warps, num_stages=stages)
    return parts.sum(0)


class Int8Linear(nn.Linear):
    """y = (x W^T) * scale + b, with W (out, in) in int8 and scale (out,) in fp32."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.scale = nn.Parameter(torch.empty(base.out_features, device="meta"), requires_grad=False)
        self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=torch.int8), requires_grad=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        rows = x.numel() // x.shape[-1]
        if x.is_cuda and rows <= FEW and not torch.is_grad_enabled():
            y = few_rows_product(x.reshape(rows, -1).contiguous(), self.weight).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype))
        y = (y * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (N, K) as int8 and its rows' scales (N,) in fp32."""
    scale = weight.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 127
    return (weight / scale).round().to(torch.int8), scale[:, 0]


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put make(linear) in the place of every linear layer of a Llama's layers."""
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, old in list(parent.named_children()):
                if isinstance(old, nn.Linear):
                    setattr(parent, name, make(old))


def quantized(base: nn.Linear) -> Int8Linear:
    """Return base with int8 weights."""
    linear = Int8Linear(base)
    values = quantize(base.weight.data)
    linear.weight, linear.scale = (nn.Parameter(value, requires_grad=False) for value in values)
    return linear


def bitsandbytes_linear(base: nn.Linear, threshold: float) -> nn.Module:
    """Return base as bitsandbytes' LLM.int8; weights on a CPU are quantized when they move to their device."""
    from bitsandbytes.functional import int8_vectorwise_quant  # here, because it takes seconds to import
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it warns of every bf16 input
    options = {"has_fp16_weights": False, "threshold": threshold, "device": "meta"}
    linear = Linear8bitLt(base.in_features, base.out_features, base.bias is not None, **options)
    weight, options = base.weight.data, {"requires_grad": False, "has_fp16_weights": False}
    if weight.is_cuda:
        weight, scales, _ = int8_vectorwise_quant(weight.half())
        options |= {"CB": weight, "SCB": scales}
    linear.weight = Int8Params(weight, **options)
    linear.bias = base.bias
    return linear
