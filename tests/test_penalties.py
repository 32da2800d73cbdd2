"""ops/penalties.py: the repetition penalty and n-grams, against transformers' and the slow way."""

from itertools import product

import pytest
import torch
from helpers import CPU, LLAMA, generate, random_prompts, write_model
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from llama import compile_layers
from models.stops import PLAIN, Choice
from ops.penalties import Penalties, penalize_slowly
from summarize import Generator, generate_slowly

OPTIONS = [(1.0, 2), (1.3, 0), (1.2, 3), (0.7, 0), (1.1, 1)]  # repetition penalty, n-gram
CHOSEN = pytest.mark.parametrize("options", OPTIONS, ids=str)


def processed(logits, ids, repetition, ngram):
    """transformers' logits (V,) after a text's ids."""
    ids, scores = torch.tensor([ids]), logits[None].float()
    if repetition != 1:
        scores = RepetitionPenaltyLogitsProcessor(repetition)(ids, scores)
    if ngram:
        scores = NoRepeatNGramLogitsProcessor(ngram)(ids, scores)
    return scores[0]


def looping_texts(n, vocabulary, seed=0):
    """Texts of 1 to 40 tokens, in which many n-grams occur again."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 41, (n,), generator=generator).tolist()
    return [torch.randint(vocabulary, (k,), generator=generator).tolist() for k in lengths]


def written(model, prompts, choice, rows, eos=(2,), slots=0, until=None):
    """The continuations of prompts, by a generator with that many rows."""
    generator, found = Generator(model, rows, 24, eos, slots, choice), {}
    generator.submit(enumerate(prompts))
    while len(found) < len(prompts):
        found |= generator.step()
        if until is not None:
            until(generator)
    return [found[i] for i in range(len(prompts))]


# ---- The logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [3, 9])  # tokens that occur, of 16
def test_the_logits_are_those_of_transformers(vocabulary, dtype):
    texts = looping_texts(32, vocabulary)
    texts += [[5], [5, 5], [5, 6], [1, 2, 1, 2, 1, 2, 1]]
    lengths = torch.tensor([len(ids) for ids in texts])
    logits = torch.randn(len(texts), 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    changed = 0
    for repetition, ngram in product((1.0, 1.3, 0.5), range(6)):
        expected = [processed(*pair, repetition, ngram) for pair in zip(logits, texts, strict=True)]
        penalties = Penalties(repetition, ngram, len(texts), 48, CPU)
        penalties.begin(0, texts)
        found = penalties.apply(logits, lengths)
        assert found.dtype == torch.float32
        assert torch.equal(found, torch.stack(expected))
        changed += not torch.equal(found, logits.float())

        slowly = [
            penalize_slowly(*pair, repetition, ngram) for pair in zip(logits, texts, strict=True)
        ]
        assert torch.equal(torch.stack(slowly), found)
        # A row alone, wherever it is.
        backwards = list(range(len(texts)))[::-1]
        assert torch.equal(
            penalties.apply(logits.flip(0), lengths.flip(0), backwards).flip(0), found
        )
        assert torch.equal(penalties.apply(logits[3:4], lengths[3:4], [3]), found[3:4])
    assert changed == 17  # of 18, all but the one with both off


def test_a_text_that_grows_moves_and_is_followed_by_another():
    (text,) = looping_texts(1, 4, seed=5)
    text, logits = text + looping_texts(1, 4, seed=6)[0], torch.randn(1, 8)
    penalties = Penalties(1.4, 2, 3, 2, CPU)
    penalties.begin(0, [[7, 6], [1, 3]])  # what was in the rows before
    penalties.begin(1, [text[:2]])
    row = 1
    for n in range(2, len(text)):
        penalties.grow(n + 1)
        token, position = torch.tensor([0] * row + [text[n]]), torch.tensor([0] * row + [n])
        penalties.append(token, position)
        penalties.append(token, position)  # as the warm-up of a graph does
        if n == 5:
            penalties.move(1, 0)
            row = 0
        elif n == 9:
            penalties.shrink(1)
        found = penalties.apply(logits, torch.tensor([n + 1]), [row])
        assert torch.equal(found[0], processed(logits[0], text[: n + 1], 1.4, 2))
    assert row == 0
    assert penalties.history.shape == (1, len(text))


def test_new_slots_of_a_short_text_beside_a_long_one():
    texts, logits = [[5], [1, 2, 3, 1, 2, 4]], torch.randn(2, 8)
    penalties = Penalties(1.4, 2, 2, 3, CPU)
    penalties.begin(0, [ids[:3] for ids in texts])
    penalties.grow(9)
    for n in (3, 4, 5):
        penalties.append(torch.tensor([5, texts[1][n]]), torch.tensor([0, n]))
    found = penalties.apply(logits, torch.tensor([1, 6]))
    expected = [processed(*pair, 1.4, 2) for pair in zip(logits, texts, strict=True)]
    assert torch.equal(found, torch.stack(expected))


# ---- Generation


@CHOSEN
def test_greedy_ids_equal_transformers_generate(architecture, folder, tiny, options):
    reference = architecture.reference.from_pretrained(folder).eval()
    prompts, eos = random_prompts(5, 61, 23, 40, 8, 33), architecture.eos
    prompts.append(prompts[0] * 4)  # the prompt counts, so the first token is another one too
    names = {"repetition_penalty": options[0], "no_repeat_ngram_size": options[1]}
    common = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 1}
    expected = []
    for ids in prompts:  # one by one, since transformers would penalize padding too
        row = reference.generate(torch.tensor([ids]), **names, **common)[0, len(ids) :].tolist()
        expected.append(row[: row.index(eos)] if eos in row else row)

    choice = Choice(*options)
    assert [generate_slowly(tiny, ids, 24, [eos], choice) for ids in prompts] == expected
    assert expected != [generate_slowly(tiny, ids, 24, [eos]) for ids in prompts]
    for rows in (7, 3, 1):
        assert written(tiny, prompts, choice, rows, [eos]) == expected


def test_the_first_token_is_penalized_too(tiny):
    prompt, left = [i for i in range(640) if i not in (17, 400)], (17, 400)
    prompt = [prompt[7 * i % len(prompt)] for i in range(len(prompt))]
    assert generate_slowly(tiny, prompt, 1, [])[0] not in left
    generator = Generator(tiny, 1, 2, [], choice=Choice(no_repeat_ngram_size=1))
    generator.submit([("a", prompt)])
    ((_, tokens),) = [*generator.step(), *generator.step()]
    assert sorted(tokens) == sorted(left)


@CHOSEN
def test_memory_that_runs_out_and_prompts_that_need_more_room(tiny, options):
    prompts, choice = random_prompts(8, 12, 9, 15, 30, 11, 90, 14), Choice(*options)
    expected = [generate_slowly(tiny, ids, 24, [2], choice) for ids in prompts]
    sizes, steps = set(), []

    def shrink_once(generator):
        sizes.add(generator.cache.slots)
        steps.append(len(generator.rows))
        if len(steps) == 9:
            generator.shrink()

    assert written(tiny, prompts, choice, 4, until=shrink_once) == expected
    assert len(sizes) > 1
    assert steps[8] > max(steps[9:])


def test_without_penalties_nothing_is_kept(tiny):
    for choice, off in ((PLAIN, True), (Choice(1.0, 0), True), (Choice(1.1), False)):
        assert (Generator(tiny, 2, 8, [2], 64, choice).cache.penalties is None) == off


# ---- On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@CHOSEN
@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_step_equals_the_obvious_way(tmp_path, options, compiled):
    torch.backends.cuda.matmul.allow_tf32 = False
    write_model(tmp_path, hidden_size=128)
    slow, fast = (LLAMA.load(tmp_path, d, torch.float32) for d in (CPU, torch.device("cuda", 0)))
    prompts, choice = random_prompts(*range(4, 250, 17)), Choice(*options)
    expected = [generate_slowly(slow, ids, 24, [2], choice) for ids in prompts]
    assert expected != generate(slow, prompts, 24, [2])
    if compiled:
        compile_layers(fast)
    graphs = []
    found = written(fast, prompts, choice, 6, slots=64, until=lambda g: graphs.append(g.graph))
    assert found == expected
    assert any(graph is not None for graph in graphs)
