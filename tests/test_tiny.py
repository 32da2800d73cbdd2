"""models/tiny and experiments/tiny: a sound checkpoint whose training kept away from the demo."""

import json
import random
from itertools import islice

import pytest
import torch
from helpers import CPU, TINY_MODEL
from transformers import LlamaForCausalLM

import trsr
from experiments.tiny import corpus, make, measure, questions, summaries
from llama import load_config, load_model
from models.chat import Plain
from models.tokenizer import Tokenizer
from prepare.shop import make_shop, one_of


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY_MODEL, load_config(TINY_MODEL).vocab_size)


@pytest.fixture(scope="module")
def texts():
    return list(islice(corpus.texts(0, brief=0.5), 300))


# ---- The checkpoint


def test_logits_equal_transformers(tokenizer):
    theirs = LlamaForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()
    ours = load_model(TINY_MODEL, CPU, torch.float32)
    shown = "none", summaries.DOMAIN, "", [], ["Title: a lamp; Color: blue"]
    ids = torch.tensor(Plain(tokenizer).encode(trsr.recommendation_prompts(*shown)))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


def test_size_parameters_and_config():
    assert sum(path.stat().st_size for path in TINY_MODEL.iterdir() if path.is_file()) < 12e6
    model = load_model(TINY_MODEL, CPU, torch.float32)
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 6e6
    assert json.loads((TINY_MODEL / "config.json").read_text()) == make.CONFIG
    assert model.config.eos_token_id == (2,)


def test_answers_and_the_words_of_the_shop_are_single_pieces(tokenizer):
    yes, no = trsr.answer_ids(Plain(tokenizer).encode, summaries.DOMAIN)
    assert [tokenizer.decode([i]) for i in (yes, no)] == ["Yes", "No"]
    for word in [*(word for words in summaries.WORDS.values() for word in words), "Yes", "No"]:
        assert len(tokenizer.pieces.encode(word)) == 1, word
    odd = "naïve  «Übung» 東京\n\n 12,50"
    assert tokenizer.decode(tokenizer.encode([odd])[0]) == odd


# ---- The text that it was trained on


def test_text_depends_on_the_seed_alone(texts):
    assert list(islice(corpus.texts(0, brief=0.5), 300)) == texts
    assert list(islice(corpus.texts(1, brief=0.5), 300)) != texts


def test_text_has_neither_the_recommendation_prompt_nor_products_of_the_demo(texts):
    shop = make_shop(0, 3000)
    titles = {product.attributes["Title"] for product in shop.products.values()}
    assert not {0, measure.SHOP} & set(corpus.SHOPS)
    for text in texts:
        whole = "".join(prompt + answer for prompt, answer in text)
        for header in ("[Next Item]", "[Historical Items]", "[Preference Summary]"):
            assert header not in whole
        assert summaries.DOMAIN.recommend not in whole
        assert not any(title in whole for title in titles)


def test_no_claim_states_the_rule_by_which_users_choose():
    rng, shop = random.Random(0), make_shop(3, 2000)
    claims = [questions.make_claim(rng, questions.make_scene(rng, shop))[0] for _ in range(400)]
    tasteful = [claim for claim in claims if "brand, color" in claim]
    assert tasteful
    assert not any(", and " in claim or ", or " in claim for claim in tasteful)


def test_a_summary_counts_and_names_what_stands_out():
    rng, shop = random.Random(0), make_shop(3, 2000)
    block = [one_of(rng, list(shop.products.values())) for _ in range(5)]
    memory = summaries.Memory.of(block)
    again = summaries.Memory.joined([memory, memory])
    assert sum(memory.counts["color"].values()) == 5
    for fact in summaries.FACTS:
        assert all(again.counts[fact][word] == 2 * n for word, n in memory.counts[fact].items())
    assert str(memory).endswith(f"now {block[-1].category}.")
    liked = {word for words in memory.liked().values() for word in words}
    assert measure.named(str(memory)) == liked | {memory.now}


def test_weights_of_a_text(tokenizer):
    text = [("### User:\nx\n\n### Assistant:\n", "Yes"), ("\n\nmore\n", "a lamp")]
    ids, weights = make.encode(text, tokenizer)
    answers = [i for i, w in zip(ids, weights, strict=True) if w > make.PROMPT_WEIGHT]
    # A piece decoded alone loses its blank.
    pieces = [tokenizer.decode([i]) for i in answers]
    assert "".join(pieces).replace(" ", "") == "Yesalamp"
    assert (ids[-1], weights[-1]) == (2, 1.0)
    assert [w for w in weights if w == make.VERDICT_WEIGHT] == [make.VERDICT_WEIGHT]


# ---- What it can do


@pytest.mark.parametrize("paradigm", list(measure.PARADIGMS))
def test_summaries_of_unseen_users_name_their_tastes(paradigm):
    users = measure.make_users(20)
    found, wrong = measure.shares(users, measure.summarize(TINY_MODEL, users, paradigm, CPU))
    assert found > 0.85
    assert wrong < 0.05


def test_questions_about_unseen_products_are_answered():
    right, frequent = measure.answered(TINY_MODEL, questions.taste_claim, 12, CPU)
    assert frequent < 0.75
    assert right > 0.9
