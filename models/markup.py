"""Control tokens as tokens, all other text as text: what keeps a turn's frame apart from its words.

A control token steers the model: a special one, such as `</s>`, or an added one that is written
like markup, such as `<tool_call>`. Added words and runs of blanks are ordinary text.
"""

import json
import re
from itertools import pairwise
from pathlib import Path

import sentencepiece

from llama import CheckpointError, read_json_file
from models.tokenizer import Tokenizer

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LIKE_MARKUP = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.DOTALL)

# Merged into a SentencePiece model, this asks for no blank before a text and for all blanks in it:
# normalizer_spec { add_dummy_prefix: false, remove_extra_whitespaces: false }
AS_IT_STANDS = b"\x1a\x04\x18\x00\x20\x00"


def is_markup(text: str) -> bool:
    """Return whether a text is written like markup: a word between signs, such as <think>."""
    return LIKE_MARKUP.fullmatch(text) is not None


def content(token: object) -> str | None:
    """Return the text of a token as the JSON files write it: a string, or an object with one."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def read_options(folder: Path, name: str = "tokenizer_config.json") -> dict:
    """Return the JSON object in a folder's file, an empty one where there is no such file."""
    path = folder / name
    return read_json_file(path) if path.is_file() else {}


def is_llama_class(folder: Path) -> bool:
    """Return whether transformers reads the folder's tokenizer by its Llama class.

    It does so if the folder names that class, or no class and the model is a Llama.
    """
    config = read_options(folder, "config.json")
    name = read_options(folder).get("tokenizer_class") or config.get("tokenizer_class")
    if not isinstance(name, str):
        return config.get("model_type") == "llama"
    return name.removesuffix("Fast") == "LlamaTokenizer"


def prefix_scheme(folder: Path) -> str:
    """Return which texts between tokens the Llama class puts a blank before.

    "always": all of them; "first": only one at the very beginning; "never".
    """
    options = read_options(folder)
    if options.get("add_prefix_space") is False:
        return "never"
    return "always" if options.get("legacy") else "first"


def named_tokens(folder: Path) -> dict[str, str]:
    """Return the tokens that a template can use by name, such as bos_token."""
    options = read_options(folder)
    if "added_tokens_decoder" not in options:  # as older folders have it
        options |= read_options(folder, "special_tokens_map.json")
    tokens = {name: content(options[name]) for name in NAMED if name in options}
    if is_llama_class(folder):  # it has names of its own, unless the folder says that there is none
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | tokens
    return {name: token for name, token in tokens.items() if token}


class Markup:
    """Splits a template's text at the control tokens, and encodes texts that must have none."""

    controls: dict[str, int]  # ids by text
    unknown: int | None  # stands for what is no token too, so a text may have it

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._open()
        self.ids = frozenset(self.controls.values()) - {self.unknown}
        texts = sorted(self.controls, key=len, reverse=True)  # the longest one that fits
        self.pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")

    def __reduce__(self):
        return type(self), (self.tokenizer,)  # a copy of the tokenizers package's loses settings

    def _open(self) -> None:
        raise NotImplementedError

    def _plain(self, texts: list[str], first: bool) -> list[list[int]]:
        raise NotImplementedError

    def split(self, text: str) -> list[str | int]:
        """Return a template's text as the ids of its control tokens and the texts between them."""
        raise NotImplementedError

    def whole(self, text: str) -> list[int]:
        """Return a template's text as ids, encoded in one go."""
        return self.join(self.split(text))

    def encode(self, texts: list[str], first: bool) -> list[list[int]]:
        """Return the ids of texts, none of which is a control token's.

        first: whether the texts stand at the very beginning, rather than behind a token.
        """
        rows = self._plain(texts, first)
        for i, row in enumerate(rows):
            if not self.ids.isdisjoint(row):
                rows[i] = self._broken(texts[i], first)
        return rows

    def _broken(self, text: str, first: bool) -> list[int]:
        """Return the ids of a text that is cut within each control token that is written out in it.

        For tokens that the tokenizer makes of plain text, however it is asked.
        """
        cuts = [0, *(match.start() + 1 for match in self.pattern.finditer(text)), len(text)]
        start, *rest = (text[a:b] for a, b in pairwise(cuts))
        rows = self._plain([start], first) + self._plain(rest, False)
        return [i for row in rows for i in row if i not in self.ids]

    def join(self, pieces: list[str | int], first: bool = True) -> list[int]:
        """Return the ids of split's pieces. first: whether they stand at the very beginning."""
        ids = []
        for n, piece in enumerate(pieces):
            ids += [piece] if isinstance(piece, int) else self.encode([piece], first and not n)[0]
        return ids


class PieceMarkup(Markup):
    """For a SentencePiece model, which takes every text for plain text."""

    def _open(self) -> None:
        folder = self.tokenizer.folder
        proto = (folder / "tokenizer.model").read_bytes()
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=proto + AS_IT_STANDS)
        self.scheme, self.unknown = prefix_scheme(folder), self.pieces.unk_id()

        own = (self.pieces.bos_id(), self.pieces.eos_id(), self.pieces.unk_id())
        found = {self.pieces.id_to_piece(i): {"id": i} for i in own if i >= 0}
        for text in named_tokens(folder).values():
            i = self.pieces.piece_to_id(text)
            if i != self.unknown:
                found[text] = {"id": i}
        found |= self._added()
        self.controls = {text: token["id"] for text, token in found.items()}
        texts = sorted(found, key=len, reverse=True)
        wide = (self._with_blanks(text, **found[text]) for text in texts)
        self.tokens = re.compile("|".join(wide) or "(?!)")

    def _added(self) -> dict[str, dict]:
        """Return the control tokens that were added to the model's pieces, by their texts."""
        folder, name = self.tokenizer.folder, "tokenizer_config.json"
        tokens = read_options(folder).get("added_tokens_decoder")
        if tokens is None:  # as older folders have it
            name, named = "added_tokens.json", named_tokens(folder).values()
            listed = read_options(folder, name).items()
            tokens = {str(i): {"content": text, "special": text in named} for text, i in listed}
        if not isinstance(tokens, dict) or not all(i.isdecimal() for i in tokens):
            raise CheckpointError(f"{folder / name}: the added tokens are not tokens by their ids")

        found = {}
        for i, token in tokens.items():
            token = token if isinstance(token, dict) else {"content": token}
            text = content(token)
            if text and (token.get("special") or is_markup(text)):
                found[text] = {"lstrip": token.get("lstrip"), "rstrip": token.get("rstrip")}
                found[text]["id"] = int(i)
        return found

    @staticmethod
    def _with_blanks(text: str, lstrip: object = None, rstrip: object = None, **_) -> str:
        """Return the pattern of a token, some of which take in the blanks beside them."""
        before, after = (r"\s*" if strip else "" for strip in (lstrip, rstrip))
        return f"{before}({re.escape(text)}){after}"

    def split(self, text: str) -> list[str | int]:
        """Return a template's text as the ids of its control tokens and the texts between them."""
        pieces, start = [], 0
        for match in self.tokens.finditer(text):
            pieces += [text[start : match.start()], self.controls[match[match.lastindex]]]
            start = match.end()
        return [piece for piece in [*pieces, text[start:]] if piece != ""]

    def _plain(self, texts: list[str], first: bool) -> list[list[int]]:
        if self.scheme == "always" or (self.scheme == "first" and first):
            texts = [t if not t or t.startswith((" ", "▁")) else f" {t}" for t in texts]
        return self.pieces.encode(texts)


class FastMarkup(Markup):
    """For a tokenizer.json, read as transformers does."""

    def _open(self) -> None:
        fast = self.tokenizer.fast
        added = fast.get_added_tokens_decoder()
        found = {t.content: i for i, t in added.items() if t.special or is_markup(t.content)}
        self.controls = found
        names = named_tokens(self.tokenizer.folder)
        unknown = getattr(fast.model, "unk_token", None)
        if unknown in (names.get("bos_token"), names.get("eos_token")):
            unknown = None  # of a tokenizer that knows every byte
        self.unknown = found.get(unknown)

        self.first = fast
        uses = [fast.pre_tokenizer, fast.normalizer]
        states = "".join(step.__getstate__().decode() for step in uses if step is not None)
        like_llama = '"Metaspace"' in states or '"Prepend"' in states
        by_class = like_llama and is_llama_class(self.tokenizer.folder)
        if by_class or not all(t.special for t in added.values() if t.content in found):
            self.first = self._changed(json.loads(fast.to_str()), by_class)
        self.inner = self.first
        if '"prepend_scheme":"first"' in states or by_class:
            here, there = (f'"prepend_scheme":"{scheme}"' for scheme in ("first", "never"))
            self.inner = self._made(self.first.to_str().replace(here, there))

    def _changed(self, record: dict, by_class: bool):
        """Return the tokenizer in which all control tokens are special, by the class's rules."""
        for token in record["added_tokens"]:
            token["special"] = token["content"] in self.controls
        if by_class:
            record["normalizer"] = None
            scheme = prefix_scheme(self.tokenizer.folder)
            step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}
            record["pre_tokenizer"] = step | {"split": False}
        return self._made(json.dumps(record))

    def _made(self, record: str):
        made = type(self.tokenizer.fast).from_str(record)
        made.encode_special_tokens = True
        return made

    def _recognized(self, text: str):
        """Return the encoding of a text whose special tokens are tokens."""
        self.first.encode_special_tokens = False
        try:
            return self.first.encode(text, add_special_tokens=False)
        finally:
            self.first.encode_special_tokens = True

    def split(self, text: str) -> list[str | int]:
        """Return a template's text as the ids of its control tokens and the texts between them."""
        pieces, start, found = [], 0, self._recognized(text)
        for i, (a, b) in zip(found.ids, found.offsets, strict=True):
            if i in self.ids or self.controls.get(text[a:b]) == i:
                pieces += [text[start:a], i]
                start = b
        return [piece for piece in [*pieces, text[start:]] if piece != ""]

    def whole(self, text: str) -> list[int]:
        """Return a template's text as ids, encoded in one go."""
        return self._recognized(text).ids

    def _plain(self, texts: list[str], first: bool) -> list[list[int]]:
        kind = self.first if first else self.inner
        return [found.ids for found in kind.encode_batch_fast(texts, add_special_tokens=False)]


def open_markup(tokenizer: Tokenizer) -> Markup:
    """Return the markup of a tokenizer of either kind."""
    return FastMarkup(tokenizer) if tokenizer.fast is not None else PieceMarkup(tokenizer)
