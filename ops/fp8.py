"""Eight-bit floating point for the layers' frozen matrices, and for what is multiplied by them.

W is held in e4m3 (4 bits of exponent, 3 of mantissa) with one scale per row: the row's greatest
magnitude divided by e4m3's. The rows of x are quantized likewise when they come, and the GPU
multiplies the two in 8 bit:

    y = (x8 W8^T) * scale of x's row * scale of W's row + b

A row's result depends on no other row, so packs and batches change nothing. The gradient of x is
g W, a sum over the rows of W, whose scales cannot be taken out of it. Training therefore holds a
second copy, W^T quantized row by row (`turned`), and quantizes the rows of g: gradients too are
products in 8 bit. Both copies together take as much memory as W in 16 bit.

A CPU has no such product. There the same e4m3 numbers and scales are multiplied in fp32, which is
slow, and meant for trying out.
"""

import torch
from torch import Tensor, nn

from ops.checkpoint import CheckpointError
from ops.int8 import replace_linears

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
TINY = 1e-30  # a row's least magnitude for its scale: a row of zeros must not be divided by zero
MULTIPLE = 16  # both dimensions of a matrix must be multiples of it
ADA = (8, 9)  # the first compute capability with fp8
FAST = True  # the GPU adds up in fewer bits than fp32's, at the kernels' full speed
WAYS = ("scoring", "training")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (M, K) in e4m3, and the scale of each row (M, 1) in fp32.

    A row with a NaN or an infinity becomes NaN, at least in part, and so does its product.
    """
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=TINY) / LARGEST
    # Division may end just above the largest number; what lies further above would become NaN.
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return x (..., K) weight^T (N, K) * scale (N,) in x's dtype, with x quantized row by row.

    The GPU's product is rounded to bf16, the only dtype that all kernels of `_scaled_mm` write.
    """
    x8, x_scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    if x.is_cuda:
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": FAST}
        x8, w8 = x8.contiguous(), weight.T  # row-major and column-major, as the kernels want them
        y = torch._scaled_mm(x8, w8, x_scale.contiguous(), scale.unsqueeze(0), **options)
    else:
        y = x8.float() @ weight.float().T * x_scale * scale
    return y.to(x.dtype).view(*x.shape[:-1], len(weight))


class _Product(torch.autograd.Function):
    """`product`, whose gradient is a product with the turned copy."""

    @staticmethod
    def forward(ctx, x, weight, scale, turned, turned_scale):
        ctx.save_for_backward(turned, turned_scale)
        return product(x, weight, scale)

    @staticmethod
    def backward(ctx, grad):
        turned, turned_scale = ctx.saved_tensors
        if turned is None:
            raise RuntimeError("fp8 weights for scoring have no gradient; load them for training")
        return product(grad, turned, turned_scale), None, None, None, None


class Fp8Linear(nn.Linear):
    """y = x W^T + b, with W (out, in) and the rows of x in e4m3, each row with a scale in fp32."""

    def __init__(self, base: nn.Linear, way: str = "scoring"):
        """Take base's weights, or none yet if they are on the meta device."""
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.bias, self.way = base.bias, way
        parts = self.encode(base.weight.detach())
        # Buffers are no parameters: the copy counts neither as the model's size nor as its work.
        self.register_buffer("turned", parts.pop("turned", None))
        self.register_buffer("turned_scale", parts.pop("turned_scale", None))
        for name, tensor in parts.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Return what holds a weight (out, in), by the names that it has here."""
        w8, scale = quantize_rows(weight)
        parts = {"weight": w8.contiguous(), "scale": scale[:, 0]}
        if self.way == "training":
            turned, turned_scale = quantize_rows(weight.T.contiguous())
            parts |= {"turned": turned, "turned_scale": turned_scale[:, 0]}
        return parts

    @property
    def kind(self) -> str:
        """What the scripts say of it."""
        return in_words()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = _Product.apply(x, self.weight, self.scale, self.turned, self.turned_scale)
        return y if self.bias is None else y + self.bias


def in_words() -> str:
    """Return what the scripts say of fp8; a model to be trained is still on the CPU then."""
    slow = "fp8, emulated on the CPU: slower than without, for trying out"
    return "fp8" if torch.cuda.is_available() else slow


def fits(linear: nn.Linear) -> bool:
    """Return whether the kernels take a layer's dimensions; others stay in 16 bit."""
    return linear.in_features % MULTIPLE == linear.out_features % MULTIPLE == 0


def use_fp8(model: nn.Module, way: str) -> None:
    """Hold the matrices of a Llama's layers in e4m3, for scoring or for training.

    Adapters come afterwards. CheckpointError if no matrix fits, or if there is a GPU that is too
    old.
    """
    assert way in WAYS, way
    assert not any(name.endswith(".base_layer") for name, _ in model.named_modules())
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability()) < ADA:
        card, needed = torch.cuda.get_device_name(), ".".join(map(str, ADA))
        what = f"--fp8 needs a GPU of compute capability {needed} (Ada, Hopper) or newer"
        has = ".".join(map(str, found))
        raise CheckpointError(f"{what}, and {card} has {has}; leave --fp8 out")
    replace_linears(model, lambda linear: Fp8Linear(linear, way) if fits(linear) else linear)
    if not any(isinstance(module, Fp8Linear) for module in model.modules()):
        what = f"no matrix of the layers has dimensions that are multiples of {MULTIPLE}"
        raise CheckpointError(f"--fp8: {what}; leave --fp8 out")
