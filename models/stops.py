"""Where a text ends, and what its model may not repeat."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.tokenizer import Tokenizer
from ops.penalties import Penalties, TextCache, penalize_slowly


class StopTexts:
    """Texts that end what a model writes: it goes on to the next turn of the conversation.

    A stop text counts wherever its bytes are in the tokens that the model wrote, however they share
    it out; what they have after it does not matter. It has to be written as a whole: one that the
    prompt begins does not count. Raises ValueError for an empty stop text.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]):
        if not all(texts):
            raise ValueError("an empty stop text would end every text")
        self.texts = tuple(texts)
        self.wanted = [text.encode() for text in texts]
        # A token has a byte at least, so more of the last ones than this are not needed.
        self.most = max(map(len, self.wanted), default=0)

        # Only a few tokens can complete a stop text: those that begin with an end of one.
        self.pieces = token_bytes(tokenizer)
        ends = tuple(stop[i:] for stop in self.wanted for i in range(len(stop)))
        self.completing = set()
        for i, piece in enumerate(self.pieces):
            if piece.startswith(ends) or any(stop in piece for stop in self.wanted):
                self.completing.add(i)

    def found(self, tokens: list[int]) -> bool:
        """Return whether the last of the tokens completes a stop text."""
        if tokens[-1] not in self.completing:
            return False
        known = [i for i in tokens if i < len(self.pieces)]  # as they are decoded
        written = b"".join(self.pieces[i] for i in known[-self.most :])
        return any(stop in written for stop in self.wanted)

    def cut(self, text: str) -> str:
        """Return a text in which a stop was found, up to the first one and without blanks there."""
        places = [text.find(stop) for stop in self.texts if stop in text]
        # Decoding takes a blank from the beginning of a text, and with it from a stop text there.
        if not places and text.startswith(tuple(stop.lstrip(" ") for stop in self.texts)):
            places = [0]
        return text[: min(places, default=len(text))].rstrip()


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes that each token stands for inside a text, by its id."""
    sentences, fast = tokenizer.pieces, tokenizer.fast
    if sentences is not None:
        return [_piece_bytes(sentences.id_to_piece(i)) for i in range(tokenizer.size)]
    decoder = json.dumps(json.loads(fast.to_str())["decoder"])
    convert = _byte_level if '"ByteLevel"' in decoder else _piece_bytes
    return [convert(fast.id_to_token(i) or "") for i in range(tokenizer.size)]


def _piece_bytes(piece: str) -> bytes:
    """Return the bytes of a SentencePiece piece: `▁` is a blank, `<0x0A>` a single byte."""
    if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece):
        return bytes.fromhex(byte[1])
    return piece.replace("▁", " ").encode()


# Byte-level tokenizers write each byte as a character: itself where it is printable, and
# those that are not as the characters from 256 on, in order.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


def _byte_level(token: str) -> bytes:
    """Return the bytes of a byte-level token, or of an added token, which is written as it is."""
    if all(char in _BYTE_OF for char in token):
        return bytes(_BYTE_OF[char] for char in token)
    return token.encode()


@dataclass(frozen=True)
class Choice:
    """How greedy tokens are chosen, and where a text ends besides its end tokens and its limit.

    The penalties are those of ops/penalties.py; by default everything is off.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stops: StopTexts | None = None

    @property
    def _penalized(self) -> bool:
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0

    def slowly(self, logits: Tensor, ids: list[int]) -> int:
        """Return the token to follow a text's ids, from the logits (V,) after them."""
        if self._penalized:
            penalties = self.repetition_penalty, self.no_repeat_ngram_size
            logits = penalize_slowly(logits, ids, *penalties)
        return int(logits.argmax())

    def cache(
        self,
        layers: int,
        shape: tuple[int, int, int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> TextCache:
        """Return a KVCache of that shape (B, K, S, D) that chooses tokens in this way."""
        penalties = None
        if self._penalized:
            options = self.repetition_penalty, self.no_repeat_ngram_size
            penalties = Penalties(*options, rows=shape[0], slots=shape[2], device=device)
        return TextCache(penalties, layers, shape, device, dtype)

    def ending(self, tokens: list[int], eos_ids: Sequence[int], limit: int) -> str | None:
        """Return how a text ends with the last of its tokens, or None if it does not.

        "end" is by an end token, "turn" by a stop text: the model began the next turn. "limit" is
        by the number of tokens.
        """
        if tokens[-1] in eos_ids:
            return "end"
        if self.stops is not None and self.stops.found(tokens):
            return "turn"
        return "limit" if len(tokens) == limit else None

    def shown(self, text: str, ended: str) -> str:
        """Return a text without the next turn that its model began, if it ended so."""
        return self.stops.cut(text) if ended == "turn" else text


PLAIN = Choice()  # the token with the greatest logit, and nothing else
