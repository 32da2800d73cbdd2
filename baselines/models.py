"""Seven sequential recommenders over frozen text embeddings of the items, as the paper compares with (section 5.2.1).

Each scores candidates by a user's history: forward(h, mask, c), with h (B, L, D) the history's items oldest first, mask
(B, L) true where there is one, and c (B, C, D) the candidates, gives scores (B, C). What all share, the projection of
an item's text embedding to D dimensions, stands in Baseline; whatever an item's id could tell is left out.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Baseline(nn.Module):
    """Scores of items by their numbers; texts (n, E) are the items' embeddings."""

    def __init__(self, texts: Tensor, size: int = 64, dropout: float = 0.2):
        super().__init__()
        self.register_buffer("texts", texts)
        self.project = nn.Linear(texts.shape[1], size)
        self.dropout = nn.Dropout(dropout)
        self.build(size, dropout)

    def build(self, size: int, dropout: float) -> None:
        """Make the layers."""

    def items(self, numbers: Tensor) -> Tensor:
        """Return the vectors (..., D) of items."""
        return self.project(self.texts[numbers])

    def score(self, history: Tensor, candidates: Tensor) -> Tensor:
        """Return scores (B, C) for history (B, L), padded with -1 at its end, and candidates (B, C)."""
        mask = history >= 0
        return self(self.items(history.clamp(min=0)), mask, self.items(candidates))


def last(h: Tensor, mask: Tensor) -> Tensor:
    """Return the last vector (B, D) of each row of h (B, L, D)."""
    return h[torch.arange(len(h), device=h.device), mask.sum(1) - 1]


def perceptron(*sizes: int) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class NCF(Baseline):
    """He et al., 2017: product and perceptron of user and item; the user is the maximum over the history."""

    def build(self, size: int, dropout: float) -> None:  # noqa: D102
        self.perceptron = perceptron(2 * size, 2 * size, size)
        self.output = nn.Linear(2 * size, 1)

    def forward(self, h: Tensor, mask: Tensor, c: Tensor) -> Tensor:  # noqa: D102
        user = h.masked_fill(~mask[..., None], -torch.inf).amax(1)[:, None].expand_as(c)
        mixed = self.perceptron(self.dropout(torch.cat((user, c), -1)))
        return self.output(torch.cat((user * c, mixed), -1))[..., 0]


class DIN(Baseline):
    """Zhou et al., 2018: the history summed with weights that a perceptron gives each item beside the candidate."""

    def build(self, size: int, dropout: float) -> None:  # noqa: D102
        self.weigh = perceptron(4 * size, size, 1)
        self.output = perceptron(3 * size, 2 * size, 1)

    def forward(self, h: Tensor, mask: Tensor, c: Tensor) -> Tensor:  # noqa: D102
        shape = (*c.shape[:2], h.shape[1], c.shape[2])  # (B, C, L, D)
        past, wanted = h[:, None].expand(shape), c[:, :, None].expand(shape)
        weights = self.weigh(torch.cat((past, wanted, past - wanted, past * wanted), -1))[..., 0]
        user = (weights.masked_fill(~mask[:, None], 0.0)[..., None] * past).sum(2)
        return self.output(self.dropout(torch.cat((user, c, user * c), -1)))[..., 0]


class DIEN(Baseline):
    """Zhou et al., 2019: a GRU reads interests off the history, a second one, whose update gate is scaled by each
    interest's attention to the candidate (AUGRU), follows how they evolve.
    """

    def build(self, size: int, dropout: float) -> None:  # noqa: D102
        self.interests = nn.GRU(size, size, batch_first=True)
        self.attend = nn.Linear(size, size, bias=False)
        self.inner, self.outer = nn.Linear(size, 3 * size), nn.Linear(size, 3 * size)
        self.output = perceptron(3 * size, 2 * size, 1)

    def forward(self, h: Tensor, mask: Tensor, c: Tensor) -> Tensor:  # noqa: D102
        states, _ = self.interests(h)
        scores = torch.einsum("bld,bcd->bcl", self.attend(states), c)
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        given, state = self.inner(states), torch.zeros_like(c)
        for t in range(h.shape[1]):
            own = self.outer(state).chunk(3, -1)
            new = [x[:, None] for x in given[:, t].chunk(3, -1)]
            reset = torch.sigmoid(new[0] + own[0])
            update = (
                torch.sigmoid(new[1] + own[1]) * weights[:, :, t, None]
            )  # zero behind the history's end
            state = (1 - update) * state + update * torch.tanh(new[2] + reset * own[2])
        return self.output(self.dropout(torch.cat((state, c, state * c), -1)))[..., 0]

    def auxiliary_loss(self, h: Tensor, mask: Tensor) -> Tensor:
        """Return the loss that each interest tells the item that followed from another user's."""
        states, _ = self.interests(h)
        real = mask[:, 1:]
        yes, no = ((states[:, :-1] * x[:, 1:]).sum(-1)[real] for x in (h, h.roll(1, 0)))
        return F.softplus(-yes).mean() + F.softplus(no).mean()


class GRU4Rec(Baseline):
    """Hidasi et al., 2016: a GRU's last state, times the candidate."""

    def build(self, size: int, dropout: float) -> None:  # noqa: D102
        self.gru = nn.GRU(size, 2 * size, batch_first=True, bias=False)
        self.output = nn.Linear(2 * size, size)

    def forward(self, h: Tensor, mask: Tensor, c: Tensor) -> Tensor:  # noqa: D102
        states, _ = self.gru(self.dropout(h))
        return torch.einsum("bd,bcd->bc", last(self.output(states), mask), c)


class NARM(Baseline):
    """Li et al., 2017: a GRU's last state beside the states that it attends to, times the candidate."""

    def build(self, size: int, dropout: float) -> None:  # noqa: D102
        self.gru = nn.GRU(size, 2 * size, batch_first=True, bias=False)
        self.query, self.key = (nn.Linear(2 * size, 2 * size, bias=False) for _ in range(2))
        self.weigh = nn.Linear(2 * size, 1, bias=False)
        self.output = nn.Linear(4 * size, size, bias=False)

    def forward(self, h: Tensor, mask: Tensor, c: Tensor) -> Tensor:  # noqa: D102
        states, _ = self.gru(self.dropout(h))
        final = last(states, mask)
        weights = (
            self.weigh(torch.sigmoid(self.query(final)[:, None] + self.key(states)))
            * mask[..., None]
        )
        user = self.output(self.dropout(torch.cat(((weights * states).sum(1), final), -1)))
        return torch.einsum("bd,bcd->bc", user, c)


def encoder(size: int, dropout: float, layers: int = 2, heads: int = 2) -> nn.TransformerEncoder:
    """Return transformer layers as SASRec has them: normalized after each part, four times as wide inside."""
    layer = nn.TransformerEncoderLayer(
        size, heads, 4 * size, dropout, "gelu", batch_first=True, layer_norm_eps=1e-12
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class SASRec(Baseline):
    """Kang and McAuley, 2018: causal self-attention with learned positions; the last state times the candidate."""

    longest = 256  # positions, counted from the history's end

    def build(self, size: int, dropout: float) -> None:  # noqa: D102
        self.positions = nn.Embedding(self.longest, size)
        self.norm = nn.LayerNorm(size, 1e-12)
        self.encoder = encoder(size, dropout)

    def encode(self, h: Tensor, mask: Tensor) -> Tensor:
        """Return states (B, L, D)."""
        places = torch.arange(h.shape[1], device=h.device)
        age = (mask.sum(1, keepdim=True) - 1 - places).clamp(0, self.longest - 1)
        x = self.dropout(self.norm(h + self.positions(age)))
        return self.encoder(x, mask=places > places[:, None], src_key_padding_mask=~mask)

    def forward(self, h: Tensor, mask: Tensor, c: Tensor) -> Tensor:  # noqa: D102
        return torch.einsum("bd,bcd->bc", last(self.encode(h, mask), mask), c)


class CORE(SASRec):
    """Hou et al., 2022: the user is a weighted mean of the items' own vectors, a transformer gives the weights; scores
    are cosines over a temperature.
    """

    temperature = 0.07

    def build(self, size: int, dropout: float) -> None:  # noqa: D102
        super().build(size, dropout)
        self.weigh = nn.Linear(size, 1)

    def forward(self, h: Tensor, mask: Tensor, c: Tensor) -> Tensor:  # noqa: D102
        weights = (
            self.weigh(self.encode(h, mask)).masked_fill(~mask[..., None], -torch.inf).softmax(1)
        )
        user = F.normalize((weights * self.dropout(h)).sum(1), dim=-1)
        return (
            torch.einsum("bd,bcd->bc", user, F.normalize(self.dropout(c), dim=-1))
            / self.temperature
        )


MODELS = {model.__name__.lower(): model for model in (NCF, DIN, DIEN, GRU4Rec, NARM, SASRec, CORE)}
