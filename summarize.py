"""Summarize every user's history with a frozen model (sections 4.1, 4.2): RUN/summaries.jsonl

    python summarize.py                                         # data/demo, models/tiny
    python summarize.py --data data/mind --model owner/llama --run runs/mind --paradigm recurrent
    torchrun --nproc_per_node 8 summarize.py --model owner/llama --run-dir runs/mind

Finished users are appended to RUN/summaries.part*.jsonl, and answers to RUN/answers.part*.jsonl, so
no prompt is answered twice, even after an interruption or when a history has grown.

Most of this file is greedy generation: first the obvious way, then a Generator that keeps the
model's keys and values, reads prompts in packs, and refills each row of its cache as soon as the
row's text is done. It writes what the obvious way would write.
"""

import launch.waiting  # noqa: F401  # before torch
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

import trsr
from batches.positions import every_block
from batches.tasks import Writer, own_users, run_tasks
from files.jsonl import write_json, write_jsonl
from launch import announce, numbers
from launch.bars import WritingBar
from launch.command import Shared, option, parse_settings, tell_next
from launch.embedded import DATA, MODEL, make_missing
from launch.estimate import expected_slots, rows_that_fit
from launch.processes import gather, join_processes, peak_memory, run_script
from llama import Llama, compile_layers
from models.chat import Form, has_template
from models.hub import DTYPES, find_model, load_config, load_form, load_model
from models.stops import PLAIN, Choice, StopTexts
from ops.cache import PackWriter
from ops.checkpoint import fingerprint
from ops.graph import StepGraph
from ops.int8 import WAYS
from ops.masks import length_mask
from ops.packs import Pack, common_prefix, group_prompts, pack_trees, padded_select, rounded_up
from ops.penalties import TextCache
from prepare.dataset import default_model, load_dataset
from prepare.domains import wording
from runfolder.quality import quality_of
from state.answers import Answers, collect_answers
from state.settings import claim_config, locked, read_config
from state.summaries import append_record, collect_records, users_left

PREFILL_TOKENS = 8192  # of prompts that a GPU reads at once


@dataclass(frozen=True)
class Settings(Shared):
    """What is summarized, and how: the flags."""

    paradigm: str = option(
        "hierarchical", "how blocks become one", choices=trsr.SUMMARIZED, group="summarization"
    )
    block_size: int = option(5, "items per block", numbers.positive)
    every_block: bool = option(False, "also what is before each block, for train.py --targets")
    max_new_tokens: int = option(150, "longest summary, in tokens", numbers.positive)
    max_length: int = option(2048, "longest prompt with its summary", numbers.positive)
    no_chat: bool = option(False, "ask in the plain form, though the model has a chat template")
    repetition_penalty: float = option(
        1.0, "of logits of tokens that are there; 1: off", numbers.positive_real
    )
    no_repeat_ngram_size: int | None = option(
        None, "n-grams that may not repeat; 0: off (unset: 8 in the chat form)", numbers.natural
    )
    int8: str | None = option(
        None, "8-bit weights, ours or the paper's", nargs="?", choices=WAYS, const="weights"
    )
    fp8: bool = option(False, "8-bit floating-point products, on GPUs from Ada on")
    batch_size: int | None = option(
        None, "prompts decoded together (unset: what fits, on CPUs 16)", numbers.positive
    )

    def recorded(self, folder: Path, form: Form, domain: trsr.Domain) -> dict:
        """Return what determines a summary besides the history: a run is made with one of these."""
        # The batch size and the machine change nothing but rounding.
        names = "data model paradigm block_size max_new_tokens max_length int8 dtype"
        names += " repetition_penalty no_repeat_ngram_size every_block" + " fp8" * self.fp8
        kept = {name: getattr(self, name) for name in names.split()}
        words = wording(self.paradigm, domain, form.show)  # with the chat template's, if any
        words.pop("recommend")  # no summary depends on it
        return kept | {"fingerprint": fingerprint(folder), "prompts": words}


def resolve(flags: Settings, device: torch.device) -> Settings:
    """Return the settings; what is unset comes from the run, then from the embedded default."""
    flags = flags.inherit(read_config(flags.run).get("summarize", {}))
    data = flags.data or DATA
    make_missing(flags, data)
    model = flags.model or default_model(data, MODEL)
    return replace(flags, data=data, model=model, dtype=flags.dtype_on(device.type))


# ---- Greedy generation, the obvious way


@torch.inference_mode()
def generate_slowly(
    model: Llama,
    prompt: list[int],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    choice: Choice = PLAIN,
) -> list[int]:
    """Return the greedy continuation of a prompt, without an end token but with a stop text.

    Reads the whole text again for every token; the Generator below gives the same ids.
    """
    device, written, ended = model.lm_head.weight.device, [], None
    while ended is None:
        logits = model(torch.tensor([prompt + written], device=device))[0, -1]
        written.append(choice.slowly(logits, prompt + written))
        ended = choice.ending(written, eos_ids, max_new_tokens)
    return written[:-1] if ended == "end" else written  # the end token is not part of the text


# ---- Greedy generation with a cache
#
# Prompts wait in a queue for a row of a static cache. Those that get one are read in packs, where a
# shared prefix is read once. Then all rows decode together, and a row that is done is refilled at
# once. Each row has its own length: a query sees the slots up to its own position, and what an
# earlier text left behind them is overwritten before any query sees it.


@dataclass
class Row:
    """A text in the making: its key, its prompt, and the tokens that the model has written."""

    key: object
    prompt: list[int]
    tokens: list[int]
    ended: str | None = None  # how, once it is done: by an end token, the limit, or the next turn

    def __iter__(self) -> Iterator:
        return iter((self.key, self.tokens))  # what most callers want of a text

    @property
    def length(self) -> int:
        """Slots in use, and the position of the last token, which is not in the cache yet."""
        return len(self.prompt) + len(self.tokens) - 1


class Generator:
    """Greedy continuations of prompts that may be submitted at any time, in `rows` at once."""

    def __init__(
        self,
        model: Llama,
        rows: int,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        slots: int = 0,
        choice: Choice = PLAIN,
    ):
        self.model, self.n_rows = model, rows
        self.max_new_tokens, self.eos_ids, self.choice = max_new_tokens, eos_ids, choice
        self.waiting: deque[tuple[object, list[int]]] = deque()
        self.rows: list[Row] = []  # they use the first rows of the cache

        weight, c = model.lm_head.weight, model.config
        self.device, self.on_gpu = weight.device, weight.device.type == "cuda"
        shape = (rows, c.num_key_value_heads, slots, c.head_dim)
        self.cache = choice.cache(c.num_hidden_layers, shape, weight.device, weight.dtype)
        # The graph reads its tokens and positions from here.
        self.inputs = torch.zeros(2, rows, dtype=torch.long, device=weight.device)
        self.graph: StepGraph | None = None

    def submit(self, prompts: Iterable[tuple[object, list[int]]], first: bool = False) -> None:
        """Queue (key, token ids) pairs at the end, or with `first` before all others."""
        if first:
            self.waiting.extendleft(reversed(list(prompts)))
        else:
            self.waiting.extend(prompts)

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Read waiting prompts, or write a token in every row; return those done.

        Their tokens are without an end token, but with the stop text that ended them.
        """
        if due := self._prompts_due():
            # Reading writes a token too: the first one of each text.
            self._prefill([self.waiting.popleft() for _ in range(due)])
        elif self.rows:
            for row, token in zip(self.rows, self._decode(), strict=True):
                row.tokens.append(token)
        return self._take_done()

    # -- 1. How many prompts to read now

    def _prompts_due(self) -> int:
        """Return how many prompts to read: none until it pays, on a GPU a full pack at most."""
        free = self.n_rows - len(self.rows)
        tokens, group_first = 0, None
        for n, (_, ids) in enumerate(islice(self.waiting, free) if self.on_gpu else ()):
            # The prefix that they share is read once.
            group_first = group_first or ids
            tokens += len(ids) - (common_prefix([group_first, ids]) if n else 0)
            if n and tokens > PREFILL_TOKENS:
                return n

        # Reading stalls the rows that decode, so it waits for several free rows.
        least = max(1, self.n_rows // (4 if self.on_gpu else 8))
        if len(self.waiting) <= free or free >= least:
            return min(free, len(self.waiting))
        return 0

    # -- 2. Prefill: read prompts, in packs, into the rows after those in use

    def _prefill(self, prompts: list[tuple[object, list[int]]]) -> None:
        """Read prompts into free rows and write the first token of each."""
        first = len(self.rows)
        self.rows += [Row(key, ids, []) for key, ids in prompts]
        self._make_room(max(len(ids) for _, ids in prompts) + self.max_new_tokens)
        self.cache.begin(first, [ids for _, ids in prompts])

        trees, prompt_of = group_prompts([ids for _, ids in prompts])
        size, pad_to = 2048, 1
        if self.on_gpu:  # few lengths, since kernels are compiled for each
            size = pad_to = rounded_up(min(PREFILL_TOKENS, sum(tree.size for tree in trees)))
        for pack in pack_trees(trees, size, pad_to, last_only=True):
            row_of = {leaf: first + prompt_of[leaf] for leaf in pack.leaves}
            # The logits after each prompt's last token decide its first new token.
            here, writers = pack.to(self.device), self._writers(pack, row_of, pad_to)
            select = padded_select(list(pack.leaves.values()), self.device)
            logits = self.model(here.ids[None], here.positions[None], here.mask(), writers, select)
            tokens = self.cache.choose_first(logits, list(row_of.values())).tolist()
            for row, token in zip(row_of.values(), tokens, strict=True):
                self.rows[row].tokens.append(token)

    def _make_room(self, slots: int) -> None:
        """Grow the cache to this many slots per row, if it has fewer."""
        if slots > self.cache.slots:
            self.cache.grow(-(-slots // 512) * 512 if self.on_gpu else slots)
            self.graph = None  # it was captured with the smaller tensors

    def _writers(self, pack: Pack, row_of: dict, pad_to: int) -> list[PackWriter]:
        """Return, for each layer, what copies the pack's prompts into their rows of the cache."""
        rows, tokens = [], []
        for leaf, last in pack.leaves.items():
            # A prompt is the path to its last token: what that token continues, and itself.
            path = (pack.ends[: last + 1] > last).nonzero()[:, 0]
            rows.append(torch.full_like(path, row_of[leaf]))
            tokens.append(path)
        rows, tokens = torch.cat(rows), torch.cat(tokens)
        if pad_to > 1:
            # Few lengths here too; copying the last token several times is harmless.
            more = -len(rows) % pad_to
            rows, tokens = (torch.cat((t, t[-1:].expand(more))) for t in (rows, tokens))
        places = [t.to(self.device) for t in (rows, pack.positions[tokens], tokens)]
        return [PackWriter(layer, *places) for layer in self.cache.layers]

    # -- 3. Decode: one token for every row in use

    def _decode(self) -> list[int]:
        """Return the next token of each row in use."""
        last = [(row.tokens[-1], row.length) for row in self.rows]
        if not self.on_gpu:
            visible = max(row.length for row in self.rows) + 1
            return decode(self.model, *torch.tensor(last).T, self.cache, visible).tolist()

        # All rows run on a GPU, since a graph has fixed shapes; idle ones write into slot 0.
        idle = [(0, 0)] * (self.n_rows - len(last))
        self.inputs.copy_(torch.tensor(last + idle).T)
        step = partial(decode, self.model, *self.inputs, self.cache, self.cache.slots)
        if self.model.syncs_host:  # no graph can be captured
            return step()[: len(last)].tolist()
        if self.graph is None:
            self.graph = StepGraph(step)
        return self.graph.replay()[: len(last)].tolist()

    # -- 4. Rows that are done make room

    def ending(self, row: Row) -> str | None:
        """Return how the row ends with its last token, or None if it does not."""
        return self.choice.ending(row.tokens, self.eos_ids, self.max_new_tokens)

    def _take_done(self) -> list[Row]:
        """Remove the rows that are done and return them."""
        done = []
        for i in reversed(range(len(self.rows))):  # backwards, since rows move down
            row = self.rows[i]
            row.ended = self.ending(row)
            if row.ended is None:
                continue
            done.append(row)
            last = self.rows.pop()
            if last is not row:  # the last row moves into the gap, so those in use come first
                self.rows[i] = last
                self.cache.move(len(self.rows), i, last.length)
            if row.ended == "end":
                row.tokens.pop()  # the end token is not part of the text
        return done

    def shrink(self) -> None:
        """Continue with half as many rows after memory ran out; unfinished texts start over."""
        self.submit([(row.key, row.prompt) for row in self.rows], first=True)
        self.rows, self.graph, self.n_rows = [], None, self.n_rows // 2
        self.cache.shrink(self.n_rows)
        self.inputs = self.inputs[:, : self.n_rows].clone()
        torch.cuda.empty_cache()


def decode(
    model: Llama, tokens: Tensor, positions: Tensor, cache: TextCache, visible: int
) -> Tensor:
    """Read one token per row (B,) at positions (B,); return the next tokens (B,).

    visible: the slots that any row may look at.
    """
    if tokens.is_cuda:
        mask = length_mask(positions, visible)
    else:
        mask = torch.arange(visible) <= positions[:, None, None, None]  # (B, 1, 1, S)
    logits = model(tokens[:, None], positions[:, None], mask, cache.layers)[:, -1]
    return cache.choose(logits, tokens, positions)


# ---- A model that summarizes


@dataclass(frozen=True)
class Summarizer:
    """Everything that the settings determine, except the weights."""

    settings: Settings
    folder: Path
    form: Form
    domain: trsr.Domain
    budget: trsr.Budget
    recorded: dict  # what determines a summary besides the history

    @classmethod
    def of(cls, settings: Settings, domain: trsr.Domain) -> "Summarizer":
        """Return the summarizer of resolved settings."""
        folder = find_model(settings.model, settings.revision)
        form = load_form(folder, chat=has_template(folder) and not settings.no_chat)
        if settings.no_repeat_ngram_size is None:
            settings = replace(settings, no_repeat_ngram_size=form.no_repeat_ngram_size)
        context = min(settings.max_length, load_config(folder).max_position_embeddings)
        budget = trsr.Budget(context - settings.max_new_tokens, form.encode, Counter())
        recorded = settings.recorded(folder, form, domain)
        return cls(settings, folder, form, domain, budget, recorded)

    def task(self, items: list[str], trimmed: Counter) -> trsr.Summarization:
        """Return a user's summarization, ready to be run; it counts what it trims in trimmed."""
        budget, size = replace(self.budget, trimmed=trimmed), self.settings.block_size
        summarize = trsr.SUMMARIZED[self.settings.paradigm]
        if self.settings.every_block:
            summarize = partial(every_block, summarize)
        return summarize(items, self.domain, budget, size)

    def generator(self, texts: Iterable[list[str]], device: torch.device) -> Generator:
        """Return a generator with --batch-size rows, or as many of texts' as the GPU can hold."""
        settings, form, new = self.settings, self.form, self.settings.max_new_tokens
        dtype, fp8 = DTYPES[settings.dtype], "scoring" if settings.fp8 else None
        model = load_model(self.folder, device, dtype, int8=settings.int8, fp8=fp8)
        slots = 0  # on a CPU the cache grows as prompts come
        if device.type == "cuda":
            shape = settings.paradigm, settings.block_size, new
            slots = expected_slots(texts, self.domain, self.budget, *shape)
        rows = settings.batch_size or rows_that_fit(model, slots, PREFILL_TOKENS, device)
        if device.type == "cuda" and settings.int8 != "bitsandbytes" and not settings.no_compile:
            compile_layers(model)
        ends = form.tokenizer.end_ids((*model.config.eos_token_id, *form.end_ids))
        stops = StopTexts(form.tokenizer, form.stops) if form.stops else None
        choice = Choice(settings.repetition_penalty, settings.no_repeat_ngram_size, stops)
        return Generator(model, rows, new, ends, slots, choice)


# ---- The command


def main() -> None:
    """Summarize the users of all splits."""
    flags = parse_settings(Settings, __doc__)
    rank, _, device = join_processes(flags.timeout)
    settings = resolve(flags, device)

    # The histories as texts, the model, and a generator for it.
    domain, items, splits = load_dataset(settings.data, ("train", "val", "test"))
    texts = {e.user: [items[i] for i in e.history] for e in chain(*splits.values())}
    summarizer = Summarizer.of(settings, domain)
    generator, recorded = summarizer.generator(texts.values(), device), summarizer.recorded

    with locked(settings.run, hold=rank == 0):
        if rank == 0:
            started = bool(collect_records(settings.run))
            claim_config(settings.run, "summarize", recorded, started)
            collect_answers(settings.run)
        gather(None)  # nobody reads before the first process has collected
        # A user whose key has not changed is not summarized again.
        keys = {user: trsr.content_hash([recorded, texts[user]]) for user in texts}
        pending, trimmed = users_left(settings.run, keys), Counter()
        if rank == 0:
            announce.summarization(settings, len(texts), len(texts) - len(pending), generator)

        mine = own_users(pending, texts)  # each is written as soon as it is done
        answers = Answers(settings.run, recorded, rank)
        shape = settings.block_size, settings.paradigm == "hierarchical", settings.max_new_tokens
        with WritingBar([len(mine[u]) for u in mine], *shape, hidden=rank > 0) as bar:
            writer = Writer(generator, summarizer.form, bar, answers)
            tasks = ((user, summarizer.task(mine[user], trimmed)) for user in mine)
            for user, root in run_tasks(tasks, writer):
                about = {"user": user, "paradigm": settings.paradigm, "key": keys[user]}
                append_record(settings.run, rank, about, root, writer.ends.pop(user, {}))
                bar.user_done()

        trimmed, counts = (sum(gather(found), Counter()) for found in (trimmed, writer.counts))
        if rank == 0:
            conclude(settings, texts, trimmed, counts, peak_memory(device))


def conclude(
    settings: Settings, texts: dict[str, list[str]], trimmed: Counter, prompts: Counter, peak: str
) -> None:
    """Merge what the processes wrote, in the order of users; print its quality and what is next."""
    collect_answers(settings.run)
    found, path = collect_records(settings.run), settings.run / "summaries.jsonl"
    found = {user: found[user] for user in texts}
    write_jsonl(path, found.values())
    quality = quality_of(found, texts)
    write_json(settings.run / "quality.json", quality.record())
    print("\n".join(quality.lines()))
    for what, count in trimmed.items():
        print(f"trimmed to the context: {count} {what}")
    print(f"asked   {prompts['asked']} prompts; {prompts['known']} more were answered before")
    print(f"wrote   {path} ({len(texts)} users); peak {peak}")
    same = f"--data {settings.data} --model {settings.model} --run {settings.run}"
    tell_next(f"python train.py {same}")


if __name__ == "__main__":
    run_script(main)
