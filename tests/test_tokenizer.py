"""models/tokenizer.py: texts to ids and back, with both kinds of tokenizer file."""

import sys

import pytest
import tokenizers
from conftest import SHARED, needs_shared

import trsr
from llama import CheckpointError
from models.chat import Plain
from models.tokenizer import Tokenizer
from prepare.domains import DOMAINS


def test_sentencepiece_and_fast_tokenizer_give_the_same_ids(tmp_path, model_folder, monkeypatch):
    from transformers import LlamaTokenizerFast

    texts = ["Title: blue lamp", "### User:\nHello\n\n### Assistant:\nYes", "naïve £5 ☃", ""]
    slow, folder = Tokenizer(model_folder, 640), tmp_path / "fast"
    folder.mkdir()
    options = {"legacy": True, "add_bos_token": True}
    LlamaTokenizerFast.from_pretrained(model_folder, **options).save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    fast = Tokenizer(folder, 640)
    assert fast.encode(texts) == slow.encode(texts)
    assert [ids[0] for ids in fast.encode(texts)] == [1] * 4
    assert slow.decode(slow.encode(texts)[1]) == texts[1]
    assert 2 not in fast.encode(["a </s> b"])[0][1:]
    assert 2 not in slow.encode(["a </s> b"])[0]
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CheckpointError, match="pip install"):
        Tokenizer(folder, 640)


def test_a_byte_level_tokenizer_without_a_first_token(tmp_path, pythia_folder):
    tokenizer = Tokenizer(pythia_folder, 640)
    assert tokenizer.fast.get_vocab_size() == 600  # the other rows are padding
    prompt = "### User:\nTitle: blue lamp\n\n### Assistant:\nYes"
    texts = [prompt, "naïve £5 ☃", "a <|endoftext|> b", ""]
    ids = tokenizer.encode(texts)
    assert [tokenizer.decode(row) for row in ids] == texts
    # Neither before a text nor for a special token that is written out in one.
    assert not any(0 in row for row in ids)
    assert ids[-1] == []
    for domain in DOMAINS.values():
        yes, no = trsr.answer_ids(Plain(tokenizer).encode, domain)
        assert (tokenizer.decode([yes]), tokenizer.decode([no])) == ("Yes", "No")
    for rows in (599, 600 + 512):
        message = f"600 pieces, but the model's embedding has {rows} rows"
        with pytest.raises(CheckpointError, match=message):
            Tokenizer(pythia_folder, rows)
    Tokenizer(pythia_folder, 600 + 411)  # as many rows as Pythia-12b has to spare

    # The file's own padding and truncation are not wanted here.
    asking = tokenizer.fast
    asking.enable_padding(length=64)
    asking.enable_truncation(8)
    asking.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path, 640).encode(texts) == ids


def test_bad_tokenizers_are_named(tmp_path, model_folder):
    with pytest.raises(CheckpointError, match=r"no tokenizer.model or tokenizer.json"):
        Tokenizer(tmp_path, 640)
    (tmp_path / "tokenizer.model").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Tokenizer(tmp_path, 640)
    for size in (639, 1152):
        message = f"640 pieces, but the model's embedding has {size} rows"
        with pytest.raises(CheckpointError, match=message):
            Tokenizer(model_folder, size)


@needs_shared
def test_the_real_llama2_tokenizer_equals_transformers():
    from transformers import LlamaTokenizer

    folder = SHARED / "tokenizers" / "llama2"
    ours = Tokenizer(folder, 32000)
    theirs = LlamaTokenizer.from_pretrained(folder, legacy=True, add_bos_token=True)
    rows = (SHARED / "data" / "mind" / "news.tsv").read_text().splitlines()[:300]
    texts = [row.split("\t")[3] for row in rows]
    texts += ["### User:\nx\n\n### Assistant:\nYes", "é ☃ \t tab"]
    assert ours.encode(texts) == [theirs(text)["input_ids"] for text in texts]


@needs_shared
def test_yes_and_no_on_the_real_llama2_tokenizer():
    tokenizer = Tokenizer(SHARED / "tokenizers" / "llama2", 32000)
    for domain in DOMAINS.values():
        assert trsr.answer_ids(Plain(tokenizer).encode, domain) == (8241, 3782)


def fast_folder(model_folder, folder, **options):
    """Save the model's tokenizer as a tokenizer.json."""
    from transformers import LlamaTokenizerFast

    folder.mkdir()
    options = {"legacy": True, "add_bos_token": True} | options
    LlamaTokenizerFast.from_pretrained(model_folder, **options).save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    return folder


def test_what_a_post_processor_puts_behind_a_text_is_left_out(tmp_path, model_folder):
    plain = Tokenizer(fast_folder(model_folder, tmp_path / "plain"), 640)
    folder = fast_folder(model_folder, tmp_path / "eos")
    processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.post_processor = processor
    own.save(str(folder / "tokenizer.json"))
    assert own.encode("blue lamp").ids[-1] == 2
    texts = ["blue lamp", "### Assistant:\n", ""]
    assert Tokenizer(folder, 640).encode(texts) == plain.encode(texts)


def test_ids_beyond_the_pieces_are_passed_over(tmp_path, model_folder):
    for tokenizer in (
        Tokenizer(model_folder, 650),
        Tokenizer(fast_folder(model_folder, tmp_path / "fast"), 650),
    ):
        (ids,) = tokenizer.encode(["blue lamp"])
        assert tokenizer.decode([*ids, 645, 649]) == "blue lamp"


@pytest.mark.parametrize(
    ("of_model", "expected"),
    [((2,), [2]), ((1,), [1, 2]), ((), [2]), ((-1,), [2]), ((32000,), [2]), ((2, 7), [2, 7])],
)
def test_the_tokenizer_s_end_token_ends_a_text_too(tmp_path, model_folder, of_model, expected):
    fast = Tokenizer(fast_folder(model_folder, tmp_path / "fast"), 640)
    for tokenizer in (Tokenizer(model_folder, 640), fast):
        assert tokenizer.end_ids(of_model) == expected
