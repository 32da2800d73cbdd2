"""batches/positions.py: every position a target, and nothing of what follows in any prompt."""

import itertools
import re
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from helpers import run, write_dataset

import trsr
from batches.positions import (
    ALL,
    EveryPosition,
    Targets,
    draw,
    every_block,
    positions,
)
from batches.prompts import Prompts
from bench.targets import Settings, Summaries, Trees, chosen, computed
from prepare.dataset import load_dataset
from prepare.domains import DOMAINS
from state.summaries import known_before, load_before, load_summaries
from trsr import Budget, Example, InputError, Recommender

DOMAIN = DOMAINS["products"]
ITEMS = {f"i{n}": f"Title: thing number {n}" for n in range(60)}
EXAMPLE = Example("u", [f"i{n}" for n in range(12)], "i12", ["i30", "i31"])
YES, NO = "<yes>", "<no>"


def encode(messages):
    return [re.findall(r"\s*\S+", trsr.plain_turn(message)) for message in messages]


def user(paradigm, history_items=3, before=((5, "after 5"), (10, "after 10"))):
    budget = Budget(100_000, encode, Counter())
    summaries = {"u": "after all"} if paradigm in trsr.SUMMARIZED else {}
    shown = paradigm, DOMAIN, ITEMS, summaries, history_items, budget
    targets = Targets(ALL)
    return EveryPosition(Recommender(*shown), [EXAMPLE], (YES, NO), targets, {"u": list(before)})


def prompts_of(made, index=0):
    tree, trimmed = made[index]
    assert not trimmed
    return ["".join(tokens) for tokens in tree.sequences()]


# ---- Which positions, and their negatives


def test_every_item_after_the_first_is_a_target_given_the_items_before():
    found = positions(EXAMPLE, list(ITEMS), Targets(ALL))
    assert [t for t, _ in found] == list(range(1, 13))
    assert found[-1] == (12, EXAMPLE)
    for t, past in found:
        assert past.history == [f"i{n}" for n in range(t)]
        assert past.positive == f"i{t}"
        assert len(set(past.negatives)) == 2
        assert not {*past.negatives} & {*EXAMPLE.history, "i12"}
    assert positions(EXAMPLE, list(ITEMS), Targets(ALL)) == found  # the same in every run
    assert positions(EXAMPLE, list(ITEMS), Targets(3)) == found[-3:]
    assert positions(EXAMPLE, list(ITEMS), Targets()) == found[-1:]


def test_negatives_of_the_past_alone_may_come_later():
    catalogue = [f"i{n}" for n in range(13)] + ["i30"]
    found = positions(replace(EXAMPLE, negatives=["i30"]), catalogue, Targets(ALL, past_only=True))
    drawn = {item for t, past in found for item in past.negatives if t < 12}
    assert drawn & set(EXAMPLE.history)
    assert all(item not in past.history for _, past in found for item in past.negatives)
    found = positions(replace(EXAMPLE, negatives=["i30"]), catalogue, Targets(ALL))
    assert {item for _, past in found for item in past.negatives} == {"i30"}


def test_an_item_had_before_is_no_target():
    example = replace(EXAMPLE, history=["i0", "i1", "i0", "i2"])
    assert [t for t, _ in positions(example, list(ITEMS), Targets(ALL))] == [1, 3, 4]


def test_fewer_negatives_are_the_first_ones_at_every_position():
    (fewer,) = Targets(negatives=1).limited([EXAMPLE])
    assert fewer == replace(EXAMPLE, negatives=["i30"])
    assert Targets(negatives=2).limited([EXAMPLE]) == Targets().limited([EXAMPLE]) == [EXAMPLE]
    whole = positions(EXAMPLE, list(ITEMS), Targets(ALL))
    for (t, past), (_, full) in zip(
        positions(fewer, list(ITEMS), Targets(ALL)), whole, strict=True
    ):
        assert past.positive == f"i{t}"
        assert past.negatives == full.negatives[:1]
    with pytest.raises(InputError, match=r"user 'u' has 2 negatives.*fewer than --negatives 3"):
        Targets(negatives=3).limited([EXAMPLE])


def test_too_few_items_for_negatives_are_told():
    with pytest.raises(InputError, match="14 items are too few for 2 negatives"):
        draw([f"i{n}" for n in range(14)], {f"i{n}" for n in range(13)}, 2, "seed")


# ---- What the prompts show


@pytest.mark.parametrize("paradigm", trsr.PARADIGMS)
@pytest.mark.parametrize("history_items", [0, 3])
def test_no_prompt_shows_its_target_or_anything_after_it(paradigm, history_items):
    made = user(paradigm, history_items)
    places = [(p.example, p.summary) for p in made.positions(EXAMPLE)]
    assert len(places) == 12
    for example, summary in places:
        t = len(example.history)
        seen = int(re.sub(r"\D", "", summary) or 0) if summary != "after all" else 12
        assert seen <= t
    # In the text itself: the item at t only behind the header of the candidate.
    budget = Budget(100_000, encode, Counter())
    for position in made.positions(EXAMPLE):
        t = len(position.example.history)
        for ids in made.prompts(position, budget):
            before, after = "".join(ids[:-1]).split("[Next Item]")
            shown = [int(n) for n in re.findall(r"thing number (\d+)", before)]
            assert all(n < t for n in shown)
            assert shown == list(range(t - len(shown), t))
            assert ids[-1] == (YES if f"number {t}\n" in after else NO)


def test_the_last_position_is_the_prompt_of_one_target():
    for paradigm in trsr.PARADIGMS:
        made = user(paradigm)
        alone = Prompts.to_learn(made.recommender, [EXAMPLE], (YES, NO))
        expected = {"".join(tokens) for tokens in alone[0][0].sequences()}
        assert expected < set(prompts_of(made))


def test_summaries_are_those_of_the_blocks_before_with_the_items_since():
    made = user("recurrent")
    shown = {len(p.example.history): (p.summary, p.shown) for p in made.positions(EXAMPLE)}
    assert [shown[t] for t in (1, 4)] == [("", 1), ("", 4)]
    assert [shown[t] for t in (5, 6, 9)] == [("after 5", 3), ("after 5", 4), ("after 5", 7)]
    assert [shown[t] for t in (10, 11)] == [("after 10", 3), ("after 10", 4)]
    assert shown[12] == ("after all", 3)  # as with one target


@pytest.mark.parametrize(
    ("paradigm", "share"), [("whole-history", 0.35), ("recurrent", 0.5), ("recent-only", 0.75)]
)
def test_what_prompts_share_is_computed_once(paradigm, share):
    tree, _ = user(paradigm)[0]
    apart = sum(map(len, tree.sequences()))
    assert tree.size < share * apart
    assert len(tree.leaves) == 12 * 3


# ---- Summaries of the blocks before


def answers(prompts):
    return [
        f"summary of {len(re.findall('thing', p))} things, {len(p)} characters" for p in prompts
    ]


@pytest.mark.parametrize("paradigm", [trsr.hierarchical, trsr.recurrent])
@pytest.mark.parametrize("n", [0, 4, 5, 12, 23])
def test_summaries_before_each_block_are_those_of_shorter_histories(paradigm, n):
    budget, items = Budget(100_000, encode, Counter()), list(ITEMS.values())[:n]
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        return answers(prompts)

    root = trsr.solve(every_block(paradigm, items, DOMAIN, budget, 5), generate)
    assert len(asked) == len(set(asked))  # once each
    for items_before, summary in known_before(root):
        alone = trsr.solve(paradigm(items[:items_before], DOMAIN, budget, 5), answers)
        assert summary == alone["summary"]
    assert [items_before for items_before, _ in known_before(root)] == list(range(5, n, 5))
    whole = trsr.solve(paradigm(items, DOMAIN, budget, 5), answers)
    assert {name: value for name, value in root.items() if name != "before"} == whole


def test_a_chain_has_the_summaries_before_anyway():
    budget = Budget(100_000, encode, Counter())
    items = list(ITEMS.values())[:12]
    chain = trsr.solve(trsr.recurrent(items, DOMAIN, budget, 5), answers)
    full = trsr.solve(every_block(trsr.recurrent, items, DOMAIN, budget, 5), answers)
    assert known_before(chain) == known_before(full)
    tree = trsr.solve(trsr.hierarchical(items, DOMAIN, budget, 5), answers)
    with pytest.raises(InputError, match=r"summarize\.py --every-block"):
        known_before(tree)


# ---- What they cost (bench/targets.py)


def counted_by_prefixes(sequences):
    """The tokens of sequences if each beginning that some of them share is there once."""
    return len({tuple(ids[:end]) for ids in sequences for end in range(1, len(ids) + 1)})


@pytest.mark.parametrize("paradigm", [name for name in trsr.PARADIGMS if name != "none"])
def test_computed_tokens_are_those_of_a_slow_count(paradigm):
    numbers = defaultdict(itertools.count().__next__)

    def numbered(messages):
        return [[numbers[token] for token in tokens] for tokens in encode(messages)]

    made, one_pack = user(paradigm), 10**6
    budget = Budget(100_000, numbered, Counter())
    made.recommender = replace(made.recommender, budget=budget)
    made.answers = numbers[YES], numbers[NO]
    apart, together = Trees.of(made).ways()
    rows = made.rows(EXAMPLE, budget)
    positions = [rows[i : i + 3] for i in range(0, len(rows), 3)]
    assert len(apart) == len(positions) == 12
    assert computed(together, one_pack) == counted_by_prefixes(rows)
    # In a pack, what begins all trees is there once.
    columns = zip(*rows, strict=False)
    trunk = len([*itertools.takewhile(lambda tokens: len(set(tokens)) == 1, columns)])
    counts = [counted_by_prefixes(position) - trunk for position in positions]
    assert computed(apart, one_pack) == trunk + sum(counts)


def test_the_counted_summaries_by_rule_are_those_of_experiments_ruled(tmp_path):
    data = write_dataset(tmp_path / "data", history=(6, 12))
    _, items, splits = load_dataset(data, ("train",))
    for paradigm in ("hierarchical", "recurrent"):
        folder = tmp_path / paradigm
        run("experiments.ruled.py", data=data, run=folder, paradigm=paradigm, block_size=4)
        settings = Settings(data=str(data), block_size=4)
        made = Summaries.by_rule(settings, paradigm, items, splits["train"])
        assert made.last == load_summaries(folder, items, splits["train"])
        if paradigm == "recurrent":  # the chain has those of the blocks before
            assert made.before == load_before(folder, splits["train"])
    longer = Summaries.by_rule(
        replace(settings, summary_words=40), "recurrent", items, splits["train"]
    )
    assert longer.words() == 40


def test_histories_and_negatives_to_count_are_cut_or_refused():
    settings = Settings(history=10, negatives=1, users=5)
    found = chosen(settings, [EXAMPLE, replace(EXAMPLE, history=["i1"])])
    assert found == [replace(EXAMPLE, history=EXAMPLE.history[2:], negatives=["i30"])]
    with pytest.raises(InputError, match="--history 13: no user of data/demo has as many items"):
        chosen(replace(settings, history=13), [EXAMPLE])
    with pytest.raises(InputError, match="--negatives 3: data/demo has 2; prepare it with --train"):
        chosen(replace(settings, negatives=3), [EXAMPLE])
