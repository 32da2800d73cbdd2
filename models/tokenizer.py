"""Texts to token ids and back."""

from pathlib import Path

import sentencepiece

from llama import CheckpointError, read_json_file

PADDING = 512  # rows that an embedding may have beyond the tokenizer's pieces


class Tokenizer:
    """SentencePiece's tokenizer.model or, with the optional extra, tokenizer.json.

    Special tokens written out in a text, such as `</s>`, are encoded as plain text. Raises
    CheckpointError for a folder without a usable tokenizer.
    """

    def __init__(self, folder: Path, vocab_size: int):
        self.pieces = self.fast = None
        path = folder / "tokenizer.model"
        if not path.is_file():
            path = folder / "tokenizer.json"
        if not path.is_file():
            what = "no tokenizer.model or tokenizer.json"
            raise CheckpointError(f"{folder}: {what}; copy the model's own there")
        try:
            size = self._open(path)
        except ImportError:
            way = "pip install 'llm-trsr[tokenizers]', or pip install tokenizers"
            raise CheckpointError(f"{path}: needs the optional extra: {way}") from None
        except CheckpointError:
            raise
        except Exception as error:  # the two packages raise no narrower type for a broken file
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from None

        # Embeddings may have a few rows more: padding, or an added token.
        if not size <= vocab_size < size + PADDING:
            what = f"{size} pieces, but the model's embedding has {vocab_size} rows"
            raise CheckpointError(f"{path}: {what}")

    def _open(self, path: Path) -> int:
        """Open the tokenizer in path and return its number of pieces."""
        if path.name == "tokenizer.model":
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
            options = path.with_name("tokenizer_config.json")
            add_bos = True
            if options.is_file():
                add_bos = read_json_file(options).get("add_bos_token", True)
            bos = self.pieces.bos_id()
            self.bos = [bos] if add_bos and bos >= 0 else []
            return self.pieces.vocab_size()

        import tokenizers

        self.fast = tokenizers.Tokenizer.from_file(str(path))
        self.fast.encode_special_tokens = True
        self.fast.no_padding()  # the file may ask for padding and truncation
        self.fast.no_truncation()
        return self.fast.get_vocab_size(with_added_tokens=True)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return each text's ids, after the beginning-of-text token if the model has one."""
        if self.fast is not None:
            return [encoding.ids for encoding in self.fast.encode_batch(texts)]
        return [self.bos + ids for ids in self.pieces.encode(texts)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens."""
        return self.pieces.decode(ids) if self.fast is None else self.fast.decode(ids)
