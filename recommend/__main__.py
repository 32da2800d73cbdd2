"""Rank items for users who are in no dataset, with a trained run: one line per user.

    python -m recommend --run runs/demo --users users.jsonl --out ranked.jsonl
    python -m recommend --run runs/demo --users users.jsonl --catalogue --top 20 --out ranked.jsonl
    python -m recommend --run runs/demo --history P0-00012 P0-00345 --catalogue
    torchrun --nproc_per_node 8 -m recommend --run-dir runs/demo --users users.jsonl --out r.jsonl

A line of users.jsonl: {"user": "ann", "history": ["P0-00012", {"id": "new", "attributes": {"Title":
"Blue lamp"}}], "candidates": [...]}, oldest item first. An item is an id of the run's dataset, or
comes with its texts, which needs no training. A user without candidates gets those of --candidates
or --catalogue that are not in the history.

What is not summarized yet is summarized, by the run's own summarizer. Finished users are appended
to parts of --out, so the same command resumes; what has not changed is not ranked again. Without
--users, one user is read from the command line, and a table is printed.
"""

import launch.waiting  # noqa: F401  # before torch
import hashlib
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

import evaluate
import summarize
import trsr
from batches.catalogue import CatalogueRanking
from batches.prompts import Batching
from batches.stream import catalogue_packs
from batches.tasks import Writer, recalled, run_tasks
from files.jsonl import append_jsonl, read_jsonl, write_jsonl
from launch import numbers
from launch.bars import WritingBar
from launch.command import option, parse_settings
from launch.processes import (
    gather,
    join_processes,
    peak_memory,
    prefetch,
    ranks,
    run_script,
    share_out,
)
from models.hub import find_model, load_form
from ops.checkpoint import fingerprint
from prepare.dataset import load_dataset
from prepare.domains import wording
from recommend.users import Items, Shared, User, make_user, parse_entries, read_shared, read_users
from runfolder.tally import Ranked, Tally
from state.answers import Answers, collect_answers
from state.origin import check_learned, check_trained_on
from state.settings import check_settings, locked, read_config
from state.summaries import known_summaries
from trsr import InputError

OUT_FIELDS = {"user": str, "key": str, "items": list}
WIDTH = 100


@dataclass(frozen=True)
class Settings:
    """The flags."""

    run: Path = option(Path("runs/demo"), "run folder, after train.py", Path, "files")
    users: Path | None = option(None, "file of users (unset: --history is the only one)", Path)
    out: Path | None = option(None, "file for what is ranked, one line a user", Path)
    history: tuple[str, ...] | None = option(
        None, "items of one user, oldest first: ids, or JSON with attributes", nargs="*"
    )
    candidates: Path | None = option(
        None, "file of the items to rank for users without their own", Path, "ranking"
    )
    catalogue: bool = option(False, "rank all items of the dataset for these users")
    top: int = option(10, "items to write for a user, the best first", numbers.positive)
    batch_size: int | None = option(
        None,
        "prompts summarized together (unset: what fits, on CPUs 16)",
        numbers.positive,
        "machine",
    )
    pack_tokens: int | None = option(
        None, "tokens per pass (unset: 16384, on CPUs 4096)", numbers.positive
    )
    no_compile: bool = option(
        False, "on GPUs, do not compile the layers: slower, but starts at once"
    )
    timeout: float = option(
        600.0, "seconds that a process waits for the others to start", numbers.positive_real
    )

    def check(self) -> None:
        """Raise InputError for flags that do not go together."""
        if (self.users is None) == (self.history is None):
            raise InputError("give either --users FILE, or --history with one user's items")
        if self.users and not self.out:
            raise InputError("--out is missing: the file for what is ranked")
        if self.out and not self.users:
            raise InputError("--out goes with --users; one user's table is printed")
        if self.out and (not self.out.name or self.out.is_dir()):
            raise InputError(f"--out {self.out}: expected the name of a file")
        if self.catalogue and self.candidates:
            raise InputError("--catalogue and --candidates: give one of them")
        if self.history is not None and not (self.catalogue or self.candidates):
            raise InputError("--history needs --catalogue or --candidates FILE: what to rank")
        if self.out and self.out.resolve() in [
            p.resolve() for p in (self.users, self.candidates) if p
        ]:
            raise InputError(
                f"--out {self.out}: it would replace what is read; choose another file"
            )


# ---- A run


class Trims(list):
    """What was trimmed of each user's prompts, in the order of the users."""

    update = list.append  # as the counter's that it stands for


class Run:
    """A trained run, which summarizes histories and ranks items for them.

    A history is a list of items, oldest first: ids of the run's dataset, or {"id", "attributes"}.
    Models are loaded when they are needed, the summarizer only if a summary is.
    """

    def __init__(self, path: Path, device: torch.device | None = None, **machine):
        """Read the settings and the dataset's items; InputError if nothing was trained here.

        machine: batch_size, pack_tokens and no_compile, as flags have them.
        """
        self.path, self.machine = path, machine
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        given = {"run": path, "given": frozenset({"run"})}
        ranking = {name: machine[name] for name in ("pack_tokens", "no_compile") if name in machine}
        self.settings = evaluate.resolve(evaluate.Settings(**given, **ranking), self.device)
        self.folder = find_model(self.settings.model, self.settings.revision)
        self.form = load_form(self.folder, self.settings.chat)
        data = Path(self.settings.data)
        learned = ("train",) if (data / "train.jsonl").is_file() else ()
        self.domain, texts, splits = load_dataset(data, learned)
        if learned:
            check_learned(path, self.settings.data, splits["train"], texts)
        self.items = Items(texts, self.domain, data / "items.jsonl")
        words = wording(self.settings.paradigm, self.domain, self.form.show)["recommend"]
        check_trained_on(path, self.settings.model, fingerprint(self.folder), words)
        self.budget = evaluate.prompt_budget(self.folder, self.form, self.settings.max_length)
        self.answers = trsr.answer_ids(self.budget.encode, self.domain)
        self.needs_summary = self.settings.paradigm in trsr.SUMMARIZED

    @cached_property
    def key(self) -> str:
        """A hash of what determines a ranking besides the user: the settings and the weights."""
        trained = []  # an adapter's own settings too, such as its alpha
        for file in sorted((self.path / self.settings.kind).iterdir()):
            if file.suffix in (".safetensors", ".json"):
                with open(file, "rb") as opened:
                    trained.append(hashlib.file_digest(opened, "sha256").hexdigest())
        return trsr.content_hash([read_config(self.path), trained])

    @cached_property
    def model(self):
        """The trained model, on the device."""
        return evaluate.load_weights(self.settings, self.folder, self.device)

    # -- Summaries

    @cached_property
    def summarizer(self) -> summarize.Summarizer:
        """The run's summarizer; InputError if it has none, or if its model's files changed."""
        recorded = read_config(self.path).get("summarize")
        if recorded is None:
            what = f"no summaries were made here; run python summarize.py --run {self.path}"
            raise InputError(f"{self.path}: {what}")
        # The form is recorded by its words alone, and the revision by the training.
        block = wording(recorded["paradigm"], self.domain)["block"]
        plain = block == recorded.get("prompts", {}).get("block")
        same = recorded["model"] == self.settings.model
        machine = {n: self.machine[n] for n in ("batch_size", "no_compile") if n in self.machine}
        flags = summarize.Settings(
            run=self.path,
            no_chat=plain,
            revision=self.settings.revision if same else None,
            given=frozenset({"run"}),
            **machine,
        )
        settings = summarize.resolve(flags, self.device)
        made = summarize.Summarizer.of(settings, self.domain)
        # An older run has recorded fewer settings.
        check_settings(self.path, "summarize", {n: made.recorded.get(n) for n in recorded})
        return replace(made, recorded=recorded)

    def summaries(
        self, texts: dict[str, list[str]], rank: int = 0, show: bool = False
    ) -> dict[str, tuple[str, Counter]]:
        """Return each history's summary, and what was trimmed of its prompts.

        texts: the histories' item texts, by user. The model is asked only what it has not been
        asked before; the run has to be locked.
        """
        summarizer, cuts = self.summarizer, {user: Counter() for user in texts}
        answers = Answers(self.path, summarizer.recorded, rank)
        known, found = known_summaries(self.path), {}
        for user, items in texts.items():
            root = recalled(summarizer.task(items, cuts[user]), summarizer.form, answers)
            stored = known.get(trsr.content_hash([summarizer.recorded, items]))
            if root is None:
                cuts[user].clear()
            if root is not None or stored is not None:
                found[user] = root["summary"] if root is not None else stored

        # The last users to finish are to have short histories.
        left = sorted(texts.keys() - found.keys(), key=lambda user: (-len(texts[user]), user))
        if left:
            own = summarizer.settings
            shape = own.block_size, own.paradigm == "hierarchical", own.max_new_tokens
            with WritingBar([len(texts[u]) for u in left], *shape, hidden=not show) as bar:
                generator = summarizer.generator([texts[user] for user in left], self.device)
                writer = Writer(generator, summarizer.form, bar, answers)
                tasks = ((user, summarizer.task(texts[user], cuts[user])) for user in left)
                for user, root in run_tasks(tasks, writer):
                    found[user] = root["summary"]
                    bar.user_done()
        return {user: (found[user], cuts[user]) for user in texts}

    def summarize(self, history: list) -> str:
        """Return the summary of a history, "" if it is empty."""
        items = Items(self.items.texts, self.domain, self.items.source)
        ids = items.read("history", history)
        return self._summary([items.texts[item] for item in ids])

    def _summary(self, texts: list[str]) -> str:
        with locked(self.path):
            collect_answers(self.path)
            ((summary, _),) = self.summaries({"": texts}).values()
            collect_answers(self.path)
        return summary

    # -- Ranking

    def rank(
        self, history: list, candidates: list | None = None, top: int | None = None
    ) -> list[tuple[str, float]]:
        """Return (id, probability of Yes) of the candidates, the best first.

        candidates: items; None means all of the dataset's that are not in the history. top: how
        many to return, None for all.
        """
        if top is not None and top < 1:
            raise InputError(f"top={top}: expected a whole number from 1, or None for all")
        items = Items(self.items.texts, self.domain, self.items.source)
        ids = items.read("history", history)
        own, shared = None, None
        if candidates is None:
            shared = Shared.of(items.catalogue, items)
        else:
            own = items.read("candidates", candidates, once=True)
        user = make_user("user", "", ids, own, shared, items)
        summaries = {}
        if self.needs_summary:
            summaries[""] = self._summary([items.texts[item] for item in ids])
        ((_, ranked, _),) = self.rankings([user], items.texts, summaries)
        return best(ranked, top)

    def rankings(
        self,
        users: Sequence[User],
        texts: dict[str, str],
        summaries: dict[str, str],
        show: bool = False,
    ) -> Iterator[tuple[User, Ranked, Counter]]:
        """Yield (user, what came out, what was trimmed) as users finish.

        texts: of all items, by id. summaries: by user.
        """
        trims = Trims()
        s, budget = self.settings, replace(self.budget, trimmed=trims)
        prompt = s.paradigm, self.domain, texts, summaries, s.history_items
        recommender = trsr.Recommender(*prompt, budget)
        shown, examples = [user.shown(texts) for user in users], [user.example for user in users]
        ranking = CatalogueRanking.among(recommender, shown, examples, show)
        batching = Batching.on(self.device, s.pack_tokens, on_gpus=16384)
        # Worker processes tokenize while the weights are loaded.
        packs = catalogue_packs(ranking, range(len(users)), batching, show)
        tally = Tally(examples, ranking.candidates, best=None)
        for pack, found in evaluate.scored(self.model, prefetch(packs), self.answers, total=True):
            lengths = pack.positions[list(pack.leaves.values())] + 1  # a leaf ends its prompt
            tally.add(pack.leaves, found, lengths.tolist())
            for u in list(tally.ranked):
                yield users[u], tally.ranked.pop(u), Counter(trims[u])


def best(ranked: Ranked, top: int | None) -> list[tuple[str, float]]:
    """Return the best (id, probability) pairs; of equal ones the first candidate goes first."""
    pairs = zip(ranked.candidates, ranked.scores, strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])[:top]


# ---- Many users


def part_of(out: Path, rank: int) -> Path:
    """Return what a process writes of a file; no file of the user's own has such a name."""
    return out.with_name(f".{out.name}.recommend-part{rank}")


def parts_of(out: Path) -> list[Path]:
    """Return what processes wrote of a file."""
    own = re.compile(re.escape(part_of(out, 0).name.removesuffix("0")) + r"\d+")
    return sorted(path for path in out.parent.iterdir() if own.fullmatch(path.name))


def collect_lines(out: Path) -> dict[str, dict]:
    """Return the finished lines by user, and merge what each process wrote into one file."""
    parts, found = parts_of(out), {}
    for source in [out, *parts] if out.is_file() else parts:
        try:
            for _, record in read_jsonl(source, OUT_FIELDS, torn=source in parts):
                found[record["user"]] = record
        except InputError as error:
            what = f"{error}; not a file that recommend wrote, so it is not replaced"
            raise InputError(f"--out {what}: choose another") from None
    if parts:
        write_jsonl(out, found.values())
    for part in parts:
        part.unlink()
    return found


def recommend(flags: Settings, run: Run) -> None:
    """Rank for all users of a file."""
    rank, world = ranks()
    users = read_users(flags.users, run.items, shared_of(flags, run.items))
    keys = {user.name: trsr.content_hash([run.key, user.key, flags.top]) for user in users}
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    with locked(run.path, hold=rank == 0):
        if rank == 0:
            collect_answers(run.path)
            collect_lines(flags.out)
        gather(None)  # nobody reads before the first process has collected
        lines = read_jsonl(flags.out, OUT_FIELDS) if flags.out.is_file() else ()
        done = {record["user"]: record["key"] for _, record in lines}
        pending = [user for user in users if done.get(user.name) != keys[user.name]]
        if rank == 0:
            announce(run, len(users), len(users) - len(pending))

        sizes = [len(user.candidates) + len(user.history) for user in pending]
        mine = [pending[i] for i in sorted(share_out(sizes, world)[rank])]
        if mine:
            rank_and_write(flags, run, mine, keys)
        gather(None)
        if rank == 0:
            collect_answers(run.path)
            found = collect_lines(flags.out)
            write_jsonl(flags.out, [found[user.name] for user in users])
            print(f"wrote   {flags.out} ({len(users)} users); peak {peak_memory(run.device)}")


def trained(settings: evaluate.Settings) -> str:
    """Return in words what training has made of the model so far."""
    of = f", unfinished: the best of {settings.epochs}" if settings.epochs else ""
    return f"trained ({settings.kind}{of})"


def announce(run: Run, n_users: int, n_done: int) -> None:
    """Print what is about to be ranked."""
    s, world = run.settings, ranks()[1]
    print(f"users   {n_users}, {n_done} of them ranked before")
    print(f"model   {s.model}, {trained(s)}, {s.dtype}, on {world} x {run.device.type}")
    print(
        f"prompt  {s.paradigm}, {s.history_items} recent items, {run.budget.tokens} tokens at most"
    )


def rank_and_write(flags: Settings, run: Run, users: list[User], keys: dict[str, str]) -> None:
    """Summarize and rank this process's users, and append each to its part of --out."""
    rank, _ = ranks()
    texts = run.items.texts
    summaries: dict[str, tuple[str, Counter]] = {}
    if run.needs_summary:
        histories = {user.name: [texts[i] for i in user.history] for user in users}
        summaries = run.summaries(histories, rank, show=rank == 0)
    said = {name: summary for name, (summary, _) in summaries.items()}
    part = part_of(flags.out, rank)
    for user, ranked, trimmed in run.rankings(users, texts, said, show=rank == 0):
        pairs = best(ranked, flags.top)
        if user.name in summaries:
            trimmed += summaries[user.name][1]
        record = {
            "user": user.name,
            "items": [item for item, _ in pairs],
            "probabilities": [probability for _, probability in pairs],
            "candidates": ranked.number,
            "summary": said.get(user.name),
            "trimmed": dict(sorted(trimmed.items())),
            "key": keys[user.name],
        }
        append_jsonl(part, record)


# ---- The command


def shared_of(flags: Settings, items: Items) -> Shared | None:
    """Return the candidates of users without their own, if there are any."""
    if flags.candidates:
        return read_shared(flags.candidates, items)
    return Shared.of(items.catalogue, items) if flags.catalogue else None


def print_one(flags: Settings, run: Run) -> None:
    """Rank for the user of the command line, and print a table."""
    history = parse_entries(flags.history)
    shared = shared_of(flags, run.items)
    if run.settings.epochs:
        print(f"model   {run.settings.model}, {trained(run.settings)}")
    if run.needs_summary:
        print(textwrap.fill(f"summary: {run.summarize(history)}", WIDTH))
    ids = run.items.read("--history", history)
    candidates = [{"id": i} for i in shared.without(ids)]
    print("\nrank  probability  item")
    for place, (item, probability) in enumerate(run.rank(history, candidates, flags.top), 1):
        print(f"{place:>4}  {probability:>11.4f}  {item}: {run.items.texts[item]}"[:WIDTH])


def main() -> None:
    """Rank items for the users of a file, or for one of the command line."""
    flags = parse_settings(Settings, __doc__)
    flags.check()
    _, world, device = join_processes(flags.timeout)
    if flags.users is None and world > 1:
        raise InputError("--history is one user; run it without torchrun")
    machine = {name: getattr(flags, name) for name in ("batch_size", "pack_tokens", "no_compile")}
    run = Run(flags.run, device, **machine)
    if flags.users is None:
        print_one(flags, run)
    else:
        recommend(flags, run)


if __name__ == "__main__":
    run_script(main)
