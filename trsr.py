"""The method of LLM-TRSR (Zheng et al., WWW 2024): text in, text out.

Read this file first, top to bottom; it follows section 4 of the paper:

    items    -> text                      item_text                              (4.1.1)
    history  -> blocks -> one summary     hierarchical | recurrent, run_tasks    (4.1, 4.2)
    summary, recent items, candidate      recommendation_prompts                 (4.3)
    logits of Yes and No -> probability   yes_probability                        (equations 2 and 3)
    scores   -> Recall, MRR, NDCG         rank_of_positive, metrics_at           (5.2.1)

It knows neither the model nor torch. A language model enters as two functions: `generate`, prompts to texts, and
`encode`, texts to token ids.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SUMMARIZED = ("hierarchical", "recurrent")  # paradigms that need summarize.py first
PARADIGMS = (*SUMMARIZED, "recent-only", "whole-history", "none")  # the others are ablations and TALLRec's prompt
ANSWERS = ("Yes", "No")


class InputError(ValueError):
    """Something a user can mend: one line that names the file, line or field, and the way out."""


@dataclass(frozen=True)
class Example:
    """One user: `history` oldest first, the item that came next, and items that the user did not choose."""

    user: str
    history: list[str]
    positive: str
    negatives: list[str]


# ---- Items as text (section 4.1.1)

_HEADER = re.compile(
    r"\[ ?((?:Historical Purchase|Recent Purchase|News Reading|Recent News Reading) Data|User Preferences Summaries"
    r"|(?:Previous )?Preference Summary|Historical Items|Next Item) ?\]",
    re.IGNORECASE,
)
_CONTROL_TOKEN = re.compile(r"<(/?s|unk|pad|\|[^<>]*?\|)>", re.IGNORECASE)


def clean(text: str) -> str:
    """Return text on one line with nothing in it that could pass for the prompt's own structure.

    Control characters and runs of white space become one blank; `###`, a bracketed section header and a control
    token such as `</s>` lose the signs that make them one.
    """
    text = " ".join("".join(" " if ord(c) < 32 or 127 <= ord(c) < 160 else c for c in text).split())
    text = _CONTROL_TOKEN.sub(r"(\1)", _HEADER.sub(r"(\1)", text))
    return re.sub(r"#{3,}", "#", text)


def item_text(attributes: dict[str, str]) -> str:
    """Return `Title: ...; Brand: ...`: the item's attributes that have a text, in their order."""
    pairs = ((clean(name), clean(value)) for name, value in attributes.items())
    return "; ".join(f"{name}: {value}" for name, value in pairs if value) or "(no description)"


def numbered(texts: Iterable[str]) -> str:
    """Return texts as a numbered list, a line each."""
    return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1)) or "(none)"


# ---- Prompts: the paper's section headers, instructions in our own words


@dataclass(frozen=True)
class Domain:
    """The words of one domain: what is summarized, and how the tasks are put."""

    history: str  # header above a block's items
    recent: str  # header above the next block's items in recurrent summarization
    summarize: str
    merge: str
    update: str
    recommend: str  # the question that every recommendation prompt opens with


_UPDATE = (
    "since, oldest first. Judge whether the preferences have changed and write an updated summary in the style of the "
    "earlier one. It must stand on its own: describe the user as a whole and do not compare before and after."
)
DOMAINS = {
    "products": Domain(
        history="Historical Purchase Data",
        recent="Recent Purchase Data",
        summarize="Below are products that a user bought, oldest first, with their titles and attributes. Describe in "
        "a few sentences what this user likes: the kinds of product, and the qualities and brands that recur.",
        merge="Below are summaries of one user's shopping preferences, in order of time. Condense them into a single "
        "short summary of the user's preferences as a whole, in the style of the summaries given.",
        update=f"Below are an earlier summary of a user's shopping preferences and the products bought {_UPDATE}",
        recommend="Decide whether the user will buy the next product.",
    ),
    "news": Domain(
        history="News Reading Data",
        recent="Recent News Reading Data",
        summarize="Below are news articles that a user read, oldest first, with their categories and titles. Describe "
        "in a few sentences what this user likes to read about, and the topics that recur.",
        merge="Below are summaries of one user's reading preferences, in order of time. Condense them into a single "
        "short summary of what the user likes to read as a whole, in the style of the summaries given.",
        update=f"Below are an earlier summary of a user's reading preferences and the news articles read {_UPDATE}",
        recommend="Decide whether the user will read the next news article.",
    ),
}


def build_prompt(instruction: str, *sections: tuple[str, str]) -> str:
    """Return the instruction, each section under its bracketed header, and the cue after which the model writes."""
    parts = [f"### User:\n{instruction}", *(f"[{header}]\n{body}" for header, body in sections)]
    return "\n\n".join([*parts, "### Assistant:\n"])


def greatest(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the greatest n from 0 to limit that fits, by doubling and bisection; 0 where none does."""
    low, high = 0, 1
    while high <= limit and fits(high):  # from below, so that a history of 10,000 items costs what is kept of it
        low, high = high, 2 * high
    high = min(high - 1, limit)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class Budget:
    """How many tokens a prompt may have, how texts are encoded, and a count of what had to be trimmed so far."""

    tokens: int
    encode: Callable[[list[str]], list[list[int]]]
    trimmed: Counter

    def fits(self, ids: list[list[int]]) -> bool:
        """Tell whether every encoded prompt keeps to the budget."""
        return all(len(prompt) <= self.tokens for prompt in ids)

    def fill(self, build: Callable[..., list[str]], parts: Sequence[tuple[str, int]]) -> tuple[list, list]:
        """Return the prompts of build(limits) and their ids, with limits lowered, in their order, until they fit.

        parts: the name under which a lowered limit is counted, and the greatest value of that limit, for each.
        """
        limits = [limit for _, limit in parts]
        for i, (what, _) in enumerate(parts):
            if self.fits(ids := self.encode(prompts := build(*limits))):
                return prompts, ids
            limits[i] = greatest(
                limits[i], lambda n, i=i: self.fits(self.encode(build(*limits[:i], n, *limits[i + 1 :])))
            )
            self.trimmed[what] += 1
        if not self.fits(ids := self.encode(prompts := build(*limits))):
            raise InputError(f"a context of {self.tokens} tokens has no room for the instruction; raise --max-length")
        return prompts, ids

    def prompt(self, instruction: str, sections: Callable[..., list[tuple[str, str]]], parts) -> str:
        """Return the prompt of instruction and sections(limits), with the limits lowered as in fill."""
        return self.fill(lambda *limits: [build_prompt(instruction, *sections(*limits))], parts)[0][0]


def longest(texts: Iterable[str]) -> int:
    """Return the number of characters of the longest text."""
    return max(map(len, texts), default=0)


def cut(texts: Iterable[str], limit: int) -> list[str]:
    """Return texts, each cut at its end to limit characters."""
    return [text if len(text) <= limit else text[:limit].rstrip() for text in texts]


# ---- Summarization (sections 4.1 and 4.2)
#
# A paradigm is a generator for one user: it yields the prompts that it needs answered now, receives the answers, and
# returns the root of the tree of summaries. run_tasks drives those of many users together.

Node = dict  # {"summary": str} and "items": [first, last + 1], "previous": Node, or "children": [Node, ...]
Summarization = Generator[list[str], list[str], Node]


def split_blocks(n_items: int, block_size: int) -> list[tuple[int, int]]:
    """Return the (first, last + 1) of consecutive blocks of block_size items; the last one may be shorter."""
    return [(start, min(start + block_size, n_items)) for start in range(0, n_items, block_size)]


def block_prompt(items: list[str], domain: Domain, budget: Budget) -> str:
    """Return the prompt that asks for the summary of one block (figures 3 and 6)."""

    def sections(limit: int) -> list[tuple[str, str]]:
        return [(domain.history, numbered(cut(items, limit)))]

    return budget.prompt(domain.summarize, sections, [("blocks with items cut", longest(items))])


def merge_prompt(summaries: list[str], domain: Domain, budget: Budget) -> str:
    """Return the prompt that asks for one summary of several (figure 4)."""

    def sections(limit: int) -> list[tuple[str, str]]:
        return [("User Preferences Summaries", numbered(cut(summaries, limit)))]

    return budget.prompt(domain.merge, sections, [("merges with summaries cut", longest(summaries))])


def update_prompt(summary: str, items: list[str], domain: Domain, budget: Budget) -> str:
    """Return the prompt that asks to update a summary with the next block (figure 7)."""

    def sections(limit: int, end: int) -> list[tuple[str, str]]:
        previous = cut([summary], end)[0] or "(none)"
        return [("Previous Preference Summary", previous), (domain.recent, numbered(cut(items, limit)))]

    parts = [("updates with items cut", longest(items)), ("updates with the summary cut", len(summary))]
    return budget.prompt(domain.update, sections, parts)


def hierarchical(items: list[str], domain: Domain, budget: Budget, block_size: int) -> Summarization:
    """Summarize each block alone, then the summaries, layer upon layer, until one is left (section 4.1, figure 2).

    A layer's summaries are merged in as few groups as the budget allows, so two layers do where the context is large
    and a history of any length ends in one summary where it is small.
    """
    if not items:
        return {"summary": "", "items": [0, 0]}
    blocks = split_blocks(len(items), block_size)
    answers = yield [block_prompt(items[start:end], domain, budget) for start, end in blocks]
    layer = [{"summary": clean(s), "items": list(block)} for s, block in zip(answers, blocks, strict=True)]
    while len(layer) > 1:
        groups = group_summaries(layer, domain, budget)
        merged = [[node["summary"] for node in group] for group in groups if len(group) > 1]
        answers = iter((yield [merge_prompt(summaries, domain, budget) for summaries in merged]))
        layer = [g[0] if len(g) == 1 else {"summary": clean(next(answers)), "children": g} for g in groups]
    return layer[0]


def group_summaries(layer: list[Node], domain: Domain, budget: Budget) -> list[list[Node]]:
    """Return the layer's nodes in runs, each as long as a merge prompt has room for."""
    groups = [[layer[0]]]
    for node in layer[1:]:
        summaries = [n["summary"] for n in [*groups[-1], node]]
        prompt = build_prompt(domain.merge, ("User Preferences Summaries", numbered(summaries)))
        # Two always go together, cut if need be: otherwise a layer might be no smaller than the one below it.
        if len(summaries) <= 2 or budget.fits(budget.encode([prompt])):
            groups[-1].append(node)
        else:
            groups.append([node])
    return groups


def recurrent(items: list[str], domain: Domain, budget: Budget, block_size: int) -> Summarization:
    """Summarize the first block, then update the summary with one block after the other (section 4.2, figure 5)."""
    node: Node = {"summary": "", "items": [0, 0]}
    for start, end in split_blocks(len(items), block_size):
        block = items[start:end]
        first = start == 0
        prompt = block_prompt(block, domain, budget) if first else update_prompt(node["summary"], block, domain, budget)
        answer = (yield [prompt])[0]
        node = {"summary": clean(answer), "items": [start, end]} | ({} if first else {"previous": node})
    return node


def run_tasks(
    tasks: Iterable[tuple[str, Summarization]], room: Callable, submit: Callable, finished: Callable
) -> Iterator[tuple[str, Node]]:
    """Yield (user, root) as users finish; a user goes on as soon as the user's own prompts are answered.

    room() tells whether more users are welcome; submit(prompts, first) takes ((user, number), prompt) pairs, `first`
    if they come before others'; finished() returns ((user, number), answer) pairs of any user.
    """
    waiting: dict[str, tuple[Summarization, dict[int, str], int]] = {}  # answers so far, and how many there will be

    def advance(user: str, task: Summarization, answers: list[str] | None) -> Iterator[tuple[str, Node]]:
        try:
            prompts = task.send(answers)
            waiting[user] = task, {}, len(prompts)
            submit([((user, i), prompt) for i, prompt in enumerate(prompts)], answers is not None)
        except StopIteration as end:
            yield user, end.value

    tasks = iter(tasks)
    while True:
        while room() and (started := next(tasks, None)):
            yield from advance(*started, None)
        if not waiting:
            return
        for (user, i), answer in finished():
            task, answers, n = waiting[user]
            answers[i] = answer
            if len(answers) == n:
                del waiting[user]
                yield from advance(user, task, [answers[i] for i in range(n)])


# ---- Recommendation (section 4.3)


def recommendation_prompts(
    paradigm: str, domain: Domain, summary: str, recent: list[str], candidates: list[str]
) -> list[str]:
    """Return one prompt for each candidate text: instruction, summary, recent items, candidate, cue (figure 8).

    All of them agree up to the candidate. `recent` holds the item texts to show, oldest first; a section that the
    paradigm has no use for, or that has no items to show, is left out together with its part of the instruction.
    """
    notes, sections = [domain.recommend], []
    if paradigm in SUMMARIZED:
        notes.append("The preference summary tells what the user likes in the long run.")
        sections.append(("Preference Summary", summary or "(none)"))
    if recent:
        notes.append("The historical items, oldest first, tell what the user is after now.")
        sections.append(("Historical Items", numbered(recent)))
    instruction = " ".join([*notes, *(["Weigh both."] if len(sections) > 1 else []), "Answer 'Yes' or 'No'."])
    return [build_prompt(instruction, *sections, ("Next Item", candidate)) for candidate in candidates]


@dataclass(frozen=True)
class Recommender:
    """Makes the token ids of a user's prompts; what train.py and evaluate.py share of the method."""

    paradigm: str
    domain: Domain
    items: dict[str, str]  # item texts by id
    summaries: dict[str, str]  # by user; empty where the paradigm needs none
    history_items: int
    budget: Budget

    def prompt_ids(self, example: Example, candidates: list[str]) -> list[list[int]]:
        """Return the token ids of each candidate's prompt, all within the budget and alike up to the candidate.

        Instruction and cue are never cut. What is too much goes in this order: the oldest recent items, the end of
        the summary, and only if a candidate alone exceeds the context, the end of the candidates' texts. The longest
        candidate decides for all of the user's candidates, so that they keep one prefix.
        """
        history, summary = example.history, self.summaries.get(example.user, "")
        shown = {"whole-history": len(history), "none": 0}.get(self.paradigm, min(self.history_items, len(history)))
        recent = [self.items[i] for i in history[len(history) - shown :]]
        texts = [self.items[i] for i in candidates]

        def build(kept: int, end: int, limit: int) -> list[str]:
            known = cut([summary], end)[0], recent[len(recent) - kept :]
            return recommendation_prompts(self.paradigm, self.domain, *known, cut(texts, limit))

        parts = [
            ("prompts without the oldest recent items", shown),
            ("prompts with the summary cut", len(summary)),
            ("prompts with candidates cut", longest(texts)),
        ]
        return self.budget.fill(build, parts)[1]


def answer_ids(encode: Callable[[list[str]], list[list[int]]], domain: Domain) -> tuple[int, int]:
    """Return the token ids of Yes and No as they continue the cue (equation 2).

    Raises InputError where an answer is not exactly one token there, or both are the same.
    """
    cue = recommendation_prompts("none", domain, "", [], ["x"])[0]
    prompt, *answered = encode([cue, *(cue + answer for answer in ANSWERS)])
    found = [ids[len(prompt) :] for ids in answered if ids[: len(prompt)] == prompt]
    if len(found) != 2 or any(len(ids) != 1 for ids in found) or found[0] == found[1]:
        raise InputError(f"the tokenizer does not write {ANSWERS[0]} and {ANSWERS[1]} as one token each after the cue")
    return found[0][0], found[1][0]


def yes_probability(yes_logits: np.ndarray, no_logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the two answers' logits, the share of Yes (equation 3).

    Equation 3 as printed takes the softmax of probabilities, which would not even keep the order of two prompts.
    """
    logits = np.stack([yes_logits, no_logits]).astype(np.float64)
    weights = np.exp(logits - logits.max(axis=0))
    return weights[0] / weights.sum(axis=0)


# ---- Ranking (section 5.2.1)


def rank_of_positive(scores: Sequence[float], positive: int) -> int:
    """Return the rank, from 1, of scores[positive]; another with the same score stands before it. Refuses NaN."""
    if not np.isfinite(scores).all():
        raise InputError("a score is not finite: the model or its adapter is broken, nothing was ranked")
    return int(np.sum(np.asarray(scores) >= scores[positive]))


def shuffled_candidates(example: Example, seed: int = 0) -> list[str]:
    """Return the positive and the negatives in an order that only the user and seed determine."""
    return sorted([example.positive, *example.negatives], key=lambda i: content_hash([seed, example.user, i]))


def rank_users(
    examples: Sequence[Example], candidates: Sequence[list[str]], logits: dict[tuple[int, int], Sequence[float]]
) -> tuple[list[list[float]], list[int]]:
    """Return each user's candidate probabilities and rank of the positive.

    logits: (Yes, No) by (index of the user, index of the candidate).
    """
    scores, ranks = [], []
    for u, (example, items) in enumerate(zip(examples, candidates, strict=True)):
        yes, no = np.array([logits[u, c] for c in range(len(items))]).T
        scores.append(yes_probability(yes, no).tolist())
        try:  # by the difference of the logits, which orders as the probability does but never saturates at 1
            ranks.append(rank_of_positive(yes - no, items.index(example.positive)))
        except InputError as error:
            raise InputError(f"user {example.user!r}: {error}") from None
    return scores, ranks


def metrics_at(ranks: Sequence[int], ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return Recall, MRR and NDCG at each k, named like `Recall@3`, each as an array with one value a user."""
    ranks = np.asarray(ranks)
    gains = {"Recall": np.ones(len(ranks)), "MRR": 1 / ranks, "NDCG": 1 / np.log2(ranks + 1)}
    return {f"{name}@{k}": np.where(ranks <= k, gain, 0.0) for name, gain in gains.items() for k in ks}


def random_metrics(n_candidates: int, ks: Sequence[int]) -> dict[str, float]:
    """Return what a random order of n_candidates scores on average: the mean over all equally likely ranks."""
    return {name: float(values.mean()) for name, values in metrics_at(range(1, n_candidates + 1), ks).items()}


def bootstrap_intervals(metrics: dict[str, np.ndarray], resamples: int = 2000, seed: int = 0) -> dict[str, tuple]:
    """Return the 95 % percentile interval of each metric's mean over users, by resampling users with replacement."""
    n = len(next(iter(metrics.values())))
    rng = np.random.default_rng(seed)
    table = np.stack(list(metrics.values()))  # (metrics, users)
    weights = (rng.multinomial(n, np.full(n, 1 / n)) / n for _ in range(resamples))
    means = np.stack([table @ w for w in weights])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(metrics, low, high, strict=True)}


# ---- What a result was made of


def content_hash(value: object) -> str:
    """Return a hash of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
