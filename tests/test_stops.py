"""models/stops.py: where stop texts end a text, against transformers and the plain way."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import LLAMA, random_prompts
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

from batches.tasks import Writer
from models.chat import Plain
from models.stops import Choice, StopTexts, token_bytes
from models.tokenizer import Tokenizer
from summarize import Generator, generate_slowly

VARIED = Choice(repetition_penalty=1.3)  # random models write the same again and again without
STOPS = ["### User:", "\n\n", "é☃", "Title: b", " lamp"]


@pytest.fixture
def tokenizer(folder):
    """The tokenizer of each architecture in turn: SentencePiece, and byte-level BPE."""
    return Tokenizer(folder, 640)


@pytest.fixture
def peer(architecture, folder, tokenizer):
    """transformers' tokenizer for the same pieces."""
    if architecture is LLAMA:
        return LlamaTokenizerFast.from_pretrained(folder)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.fast)


def spellings(tokenizer, text, rng):
    """Token ids of a text whose bytes are shared out at random."""
    pieces = {}
    for i, piece in enumerate(token_bytes(tokenizer)):
        pieces.setdefault(piece, []).append(i)
    rest, ids = text.encode(), []
    while rest:
        size = rng.choice([n for n in range(1, len(rest) + 1) if rest[:n] in pieces])
        ids.append(rng.choice(pieces[rest[:size]]))
        rest = rest[size:]
    return ids


def first_end(tokens, found):
    """How many tokens there are when `found` is first true of them, or None."""
    return next((n for n in range(1, len(tokens) + 1) if found(tokens[:n])), None)


# ---- Tokens


def test_a_stop_text_is_found_however_its_tokens_share_it_out(tokenizer):
    rng, lengths = random.Random(0), Counter()
    for stop in STOPS:
        stops = StopTexts(tokenizer, ["absent", stop])
        for _ in range(60):
            before = spellings(tokenizer, "A kettle: naïve £5 #", rng)
            ids = spellings(tokenizer, stop, rng)
            lengths[len(ids)] += 1
            assert first_end(before + ids, stops.found) == len(before) + len(ids)
            behind = before + ids + spellings(tokenizer, "x", rng)
            assert stops.cut(tokenizer.decode(behind)) == "A kettle: naïve £5 #"
    assert len(lengths) > 6


def test_it_is_found_within_a_token(tokenizer):
    pieces = token_bytes(tokenizer)
    (long,) = [i for i, piece in enumerate(pieces) if piece in (b" Assistant", b" notebook")][:1]
    inner = pieces[long][2:-1].decode()
    stops = StopTexts(tokenizer, [inner])
    before = tokenizer.encode(["The"])[0]
    assert not stops.found(before)
    assert stops.found([*before, long])
    assert stops.cut(tokenizer.decode([*before, long])) == f"The {pieces[long][1:2].decode()}"


def test_random_tokens_end_where_transformers_ends_them(tokenizer, peer):
    generator = torch.Generator().manual_seed(0)
    rng, ends = random.Random(1), Counter()
    for _ in range(120):
        texts = rng.sample(["e", "er", "in", "a ", "\n", "or\n", "ĉ", "é", " t", "th", "##"], 2)
        stops, criterion = StopTexts(tokenizer, texts), StopStringCriteria(peer, texts)
        tokens = torch.randint(3, 600, (14,), generator=generator).tolist()
        expected = first_end(tokens, lambda ids, c=criterion: bool(c(torch.tensor([ids]), None)))
        assert first_end(tokens, stops.found) == expected, texts
        ends[expected] += 1
    assert ends[None] > 10
    assert len(ends) > 6


def test_a_special_token_and_rows_without_a_piece(tokenizer, architecture):
    special = {"llama": ("</s>", 2), "neox": ("<|padding|>", 1)}[architecture.name]
    stops = StopTexts(tokenizer, [special[0]])
    tokens = [*spellings(tokenizer, "lamp", random.Random(0)), special[1]]
    assert first_end(tokens, stops.found) == len(tokens)
    assert stops.cut(tokenizer.decode(tokens)) == "lamp"
    stops = StopTexts(tokenizer, ["ab"])
    assert not stops.found([639 if tokenizer.size < 640 else 3])
    a, b = (spellings(tokenizer, letter, random.Random(0)) for letter in "ab")
    assert stops.found([*a, 10_000, *b])  # as it is decoded


# ---- Texts


def test_the_text_is_cut_at_the_first_stop_text(tokenizer):
    stops = StopTexts(tokenizer, ["\n### User:", "END"])
    assert stops.cut("Likes lamps. \n\n### User:\nmore END") == "Likes lamps."
    assert stops.cut("Likes END\n### User:") == "Likes"
    assert stops.cut("END") == ""
    with pytest.raises(ValueError, match="would end every text"):
        StopTexts(tokenizer, ["END", ""])


def test_one_that_begins_with_a_blank_may_begin_the_text(tokenizer):
    stops = StopTexts(tokenizer, [" END"])
    tokens = spellings(tokenizer, " END", random.Random(0))
    assert stops.found(tokens)
    assert stops.cut(tokenizer.decode(tokens)) == ""


def test_no_stop_texts_end_nothing(tokenizer):
    assert not any(StopTexts(tokenizer, []).found([i]) for i in range(640))


# ---- Generation


def stop_texts_of(tokenizer, texts):
    """Pieces of texts that their models wrote: in the middle of tokens, and over several."""
    found = []
    for tokens in texts[:3]:
        # The longest part that is text, since random models write bytes of no character too.
        shown = max(tokenizer.decode(tokens).split("\ufffd"), key=len)
        found.append(shown[1:][:6])
    return [stop for stop in found if stop.strip()]


def test_generation_ends_where_transformers_does(architecture, folder, tiny, tokenizer, peer):
    reference, eos = architecture.reference.from_pretrained(folder).eval(), architecture.eos
    prompts = random_prompts(5, 61, 23, 40, 8, 33, 12)
    free = [generate_slowly(tiny, ids, 24, [eos], VARIED) for ids in prompts]
    texts = stop_texts_of(tokenizer, free)
    assert len(texts) > 1
    options = {"stop_strings": texts, "tokenizer": peer, "pad_token_id": 1}
    options |= {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.3}
    expected, ends = [], []
    for ids in prompts:
        row = reference.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        expected.append(row[: row.index(eos)] if eos in row else row)
        stopped = any(text in tokenizer.decode(row) for text in texts)
        ends.append("end" if eos in row else "turn" if stopped else "limit")
        assert len(row) == 24 or ends[-1] != "limit"
    assert set(ends) >= {"turn", "limit"}

    choice = replace(VARIED, stops=StopTexts(tokenizer, texts))
    assert [generate_slowly(tiny, ids, 24, [eos], choice) for ids in prompts] == expected
    for rows in (7, 3, 1):
        generator, found = Generator(tiny, rows, 24, [eos], choice=choice), []
        generator.submit(enumerate(prompts))
        while len(found) < len(prompts):
            found += generator.step()
        found.sort(key=lambda row: row.key)
        assert [row.tokens for row in found] == expected
        assert [row.ended for row in found] == ends


def test_the_writer_cuts_the_texts_and_counts_how_they_ended(architecture, tiny, tokenizer):
    messages = ["blue lamp", "### User", "a kettle, an oven glove", "Title: quilt; Color: amber"]
    form, free = Plain(tokenizer), []
    for ids in form.encode(messages):
        free.append(generate_slowly(tiny, ids, 16, [architecture.eos], VARIED))
    texts = stop_texts_of(tokenizer, free)
    choice, ends = replace(VARIED, stops=StopTexts(tokenizer, texts)), [free[3][4]]

    writer = Writer(Generator(tiny, 2, 16, ends, choice=choice), form)
    keys = [("ann", 0), ("ben", 0), ("ann", 1), ("ben", 1)]
    writer.submit(list(zip(keys, messages, strict=True)), first=False)
    answers = {}
    while len(answers) < len(keys):
        answers |= writer.finished()

    counted = {"ann": Counter(), "ben": Counter()}
    for key, tokens in zip(keys, free, strict=True):
        end = first_end(tokens, lambda ids: ids[-1] in ends) or 99
        stop = first_end(tokens, lambda ids: any(text in tokenizer.decode(ids) for text in texts))
        if stop is not None and stop < end:
            shown, how = tokenizer.decode(tokens), "turn"
            shown = shown[: min(shown.find(text) for text in texts if text in shown)].rstrip()
        else:
            shown, how = tokenizer.decode(tokens[: end - 1]), "limit" if end == 99 else "end"
        assert answers[key] == shown
        counted[key[0]][how] += 1
    assert dict(writer.ends) == counted
    assert (counted["ann"] + counted["ben"]).keys() >= {"turn", "end"}
