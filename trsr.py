"""The method of LLM-TRSR (Zheng et al., WWW 2024): text in, text out.

Read this file first, from top to bottom; it follows section 4 of the paper:

    items       an item's attributes as text                                 4.1.1
    summaries   history -> blocks -> one summary, hierarchical or recurrent  4.1, 4.2
    prompts     what the model is asked, to summarize and to recommend       4.1 to 4.3
    answers     logits of Yes and No -> a probability                        equations 2, 3
    ranking     ranks -> Recall, MRR, NDCG                                   5.2.1
    budgets     what is trimmed from a prompt that is too long

It knows neither the model nor torch. A language model appears only as functions: `generate` turns
prompts into texts, `encode` turns texts into token ids.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

ANSWERS = ("Yes", "No")


class InputError(ValueError):
    """A fixable user error: one line that names the file, line or field, and a way out."""


@dataclass(frozen=True)
class Example:
    """A user: the history, oldest first, the item that came next, and items not chosen."""

    user: str
    history: list[str]
    positive: str
    negatives: list[str]


# ---- Items as text (section 4.1.1)

# The headers that are in prompts of all domains; each has two of its own besides.
MERGED, PREVIOUS = "User Preferences Summaries", "Previous Preference Summary"
SUMMARY, RECENT, NEXT = "Preference Summary", "Historical Items", "Next Item"
HEADERS = MERGED, PREVIOUS, SUMMARY, RECENT, NEXT
_CONTROL_TOKEN = re.compile(r"<(/?s|unk|pad|\|[^<>]*?\|)>", re.IGNORECASE)
# What ends a turn as plain text in some models' chat templates, such as Llama 2's.
_TURN = re.compile(r"\[ ?(/?INST) ?\]|<< ?(/?SYS) ?>>|<((?:start|end)_of_turn)>", re.IGNORECASE)


def item_text(attributes: dict[str, str], domain: "Domain") -> str:
    """Return `Title: ...; Brand: ...`: the attributes that have a text, in their order."""
    pairs = ((clean(name, domain), clean(value, domain)) for name, value in attributes.items())
    return "; ".join(f"{name}: {value}" for name, value in pairs if value) or "(no description)"


def clean(text: str, domain: "Domain") -> str:
    """Return text on one line, without anything that could pass for the prompt's own structure.

    Control characters and runs of white space become one space; `###`, a section header of the
    domain's prompts in brackets, a control token such as `</s>` and a sign of a turn such as
    `[INST]` lose the characters that make them one.
    """
    text = "".join(" " if ord(c) < 32 or 127 <= ord(c) < 160 else c for c in text)
    text = " ".join(text.split())  # a line break would end the list that the text is in
    text = _TURN.sub(lambda found: f"({found[found.lastindex]})", _CONTROL_TOKEN.sub(r"(\1)", text))
    return _headers(domain).sub(r"(\1)", re.sub(r"#{3,}", "#", text))  # last: nothing makes one now


@cache
def _headers(domain: "Domain") -> re.Pattern:
    names = "|".join(map(re.escape, (domain.history, domain.recent, *HEADERS)))
    return re.compile(rf"\[ ?({names}) ?\]", re.IGNORECASE)


def numbered(texts: Iterable[str]) -> str:
    """Return texts as a numbered list, one per line."""
    return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1)) or "(none)"


# ---- Summaries (sections 4.1 and 4.2)
#
# A paradigm is a generator for one user. It yields the prompts that it needs answered now, receives
# the answers, and returns the root of the tree of summaries. It never calls a model, so the same
# code serves one user in a loop (solve) and thousands at once (batches/tasks.py).

Node = dict  # {"summary": str} and "items": [first, end], "previous": Node, or "children": [Node]
Summarization = Generator[list[str], list[str], Node]


def solve(task: Summarization, generate: Callable[[list[str]], list[str]]) -> Node:
    """Run one user's summarization to its end: answer every prompt that it asks."""
    answers = None  # a generator starts with None
    try:
        while True:
            answers = generate(task.send(answers))
    except StopIteration as end:
        return end.value


def split_blocks(n_items: int, block_size: int) -> list[tuple[int, int]]:
    """Return the (first, end) of consecutive blocks; the last one may be shorter."""
    starts = range(0, n_items, block_size)
    return [(start, min(start + block_size, n_items)) for start in starts]


def hierarchical(
    items: list[str], domain: "Domain", budget: "Budget", block_size: int
) -> Summarization:
    """Summarize each block alone, then the summaries, layer by layer, down to one (4.1, figure 2).

    The summaries of a layer are merged in as few groups as the budget allows. A large context needs
    two layers, and a small one still ends with one summary, however long the history is.
    """
    if not items:
        return {"summary": "", "items": [0, 0]}  # nothing to ask

    # The lowest layer has one summary per block.
    blocks = split_blocks(len(items), block_size)
    answers = yield [block_prompt(items[first:end], domain, budget) for first, end in blocks]
    pairs = zip(answers, blocks, strict=True)
    layer = [{"summary": clean(text, domain), "items": list(block)} for text, block in pairs]

    # Each further layer merges groups of summaries; a group of one moves up as it is.
    while len(layer) > 1:
        groups = group_summaries(layer, domain, budget)
        merged = [[node["summary"] for node in group] for group in groups if len(group) > 1]
        answers = iter((yield [merge_prompt(summaries, domain, budget) for summaries in merged]))
        layer = [
            g[0] if len(g) == 1 else {"summary": clean(next(answers), domain), "children": g}
            for g in groups
        ]
    return layer[0]


def recurrent(
    items: list[str], domain: "Domain", budget: "Budget", block_size: int
) -> Summarization:
    """Summarize the first block, then update the summary block by block (4.2, figure 5)."""
    node: Node = {"summary": "", "items": [0, 0]}
    for first, end in split_blocks(len(items), block_size):
        asked = items[first:end], domain, budget
        prompt = update_prompt(node["summary"], *asked) if first else block_prompt(*asked)
        (answer,) = yield [prompt]
        previous = {"previous": node} if first else {}
        node = {"summary": clean(answer, domain), "items": [first, end]} | previous
    return node


def group_summaries(layer: list[Node], domain: "Domain", budget: "Budget") -> list[list[Node]]:
    """Return the layer's nodes in consecutive groups, each as large as a merge prompt has room."""
    groups = [[layer[0]]]
    for node in layer[1:]:
        summaries = [n["summary"] for n in [*groups[-1], node]]
        prompt = build_prompt(domain.merge, (MERGED, numbered(summaries)))
        # Two always go together, cut if need be; otherwise a layer might be as large as the last.
        if len(summaries) <= 2 or budget.fits(budget.encode([prompt])):
            groups[-1].append(node)
        else:
            groups.append([node])
    return groups


# ---- Paradigms: what the prompt that recommends shows of a history; docs/extending.md adds one

PARADIGMS: dict[str, str] = {}  # which items the prompt lists: the last --history-items, all, none
SUMMARIZED: dict[str, Callable[..., Summarization]] = {}  # the generators that make the summaries


def register(name: str, summarize: Callable | None = None, recent: str = "last") -> None:
    """Make a paradigm known to all scripts; ValueError for a taken name or unknown `recent`."""
    if name in PARADIGMS or recent not in ("last", "all", "none"):
        raise ValueError(f"paradigm {name!r}: the name is taken, or recent={recent!r} is unknown")
    PARADIGMS[name] = recent
    SUMMARIZED.update({name: summarize} if summarize else {})


register("hierarchical", hierarchical)
register("recurrent", recurrent)
register("recent-only")  # an ablation
register("whole-history", recent="all")  # TALLRec's prompt
register("none", recent="none")


# ---- Prompts (figures 3, 4, 6, 7 and 8): the paper's headers, instructions in our own words
#
# A prompt is a message of the user to the model. How a model is told where the message begins and
# ends is its form: the plain one below, or that of its own chat template (models/chat.py).


@dataclass(frozen=True)
class Domain:
    """The words of one domain, such as products or news (prepare/words/)."""

    history: str  # header above a block's items
    recent: str  # header above the next block's items in a recurrent update
    summarize: str
    merge: str
    update: str
    recommend: str  # the question that opens every recommendation prompt


STOP_TEXTS = ("### User", "### Assistant")  # a model that writes one goes on with another turn


def plain_turn(message: str) -> str:
    """Return a message in the plain form, with the cue to answer."""
    return f"### User:\n{message}\n\n### Assistant:\n"


def build_prompt(instruction: str, *sections: tuple[str, str]) -> str:
    """Return the message: the instruction, then the sections under bracketed headers."""
    return "\n\n".join([instruction, *(f"[{header}]\n{body}" for header, body in sections)])


def list_prompt(
    instruction: str, header: str, texts: list[str], trimmed: str, budget: "Budget"
) -> str:
    """Return the message about a numbered list of texts, each cut at its end if need be."""

    def build(limit: int) -> list[str]:
        return [build_prompt(instruction, (header, numbered(cut(texts, limit))))]

    return budget.fit(build, {trimmed: (0, longest(texts))})[0][0]


def block_prompt(items: list[str], domain: Domain, budget: "Budget") -> str:
    """Return the prompt that asks for the summary of one block (figures 3 and 6)."""
    return list_prompt(domain.summarize, domain.history, items, "blocks with items cut", budget)


def merge_prompt(summaries: list[str], domain: Domain, budget: "Budget") -> str:
    """Return the prompt that asks for one summary of several (figure 4)."""
    return list_prompt(domain.merge, MERGED, summaries, "merges with summaries cut", budget)


def update_prompt(summary: str, items: list[str], domain: Domain, budget: "Budget") -> str:
    """Return the prompt that asks to update a summary with the next block (figure 7)."""

    def build(limit: int, end: int) -> list[str]:
        previous = PREVIOUS, cut([summary], end)[0] or "(none)"
        return [build_prompt(domain.update, previous, (domain.recent, numbered(cut(items, limit))))]

    limits = {
        "updates with items cut": (0, longest(items)),
        "updates with the summary cut": (0, len(summary)),
    }
    return budget.fit(build, limits)[0][0]


def recommendation_prompts(
    paradigm: str, domain: Domain, summary: str, recent: list[str], candidates: list[str]
) -> list[str]:
    """Return a message per candidate: instruction, summary, recent items, candidate (figure 8).

    The messages agree up to the candidate. recent: the item texts to show, oldest first. A section
    that the paradigm does not use, or that has nothing to show, is left out together with its
    sentence in the instruction.
    """
    notes, sections = [domain.recommend], []
    if paradigm in SUMMARIZED:  # the long term
        notes.append("The preference summary tells what the user likes in the long run.")
        sections.append((SUMMARY, summary or "(none)"))
    if recent:  # the short term
        notes.append("The historical items, oldest first, tell what the user is after now.")
        sections.append((RECENT, numbered(recent)))
    if len(sections) > 1:
        notes.append("Weigh both.")
    instruction = " ".join([*notes, "Answer 'Yes' or 'No'."])
    return [build_prompt(instruction, *sections, (NEXT, text)) for text in candidates]


@dataclass(frozen=True)
class Recommender:
    """What makes a user's prompts: the part of the method that training and evaluation share."""

    paradigm: str
    domain: Domain
    items: dict[str, str]  # item texts by id
    summaries: dict[str, str]  # by user; empty if the paradigm needs none
    history_items: int
    budget: "Budget"

    def prompt_ids(self, example: Example, candidates: list[str]) -> list[list[int]]:
        """Return the token ids of each candidate's prompt, all within the budget."""
        return self.prompts(example, candidates)[1]

    def prompts(self, example: Example, candidates: list[str]) -> tuple[list[str], list[list[int]]]:
        """Return each candidate's message, and the token ids of its prompt within the budget.

        They agree up to the candidate. The instruction and the form are never cut. What is too long
        loses, in this order: the ends of texts that fill about a quarter of the context each, so
        that no long text costs the history; the oldest recent items; the end of the summary; the
        ends of the candidates. A user's longest candidate decides for all, which share a prefix.
        """
        history, summary = example.history, self.summaries.get(example.user, "")
        most = {"last": self.history_items, "all": len(history), "none": 0}
        shown = min(most[PARADIGMS[self.paradigm]], len(history))
        recent = [self.items[i] for i in history[len(history) - shown :]]
        texts = [self.items[i] for i in candidates]

        def build(each: int, kept: int, end: int, limit: int) -> list[str]:
            beginning = cut([summary], end)[0], cut(recent[len(recent) - kept :], each)
            ends = cut(texts, min(each, limit))
            return recommendation_prompts(self.paradigm, self.domain, *beginning, ends)

        quarter = self.budget.tokens  # in characters, of which a token has about four
        limits = {
            "prompts with long texts cut": (quarter, longest([*recent, *texts])),
            "prompts without the oldest recent items": (0, shown),
            "prompts with the summary cut": (0, len(summary)),
            "prompts with candidates cut": (0, longest(texts)),
        }
        return self.budget.fit(build, limits)


# ---- Answers (equations 2 and 3)


def answer_ids(encode: Callable[..., list[list[int]]], domain: Domain) -> tuple[int, int]:
    """Return the token ids of Yes and No as they continue the prompt (equation 2).

    encode: of a form (models/chat.py). Raises InputError unless each is exactly one token there,
    and they differ.
    """
    question = recommendation_prompts("none", domain, "", [], ["x"])
    (prompt,) = encode(question)
    answered = [encode(question, answer)[0] for answer in ANSWERS]
    found = [ids[len(prompt) :] for ids in answered if ids[: len(prompt)] == prompt]
    if len(found) != 2 or any(len(ids) != 1 for ids in found) or found[0] == found[1]:
        yes, no = ANSWERS
        what = f"does not write {yes} and {no} as one token each after the prompt"
        raise InputError(f"the tokenizer {what}")
    return found[0][0], found[1][0]


def yes_probability(yes_logits: np.ndarray, no_logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the two answers' logits, the share of Yes (equation 3).

    Equation 3 as printed takes the softmax of probabilities, which need not even rank two prompts
    in the order of their logits.
    """
    logits = np.stack([yes_logits, no_logits]).astype(np.float64)
    weights = np.exp(logits - logits.max(axis=0))  # so that nothing overflows
    return weights[0] / weights.sum(axis=0)


# ---- Ranking (section 5.2.1)


def shuffled_candidates(example: Example, seed: int = 0) -> list[str]:
    """Return the positive and the negatives in an order that only the user and seed determine."""
    candidates = [example.positive, *example.negatives]
    return sorted(candidates, key=lambda item: content_hash([seed, example.user, item]))


def rank_of_positive(scores: Sequence[float], positive: int, who: str = "") -> int:
    """Return the rank, from 1, of scores[positive]; ties count against it. InputError for NaN."""
    if not np.isfinite(scores).all():
        what = "the model or its adapter is broken, nothing was ranked"
        raise InputError(f"{who}a score is not finite: {what}")
    return int(np.sum(np.asarray(scores) >= scores[positive]))  # it is not below itself


def rank_users(
    examples: Sequence[Example],
    candidates: Sequence[list[str]],
    logits: dict[tuple[int, int], Sequence[float]],
) -> tuple[list[list[float]], list[int]]:
    """Return each user's candidate probabilities, and the rank of the positive.

    logits: Yes, No, and whatever follows, by (index of the user, index of the candidate).
    """
    probabilities, ranks = [], []
    for u, (example, items) in enumerate(zip(examples, candidates, strict=True)):
        yes, no = np.array([logits[u, c][:2] for c in range(len(items))]).T
        probabilities.append(yes_probability(yes, no).tolist())
        # The difference of the logits orders as the probability does, but never saturates at 1.
        who = f"user {example.user!r}: "
        ranks.append(rank_of_positive(yes - no, items.index(example.positive), who))
    return probabilities, ranks


def metrics_at(ranks: Sequence[int], ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return Recall, MRR and NDCG at each k, such as `Recall@3`, with one value per user."""
    ranks = np.asarray(ranks)
    gains = {"Recall": np.ones(len(ranks)), "MRR": 1 / ranks, "NDCG": 1 / np.log2(ranks + 1)}
    pairs = ((name, k) for name in gains for k in ks)
    return {f"{name}@{k}": np.where(ranks <= k, gains[name], 0.0) for name, k in pairs}


# ---- Budgets: what is trimmed from a prompt that is too long


@dataclass(frozen=True)
class Budget:
    """How many tokens a prompt may have, and a count of what was trimmed to keep to that."""

    tokens: int
    encode: Callable[[list[str]], list[list[int]]]  # of messages, in the form that the model reads
    trimmed: Counter

    def fits(self, ids: list[list[int]]) -> bool:
        """Return whether every encoded prompt keeps to the budget."""
        return all(len(prompt) <= self.tokens for prompt in ids)

    def fit(self, build: Callable, limits: dict[str, tuple[int, int]]) -> tuple[list, list]:
        """Return the prompts of build(*values) and their ids, with values as high as they fit.

        limits: the least and most of each value, by the name under which lowering it is counted.
        Values are lowered in this order, the next one only if the prompts are still too long.
        """
        values = [most for _, most in limits.values()]
        for i, (name, (least, most)) in enumerate(limits.items()):
            if most <= least:
                continue  # there is nothing to cut
            ids = self.encode(prompts := build(*values))
            if self.fits(ids):
                return prompts, ids

            def fits_with(value: int, i: int = i) -> bool:
                return self.fits(self.encode(build(*values[:i], value, *values[i + 1 :])))

            values[i] = greatest(most, fits_with) if fits_with(least) else least
            self.trimmed[name] += 1  # what is cut is reported at the end

        ids = self.encode(prompts := build(*values))
        if not self.fits(ids):
            what = f"a context of {self.tokens} tokens has no room for the instruction"
            raise InputError(f"{what}; raise --max-length")
        return prompts, ids


def greatest(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the greatest n from 0 to limit that fits, by doubling and bisection; else 0."""
    # Doubling from below makes a history of 10,000 items cost only what is kept of it.
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high - 1, limit)

    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def cut(texts: Iterable[str], limit: int) -> list[str]:
    """Return texts, each cut at its end to limit characters."""
    return [text if len(text) <= limit else text[:limit].rstrip() for text in texts]


def longest(texts: Iterable[str]) -> int:
    """Return the number of characters of the longest text."""
    return max(map(len, texts), default=0)


# ---- What a result was made of


def content_hash(value: object) -> str:
    """Return a hash of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
