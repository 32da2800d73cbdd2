"""The tokenizer inside of a GGUF file, as the files that a checkpoint's folder has.

llama.cpp keeps a list of tokens with types, merges or scores, and the name of the rule that cuts
a text into words. A rule not listed here is an InputError: with another one, the ids are wrong.
"""

import json
from pathlib import Path

from models.gguf_file import EXTRA, File
from trsr import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
DIGITS = ("smollm",)  # every digit a word of its own, then GPT-2's rule
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
GPT2 = ("gpt-2",)

# Llama 3's words: contractions, letters, up to 3 digits, punctuation, and kinds of white space.
LLAMA3_WORDS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Special tokens of these names end a text or a turn, whether or not the metadata says so.
END_NAMES = (
    *("</s>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>"),
)
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
EXTRA_SPACES = "tokenizer.ggml.remove_extra_whitespaces"


class Vocabulary:
    """The tokens of a file, their types, its special tokens and its chat template.

    rows: of the model's embedding. Raises InputError, which names what does not fit.
    """

    def __init__(self, file: File, rows: int):
        self.file = file
        self.model = file.get("tokenizer.ggml.model", str)
        self.pre = file.get("tokenizer.ggml.pre", str, None)  # the rule that cuts texts into words
        self.tokens = file.entries("tokenizer.ggml.tokens", str)
        count = len(self.tokens)
        self.types = file.entries("tokenizer.ggml.token_type", int, [NORMAL] * count)
        self.template = file.get("tokenizer.chat_template", str, None)
        if count > rows:
            raise file.error(f"has {count} tokens, but token_embd.weight has {rows} rows")
        if len(self.types) != count:
            raise file.error(f"has {len(self.types)} token types for {count} tokens")
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) < count:
            twice = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            raise file.error(f"token {twice!r} is there twice")

        self.bos, self.eos = self.special("bos_token_id"), self.special("eos_token_id")
        self.unk, self.pad = self.special("unknown_token_id"), self.special("padding_token_id")
        starts = self.model == "llama" or self.pre in LLAMA3
        self.add_bos = file.get("tokenizer.ggml.add_bos_token", bool, starts)
        self.add_eos = file.get("tokenizer.ggml.add_eos_token", bool, False)
        needed = {"eos_token_id": self.eos} | ({"bos_token_id": self.bos} if self.add_bos else {})
        for name, i in needed.items():
            if i is None:
                raise file.error(f"metadata tokenizer.ggml.{name} is missing")

    def special(self, name: str) -> int | None:
        """Return the id of a special token by its key, None if the file has none."""
        found = self.file.get(f"tokenizer.ggml.{name}", int, None)
        if found is not None and not 0 <= found < len(self.tokens):
            what = f"tokenizer.ggml.{name} is {found}, but there are {len(self.tokens)} tokens"
            raise self.file.error(what)
        return found

    def token(self, i: int | None) -> str | None:
        """Return the text of a token, None for None."""
        return None if i is None else self.tokens[i]

    def added(self) -> list[int]:
        """Return the ids of the tokens that are no part of words: control tokens and the like."""
        return [i for i, kind in enumerate(self.types) if kind in (CONTROL, USER_DEFINED)]

    def ends(self) -> list[int]:
        """Return the ids that end a text or a turn, the file's own end token first."""
        stated = [i for name in END_KEYS if (i := self.special(name)) is not None]
        named = [i for i in self.added() if self.tokens[i] in END_NAMES]
        return list(dict.fromkeys(stated + named))


# ---- The files


def save_tokenizer(words: Vocabulary, folder: Path, context: int) -> None:
    """Write the tokenizer's files into folder. context: the model's, in tokens."""
    options = {
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": words.add_bos,
        "add_eos_token": words.add_eos,
        "bos_token": words.token(words.bos),
        "eos_token": words.token(words.eos),
        "unk_token": words.token(words.unk),
        "pad_token": words.token(words.pad),
    }
    if "tokenizer.ggml.precompiled_charsmap" in words.file.reader.fields:
        what = "its tokenizer rewrites texts (tokenizer.ggml.precompiled_charsmap)"
        raise words.file.error(f"{what}, which is not converted")
    if words.model == "gpt2":
        options |= save_byte_level(words, folder / "tokenizer.json")
    elif words.model == "llama":
        options |= save_sentencepiece(words, folder / "tokenizer.model")
    else:
        what = f"tokenizer.ggml.model is {words.model!r}"
        raise words.file.error(f"{what}, only 'gpt2' and 'llama' are converted")
    write_json(folder / "tokenizer_config.json", options)
    if words.template:
        (folder / "chat_template.jinja").write_text(words.template, "utf-8")


# ---- Byte-level BPE


def save_byte_level(words: Vocabulary, path: Path) -> dict:
    """Write tokenizer.json; return what tokenizer_config.json needs besides."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models
    except ImportError:
        raise words.file.error(f"its tokenizer needs the optional extra: {EXTRA}") from None

    if words.file.get(SPACE_PREFIX, bool, False):
        raise words.file.error(f"{SPACE_PREFIX} is not converted for 'gpt2'")
    # Added tokens at the end of the list are not the model's own, as in Llama 3's file.
    size = len(words.tokens)
    while size and words.types[size - 1] in (CONTROL, USER_DEFINED):
        size -= 1
    vocabulary = {token: i for i, token in enumerate(words.tokens[:size])}
    splitter, pairs = splits(words), merges(words)
    try:
        model = models.BPE(vocabulary, pairs, ignore_merges=words.pre in LLAMA3)
    except Exception as error:  # the package raises no narrower type
        raise words.file.error(f"tokens and merges do not fit one another ({error})") from None

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    for i in words.added():
        control = words.types[i] == CONTROL
        added = AddedToken(words.tokens[i], normalized=False, special=control)
        tokenizer.add_tokens([added])
    if words.add_bos or words.add_eos:
        tokenizer.post_processor = frame(words)
    if moved := [t for t, i in words.ids.items() if tokenizer.token_to_id(t) != i]:
        raise words.file.error(f"token {moved[0]!r} cannot keep its id {words.ids[moved[0]]}")
    tokenizer.save(str(path))

    # Not GPT2Tokenizer: transformers 5 gives that class GPT-2's rule, whatever the file has.
    return {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False}


def merges(words: Vocabulary) -> list[tuple[str, str]]:
    """Return the pairs of tokens that become one, the most frequent first."""
    found = [tuple(merge.split(" ")) for merge in words.file.entries("tokenizer.ggml.merges", str)]
    if bad := [merge for merge in found if len(merge) != 2]:
        raise words.file.error(f"tokenizer.ggml.merges has {' '.join(bad[0])!r}, expected pairs")
    return found


def splits(words: Vocabulary):
    """Return what cuts a text into words; InputError for a rule that is not converted."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    gpt2 = ByteLevel(add_prefix_space=False, use_regex=True)
    if words.pre in GPT2:
        return gpt2
    if words.pre in DIGITS:
        return Sequence([Digits(individual_digits=True), gpt2])
    if words.pre in LLAMA3:
        by_rule = Split(Regex(LLAMA3_WORDS), behavior="isolated")
        return Sequence([by_rule, ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join((*DIGITS, *LLAMA3, *GPT2))
    found = "missing" if words.pre is None else repr(words.pre)
    what = f"tokenizer.ggml.pre is {found}, only {known} are converted"
    raise words.file.error(f"{what}; take the model in Hugging Face layout instead")


def frame(words: Vocabulary):
    """Return what puts the first and the last token around a text."""
    from tokenizers.processors import TemplateProcessing

    first = [words.tokens[words.bos]] if words.add_bos else []
    last = [words.tokens[words.eos]] if words.add_eos else []
    second = [f"{token}:1" for token in (*first, "$B", *last)]
    return TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *second],
        special_tokens=[(token, words.ids[token]) for token in {*first, *last}],
    )


# ---- SentencePiece BPE


def save_sentencepiece(words: Vocabulary, path: Path) -> dict:
    """Write tokenizer.model; return what tokenizer_config.json needs besides.

    A GGUF has no more than pieces, scores and types. The rest is as in Llama's own file: texts are
    not normalized, a blank goes before them, and what is no piece becomes bytes.
    """
    try:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece import sentencepiece_model_pb2 as form
    except ImportError:
        raise words.file.error(f"its tokenizer needs the optional extra: {EXTRA}") from None

    file, model = words.file, form.ModelProto()
    scores = file.entries("tokenizer.ggml.scores", float)
    if len(scores) != len(words.tokens):
        raise file.error(f"has {len(scores)} token scores for {len(words.tokens)} tokens")
    unknown = words.types.index(UNKNOWN) if UNKNOWN in words.types else words.unk
    try:
        for token, score, kind in zip(words.tokens, scores, words.types, strict=True):
            model.pieces.add(piece=token, score=score, type=kind)
        fill_in(model.trainer_spec, words, unknown)
        model.trainer_spec.model_type = form.TrainerSpec.BPE
        rule, prefix = model.normalizer_spec, words.file.get(SPACE_PREFIX, bool, True)
        rule.name, rule.add_dummy_prefix = "identity", prefix
        rule.remove_extra_whitespaces = file.get(EXTRA_SPACES, bool, False)
        data = model.SerializeToString()
        SentencePieceProcessor(model_proto=data)
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise file.error(f"its tokens are no SentencePiece vocabulary ({error})") from None

    path.write_bytes(data)
    options = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": prefix}
    return options | {
        "unk_token": words.token(unknown),
        "added_tokens_decoder": {str(i): described(words, i) for i in (*words.added(), unknown)},
    }


def fill_in(spec, words: Vocabulary, unknown: int | None) -> None:
    """Set the fields of a trainer_spec that say which pieces are special."""
    spec.vocab_size, spec.byte_fallback = len(words.tokens), BYTE in words.types
    for name, i in (("unk", unknown), ("bos", words.bos), ("eos", words.eos), ("pad", words.pad)):
        setattr(spec, f"{name}_id", -1 if i is None else i)
        if i is not None:
            setattr(spec, f"{name}_piece", words.tokens[i])


def described(words: Vocabulary, i: int) -> dict:
    """Return a token as tokenizer_config.json describes one that is no part of words."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    special = words.types[i] != USER_DEFINED
    return {"content": words.tokens[i]} | flags | {"special": special}


def write_json(path: Path, value: dict) -> None:
    """Write value to path."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")
