"""The paper's seven sequential recommenders (section 5.2.1), over frozen text embeddings.

Each scores candidates given a user's history: forward(h, mask, c) returns scores (B, C) for the
history's items h (B, L, D), oldest first, mask (B, L), true where there is an item, and candidates
c (B, C, D). Baseline holds what they share: the projection of an item's text embedding to D
dimensions. No model uses an item's id.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Baseline(nn.Module):
    """Scores items, which are given as rows of texts (n, E), the items' embeddings."""

    def __init__(self, texts: Tensor, size: int, dropout: float):
        super().__init__()
        self.register_buffer("texts", texts)
        self.project = nn.Linear(texts.shape[1], size)
        self.dropout = nn.Dropout(dropout)

    def items(self, numbers: Tensor) -> Tensor:
        """Return the vectors (..., D) of items."""
        return self.project(self.texts[numbers])

    def score(self, history: Tensor, candidates: Tensor) -> Tensor:
        """Return scores (B, C) for history (B, L), padded with -1 at its end."""
        mask = history >= 0
        return self(self.items(history.clamp(min=0)), mask, self.items(candidates))


def last(h: Tensor, mask: Tensor) -> Tensor:
    """Return the last vector (B, D) of each row of h (B, L, D)."""
    return h[torch.arange(len(h), device=h.device), mask.sum(1) - 1]


def perceptron(*sizes: int) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    layers = []
    for narrow, wide in pairwise(sizes):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class NCF(Baseline):
    """He et al., 2017: the product of user and item, and a perceptron over both.

    The user is the maximum over the history.
    """

    def __init__(self, texts: Tensor, size: int, dropout: float):
        super().__init__(texts, size, dropout)
        self.perceptron = perceptron(2 * size, 2 * size, size)
        self.output = nn.Linear(2 * size, 1)

    def forward(self, h: Tensor, mask: Tensor, c: Tensor) -> Tensor:
        """Return scores (B, C)."""
        user = h.masked_fill(~mask[..., None], -torch.inf).amax(1)[:, None].expand_as(c)
        mixed = self.perceptron(self.dropout(torch.cat((user, c), -1)))
        return self.output(torch.cat((user * c, mixed), -1))[..., 0]


class DIN(Baseline):
    """Zhou et al., 2018: a sum of the history, which a perceptron weighs by the candidate."""

    def __init__(self, texts: Tensor, size: int, dropout: float):
        super().__init__(texts, size, dropout)
        self.weigh = perceptron(4 * size, size, 1)
        self.output = perceptron(3 * size, 2 * size, 1)

    def forward(self, h: Tensor, mask: Tensor, c: Tensor) -> Tensor:
        """Return scores (B, C)."""
        weights = self.weights(h, c).masked_fill(~mask[:, None], 0.0)
        user = weights @ h
        return self.output(self.dropout(torch.cat((user, c, user * c), -1)))[..., 0]

    def weights(self, h: Tensor, c: Tensor) -> Tensor:
        """Return each item's weight (B, C, L) for each candidate.

        The perceptron's input is [item, candidate, item - candidate, item * candidate]. Only the
        product is of a pair, so the others' share of the first layer is computed once per item and
        once per candidate instead of once per pair.
        """
        first, relu, second = self.weigh
        item, candidate, difference, product = first.weight.chunk(4, 1)
        of_items = F.linear(h, item + difference)[:, None]
        of_candidates = F.linear(c, candidate - difference, first.bias)[:, :, None]
        of_pairs = F.linear(h[:, None] * c[:, :, None], product)  # (B, C, L, D)
        return second(relu(of_pairs + of_items + of_candidates))[..., 0]


class DIEN(Baseline):
    """Zhou et al., 2019: a GRU extracts interests from the history, a second one evolves them.

    The second one is an AUGRU: its update gate is scaled by each interest's attention to the
    candidate.
    """

    def __init__(self, texts: Tensor, size: int, dropout: float):
        super().__init__(texts, size, dropout)
        self.interests = nn.GRU(size, size, batch_first=True)
        self.attend = nn.Linear(size, size, bias=False)
        self.inner, self.outer = nn.Linear(size, 3 * size), nn.Linear(size, 3 * size)
        self.output = perceptron(3 * size, 2 * size, 1)

    def forward(self, h: Tensor, mask: Tensor, c: Tensor) -> Tensor:
        """Return scores (B, C)."""
        states, _ = self.interests(h)
        scores = torch.einsum("bld,bcd->bcl", self.attend(states), c)
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        given, state = self.inner(states), torch.zeros_like(c)
        for t in range(h.shape[1]):
            own = self.outer(state).chunk(3, -1)
            new = [x[:, None] for x in given[:, t].chunk(3, -1)]
            reset = torch.sigmoid(new[0] + own[0])
            # Beyond the history's end the weights are zero, so the state stays.
            update = torch.sigmoid(new[1] + own[1]) * weights[:, :, t, None]
            state = (1 - update) * state + update * torch.tanh(new[2] + reset * own[2])
        return self.output(self.dropout(torch.cat((state, c, state * c), -1)))[..., 0]

    def auxiliary_loss(self, h: Tensor, mask: Tensor) -> Tensor:
        """Return the loss of telling the item after each interest from an item of another user."""
        states, _ = self.interests(h)
        real = mask[:, 1:]
        yes, no = ((states[:, :-1] * x[:, 1:]).sum(-1)[real] for x in (h, h.roll(1, 0)))
        return F.softplus(-yes).mean() + F.softplus(no).mean()


class GRU4Rec(Baseline):
    """Hidasi et al., 2016: a GRU's last state, times the candidate."""

    def __init__(self, texts: Tensor, size: int, dropout: float):
        super().__init__(texts, size, dropout)
        self.gru = nn.GRU(size, 2 * size, batch_first=True, bias=False)
        self.output = nn.Linear(2 * size, size)

    def forward(self, h: Tensor, mask: Tensor, c: Tensor) -> Tensor:
        """Return scores (B, C)."""
        states, _ = self.gru(self.dropout(h))
        return torch.einsum("bd,bcd->bc", last(self.output(states), mask), c)


class NARM(Baseline):
    """Li et al., 2017: a GRU's last state and those that it attends to, times the candidate."""

    def __init__(self, texts: Tensor, size: int, dropout: float):
        super().__init__(texts, size, dropout)
        self.gru = nn.GRU(size, 2 * size, batch_first=True, bias=False)
        self.query, self.key = (nn.Linear(2 * size, 2 * size, bias=False) for _ in range(2))
        self.weigh = nn.Linear(2 * size, 1, bias=False)
        self.output = nn.Linear(4 * size, size, bias=False)

    def forward(self, h: Tensor, mask: Tensor, c: Tensor) -> Tensor:
        """Return scores (B, C)."""
        states, _ = self.gru(self.dropout(h))
        final = last(states, mask)
        weights = self.weigh(torch.sigmoid(self.query(final)[:, None] + self.key(states)))
        attended = (weights * mask[..., None] * states).sum(1)
        user = self.output(self.dropout(torch.cat((attended, final), -1)))
        return torch.einsum("bd,bcd->bc", user, c)


def encoder(size: int, dropout: float, layers: int = 2, heads: int = 2) -> nn.TransformerEncoder:
    """Return SASRec's transformer: post-norm, with an MLP four times as wide."""
    layer = nn.TransformerEncoderLayer(
        size, heads, 4 * size, dropout, "gelu", batch_first=True, layer_norm_eps=1e-12
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class SASRec(Baseline):
    """Kang and McAuley, 2018: causal self-attention; the last state times the candidate.

    Positions are learned and counted from the history's end.
    """

    longest = 256  # positions

    def __init__(self, texts: Tensor, size: int, dropout: float):
        super().__init__(texts, size, dropout)
        self.positions = nn.Embedding(self.longest, size)
        self.norm = nn.LayerNorm(size, 1e-12)
        self.encoder = encoder(size, dropout)

    def encode(self, h: Tensor, mask: Tensor) -> Tensor:
        """Return states (B, L, D)."""
        places = torch.arange(h.shape[1], device=h.device)
        age = (mask.sum(1, keepdim=True) - 1 - places).clamp(0, self.longest - 1)
        x = self.dropout(self.norm(h + self.positions(age)))
        return self.encoder(x, mask=places > places[:, None], src_key_padding_mask=~mask)

    def forward(self, h: Tensor, mask: Tensor, c: Tensor) -> Tensor:
        """Return scores (B, C)."""
        return torch.einsum("bd,bcd->bc", last(self.encode(h, mask), mask), c)


class CORE(SASRec):
    """Hou et al., 2022: the user is a mean of the items' own vectors, weighted by a transformer.

    Scores are cosines divided by a temperature.
    """

    temperature = 0.07

    def __init__(self, texts: Tensor, size: int, dropout: float):
        super().__init__(texts, size, dropout)
        self.weigh = nn.Linear(size, 1)

    def forward(self, h: Tensor, mask: Tensor, c: Tensor) -> Tensor:
        """Return scores (B, C)."""
        weights = self.weigh(self.encode(h, mask)).masked_fill(~mask[..., None], -torch.inf)
        user = F.normalize((weights.softmax(1) * self.dropout(h)).sum(1), dim=-1)
        items = F.normalize(self.dropout(c), dim=-1)
        return torch.einsum("bd,bcd->bc", user, items) / self.temperature


MODELS = {model.__name__.lower(): model for model in (NCF, DIN, DIEN, GRU4Rec, NARM, SASRec, CORE)}
