"""Cross-entropy over a large vocabulary, without ever holding all logits.

N targets, C hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class CrossEntropy(torch.autograd.Function):
    """The sum of weight * cross-entropy of the logits x W^T, `chunk` rows at a time.

    The forward pass computes the gradients too, from the same logits. The logits of a whole pack
    would take more memory than all other activations, and recomputing them takes time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, ids: Tensor, weights: Tensor, chunk: int) -> Tensor:
        """Return the loss of x (N, C) and head (V, C) for the next tokens ids and weights (N,)."""
        loss = torch.zeros((), device=x.device)
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dhead = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            due, weight = ids[part, None], weights[part, None]
            logs = F.log_softmax(F.linear(x[part], head).float(), dim=-1)  # (chunk, V)
            loss -= (logs.gather(1, due) * weight).sum()

            if dx is None:
                continue
            # The gradient of the logits is softmax - one-hot.
            dlogits = logs.exp_().scatter_add_(1, due, -torch.ones_like(weight)).to(x.dtype)
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
