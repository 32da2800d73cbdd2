"""Keys and values that a layer attends to besides the batch's own.

A layer hands its new keys and values to its cache, which returns those to attend to. There are
three kinds. Slots hold every row's text while it is generated. A PackWriter fills slots from a
pack of prompts, whose tokens attend to one another only. A PrefixCache keeps a long prefix for the
packs that repeat it.

B rows, T tokens, S slots of a row, K key-value heads, D head size.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.masks import BLOCK


@dataclass
class Slots:
    """A layer's keys and values (B, K, S, D) of B rows; a token's slot is its position."""

    keys: Tensor
    values: Tensor
    fixed_shape = True  # every call has the same shapes, so a compiled layer can take it

    def update(self, positions: Tensor, k: Tensor, v: Tensor, mask) -> tuple[Tensor, Tensor]:
        """Write k, v (n, K, T, D) at positions (n, T) of the first n rows.

        Returns those rows' slots, as many as the mask (.., S) covers.
        """
        n, visible = len(positions), mask.shape[-1]
        rows = torch.arange(n, device=positions.device)[:, None]
        self.keys[rows, :, positions] = k.transpose(1, 2)
        self.values[rows, :, positions] = v.transpose(1, 2)
        return self.keys[:n, :, :visible], self.values[:n, :, :visible]


@dataclass(frozen=True)
class PackWriter:
    """Copies a pack's tokens into the rows of a layer's slots.

    Copy i: the pack's token tokens[i] goes to slot slots[i] of row rows[i]. A token that several
    prompts share is copied to the row of each.
    """

    layer: Slots
    rows: Tensor  # (N,), like the next two
    slots: Tensor
    tokens: Tensor
    fixed_shape = True

    def update(self, positions: Tensor, k: Tensor, v: Tensor, mask) -> tuple[Tensor, Tensor]:
        """Copy k, v (1, K, T, D) and return them as they are."""
        self.layer.keys[self.rows, :, self.slots] = k[0, :, self.tokens].transpose(0, 1)
        self.layer.values[self.rows, :, self.slots] = v[0, :, self.tokens].transpose(0, 1)
        return k, v


@dataclass
class PrefixCache:
    """A layer's keys and values of the first `length` tokens, kept from the first pack."""

    length: int
    kept: tuple[Tensor, Tensor] | None = None

    @property
    def fixed_shape(self) -> bool:
        """Whether a compiled layer can take it: a prefix of whole blocks was padded to them."""
        return self.kept is not None and self.length % BLOCK == 0

    def update(self, positions: Tensor, k: Tensor, v: Tensor, mask) -> tuple[Tensor, Tensor]:
        """Keep the beginning of the first k, v (1, K, T, D); put it before the later ones."""
        if self.kept is None:
            self.kept = k[:, :, : self.length], v[:, :, : self.length]
            return k, v
        keys, values = self.kept
        return torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)


Cache = Slots | PackWriter | PrefixCache  # of one layer


class KVCache:
    """The slots of every layer, all of one shape; they can grow."""

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int, int, int],  # (B, K, S, D)
        device: torch.device,
        dtype: torch.dtype,
    ):
        empty = partial(torch.zeros, shape, device=device, dtype=dtype)
        self.layers = [Slots(empty(), empty()) for _ in range(layers)]

    @property
    def slots(self) -> int:
        """The slots of a row, the same in every layer."""
        return self.layers[-1].values.shape[2]

    def grow(self, slots: int) -> None:
        """Make room for `slots` per row, layer by layer, since two whole caches may not fit."""
        for layer in self.layers:
            layer.keys = F.pad(layer.keys, (0, 0, 0, slots - layer.keys.shape[2]))
            layer.values = F.pad(layer.values, (0, 0, 0, slots - layer.values.shape[2]))

    def shrink(self, rows: int) -> None:
        """Keep only the first rows."""
        for layer in self.layers:
            layer.keys = layer.keys[:rows].clone()
            layer.values = layer.values[:rows].clone()

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of a row to another row."""
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                tensor[target, :, :length] = tensor[source, :, :length]
