"""Cross-entropy over a large vocabulary, without ever holding all logits.

N targets, C hidden size, V vocabulary.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def entropies(logits: Tensor, due: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each row of logits (N, V), due (N,), and the logits' gradient.

    Both are computed in fp32; the gradient, softmax - one-hot, has the dtype of the logits.
    """
    logs = F.log_softmax(logits.float(), dim=-1)
    losses = -logs.gather(1, due[:, None])[:, 0]
    one_hot = due[:, None] == torch.arange(logits.shape[1], device=due.device)
    return losses, (logs.exp() - one_hot.float()).to(logits.dtype)


@cache
def _compiled_entropies() -> Callable:
    # On a GPU these are passes over memory, which a compiler makes a quarter as many of.
    return torch.compile(entropies)


class CrossEntropy(torch.autograd.Function):
    """The sum of weight * cross-entropy of the logits x W^T, `chunk` rows at a time.

    The forward pass computes the gradients too, from the same logits. The logits of a whole pack
    would take more memory than all other activations, and recomputing them takes time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, ids: Tensor, weights: Tensor, chunk: int) -> Tensor:
        """Return the loss of x (N, C) and head (V, C) for the next tokens ids and weights (N,)."""
        of_rows = _compiled_entropies() if x.is_cuda else entropies
        loss = torch.zeros((), device=x.device)
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dhead = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            weight = weights[part, None]
            losses, dlogits = of_rows(F.linear(x[part], head), ids[part])
            loss += (losses * weights[part]).sum()
            if dx is not None:
                dx[part] = (dlogits @ head) * weight
            if dhead is not None:
                dhead += dlogits.T @ (x[part] * weight).to(x.dtype)
        ctx.save_for_backward(dx, dhead)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Scale the gradients that forward has computed."""
        dx, dhead = (None if t is None else t * grad for t in ctx.saved_tensors)
        return dx, dhead, None, None, None
