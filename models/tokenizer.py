"""Texts to token ids and back."""

from pathlib import Path

import sentencepiece

from llama import CheckpointError, read_json_file


class Tokenizer:
    """Texts to ids and back, from SentencePiece's tokenizer.model or, with the optional extra, tokenizer.json.

    Special tokens that are written out in a text, such as `</s>`, are encoded as plain text.
    """

    def __init__(self, folder: Path, vocab_size: int):
        self.pieces = self.fast = None
        path, options = folder / "tokenizer.model", folder / "tokenizer_config.json"
        try:
            if path.is_file():
                self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
                add_bos = read_json_file(options).get("add_bos_token", True) if options.is_file() else True
                self.bos = [self.pieces.bos_id()] if add_bos and self.pieces.bos_id() >= 0 else []
                size = self.pieces.vocab_size()
            elif (path := folder / "tokenizer.json").is_file():
                import tokenizers

                self.fast = tokenizers.Tokenizer.from_file(str(path))
                self.fast.encode_special_tokens = True
                self.fast.no_padding()  # the file may ask for it
                self.fast.no_truncation()
                size = self.fast.get_vocab_size(with_added_tokens=True)
            else:
                raise CheckpointError(f"{folder}: no tokenizer.model or tokenizer.json; copy the model's own there")
        except ImportError:
            need = "needs the optional extra: pip install 'llm-trsr[tokenizers]', or pip install tokenizers"
            raise CheckpointError(f"{path}: {need}") from None
        except CheckpointError:
            raise
        except Exception as error:  # the two packages raise no narrower type for a broken file
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from None
        # Embeddings may have a few more rows than the tokenizer has pieces: padding, or an added token.
        if not size <= vocab_size < size + 512:
            raise CheckpointError(f"{path}: {size} pieces, but the model's embedding has {vocab_size} rows")

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return each text's ids, with the beginning-of-text token where the model has one."""
        if self.fast is not None:
            return [encoding.ids for encoding in self.fast.encode_batch(texts)]
        return [self.bos + ids for ids in self.pieces.encode(texts)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return self.pieces.decode(ids) if self.fast is None else self.fast.decode(ids)
