"""What keeps a text from going in circles: the repetition penalty, and no n-gram twice.

Both are defined as in transformers' generate, and the prompt counts. The penalty divides the logits
above zero of every token that has occurred, and multiplies those below. After that, a token that
would complete an n-gram which has occurred becomes impossible.

B rows, S slots of a row, V logits of a token.
"""

import math

import torch
from torch import Tensor

from ops.cache import KVCache


def penalize_slowly(logits: Tensor, ids: list[int], repetition: float, ngram: int) -> Tensor:
    """Return the logits (V,) after a text's ids, in fp32 and penalized, the obvious way."""
    logits = logits.float().clone()
    seen = sorted(set(ids))
    scores = logits[seen]
    logits[seen] = torch.where(scores < 0, scores * repetition, scores / repetition)
    for end in range(ngram, len(ids) + 1) if ngram else ():
        *before, token = ids[end - ngram : end]
        if before == ids[len(ids) - ngram + 1 :]:
            logits[token] = -math.inf
    return logits


class Penalties:
    """The penalties for every row of a cache, from a history of each row's tokens.

    repetition, ngram: 1 and 0 are off. Every call has fixed shapes and no transfer to the host on a
    GPU, so decoding with penalties can be captured as a graph. A row's result does not depend on
    the others.
    """

    def __init__(
        self, repetition: float, ngram: int, rows: int, slots: int, device: torch.device
    ) -> None:
        self.repetition, self.ngram = repetition, ngram
        # Slots behind a text's end repeat its first token, for which the penalty changes nothing.
        self.history = torch.zeros(rows, slots, dtype=torch.long, device=device)
        self.begun = torch.zeros(rows, dtype=torch.long, device=device)  # the prompts' lengths

    def begin(self, first: int, prompts: list[list[int]]) -> None:
        """Start the history of rows first, first + 1, ... with these prompts."""
        width = max(map(len, prompts))
        padded = torch.tensor([ids + ids[:1] * (width - len(ids)) for ids in prompts])
        rows = self.history[first : first + len(prompts)]
        rows[:, :width] = padded.to(rows.device)
        rows[:, width:] = rows[:, :1]
        self.begun[first : first + len(prompts)] = torch.tensor([len(ids) for ids in prompts])

    def append(self, tokens: Tensor, positions: Tensor) -> None:
        """Write one token for each of the first n rows, tokens (n,) at positions (n,)."""
        self.history[: len(tokens)].scatter_(1, positions[:, None], tokens[:, None])

    def apply(self, logits: Tensor, lengths: Tensor, rows: list[int] | None = None) -> Tensor:
        """Return logits (n, V) in fp32 and penalized.

        They follow the first `lengths` (n,) tokens of these rows (n,), by default the first n.
        """
        history = self.history[: len(logits)] if rows is None else self.history[rows]
        if not logits.is_cuda:  # the shapes may differ, so only what is used is read
            history = history[:, : int(lengths.max())]

        logits = logits.float()
        if self.repetition != 1:
            scores = logits.gather(1, history)
            penalized = torch.where(scores < 0, scores * self.repetition, scores / self.repetition)
            logits = logits.scatter(1, history, penalized)
        if 0 < self.ngram <= history.shape[1]:
            bounds = torch.where(self._completed(history, lengths), -math.inf, math.inf)
            logits = logits.scatter_reduce(1, history[:, self.ngram - 1 :], bounds, "amin")
        return logits

    def _completed(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Return for each window, ngram neighbors in the history, whether it must not come again.

        (n, S - ngram + 1), True where a text ends with all but the window's last token, which would
        complete it.
        """
        windows, device = history.unfold(1, self.ngram, 1), history.device
        recent = lengths[:, None] - torch.arange(self.ngram - 1, 0, -1, device=device)
        recent = history.gather(1, recent.clamp(min=0))  # a text too short has no window either
        ends = torch.arange(self.ngram, history.shape[1] + 1, device=device)
        return (windows[..., :-1] == recent[:, None]).all(-1) & (ends <= lengths[:, None])

    def grow(self, slots: int) -> None:
        """Make room for `slots` per row."""
        old, used = self.history, self.history.shape[1]
        if slots > used:
            self.history = old.new_zeros(len(old), slots)
            self.history[:, :used] = old
            self.history[:, used:] = self.history[:, :1]

    def shrink(self, rows: int) -> None:
        """Keep only the first rows."""
        self.history, self.begun = self.history[:rows].clone(), self.begun[:rows].clone()

    def move(self, source: int, target: int) -> None:
        """Copy a row to another row, what is behind its text too."""
        self.history[target] = self.history[source]


class TextCache(KVCache):
    """A cache that also chooses the tokens, since penalties need what its rows hold.

    penalties: None for the plain greedy choice, which then takes no memory and no time.
    """

    def __init__(self, penalties: Penalties | None, *args):
        super().__init__(*args)
        self.penalties = penalties

    def begin(self, first: int, prompts: list[list[int]]) -> None:
        """Note that rows first, first + 1, ... hold these prompts from now on."""
        if self.penalties is not None:
            self.penalties.begin(first, prompts)

    def choose_first(self, logits: Tensor, rows: list[int]) -> Tensor:
        """Return the tokens (n,) that follow the prompts in these n rows, from the first logits."""
        logits = logits[: len(rows)]
        if self.penalties is not None:
            logits = self.penalties.apply(logits, self.penalties.begun[rows], rows)
        return logits.argmax(-1)

    def choose(self, logits: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the tokens (n,) that follow tokens (n,) at positions (n,) of the first n rows.

        Writing the tokens down again changes nothing, so a captured step may be repeated.
        """
        if self.penalties is not None:
            self.penalties.append(tokens, positions)
            logits = self.penalties.apply(logits, positions + 1)
        return logits.argmax(-1)

    def grow(self, slots: int) -> None:
        """Make room for `slots` per row, in the history first: it may have more than the cache."""
        if self.penalties is not None:
            self.penalties.grow(slots)
        super().grow(slots)

    def shrink(self, rows: int) -> None:
        """Keep only the first rows."""
        if self.penalties is not None:
            self.penalties.shrink(rows)
        super().shrink(rows)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of a row to another row."""
        if self.penalties is not None:
            self.penalties.move(source, target)
        super().move(source, target, length)
