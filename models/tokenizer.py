"""Texts to token ids and back."""

from pathlib import Path

import sentencepiece

from llama import CheckpointError, read_json_file

PADDING = 512  # rows that an embedding may have beyond the tokenizer's pieces


class Tokenizer:
    """SentencePiece's tokenizer.model or, with the optional extra, tokenizer.json.

    Special tokens written out in a text, such as `</s>`, are encoded as plain text. A text gets the
    tokens that the model has before every text, and none behind it. Raises CheckpointError for a
    folder without a usable tokenizer.
    """

    def __init__(self, folder: Path, vocab_size: int):
        self.pieces = self.fast = None
        self.folder, self.rows = folder, vocab_size
        path = folder / "tokenizer.model"
        if not path.is_file():
            path = folder / "tokenizer.json"
        if not path.is_file():
            what = "no tokenizer.model or tokenizer.json"
            raise CheckpointError(f"{folder}: {what}; copy the model's own there")
        try:
            self.size = self._open(path)
        except ImportError:
            way = "pip install 'llm-trsr[tokenizers]', or pip install tokenizers"
            raise CheckpointError(f"{path}: needs the optional extra: {way}") from None
        except CheckpointError:
            raise
        except Exception as error:  # the two packages raise no narrower type for a broken file
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from None

        # Embeddings may have a few rows more: padding, or an added token.
        if not self.size <= vocab_size < self.size + PADDING:
            what = f"{self.size} pieces, but the model's embedding has {vocab_size} rows"
            raise CheckpointError(f"{path}: {what}")

    def __reduce__(self):
        return Tokenizer, (self.folder, self.rows)  # the packages' own copies lose settings

    def _open(self, path: Path) -> int:
        """Open the tokenizer in path and return its number of pieces."""
        if path.name == "tokenizer.model":
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
            options = path.with_name("tokenizer_config.json")
            add_bos = True
            if options.is_file():
                add_bos = read_json_file(options).get("add_bos_token", True)
            bos, eos = self.pieces.bos_id(), self.pieces.eos_id()
            self.start = [bos] if add_bos and bos >= 0 else []
            self.eos = eos if eos >= 0 else None
            return self.pieces.vocab_size()

        import tokenizers

        self.fast = tokenizers.Tokenizer.from_file(str(path))
        self.fast.encode_special_tokens = True
        self.fast.no_padding()  # the file may ask for padding and truncation
        self.fast.no_truncation()

        # A post-processor may add tokens on both sides; those before the text are the model's.
        plain, whole = (self.fast.encode("x", add_special_tokens=add).ids for add in (False, True))
        places = range(len(whole) - len(plain) + 1)
        first = next((i for i in places if whole[i : i + len(plain)] == plain), 0)
        self.start, self.eos = whole[:first], self._named_end(path)
        return self.fast.get_vocab_size(with_added_tokens=True)

    def _named_end(self, path: Path) -> int | None:
        """Return the id of the end token that tokenizer_config.json names, if it names one."""
        options = path.with_name("tokenizer_config.json")
        token = read_json_file(options).get("eos_token") if options.is_file() else None
        token = token.get("content") if isinstance(token, dict) else token
        return self.fast.token_to_id(token) if isinstance(token, str) else None

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return each text's ids, after the beginning-of-text token if the model has one."""
        if self.fast is not None:
            found = self.fast.encode_batch(texts, add_special_tokens=False)
            return [self.start + encoding.ids for encoding in found]
        return [self.start + ids for ids in self.pieces.encode(texts)]

    def end_ids(self, model_ids: tuple[int, ...]) -> list[int]:
        """Return the ids that end a text: the model's, if they are pieces, and the tokenizer's."""
        own = [] if self.eos is None else [self.eos]
        return sorted({*own, *(i for i in model_ids if 0 <= i < self.size)})

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens and ids that stand for no piece."""
        ids = [i for i in ids if i < self.size]
        return self.pieces.decode(ids) if self.fast is None else self.fast.decode(ids)
