"""The runs of an experiment: from the data to the ranks, in stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import paper
from experiments.stages import Stage, make_stage, slug, split_flags
from experiments.tuning import DEFAULTS, Choice, combinations
from launch.command import option
from launch.embedded import MODEL
from launch.numbers import natural, positive, positive_real, seed_number
from prepare.dataset import default_model
from runfolder.results import Question, parts_of
from trsr import PARADIGMS, SUMMARIZED, InputError

RULE = "rule"  # in a summarizer's place: experiments.ruled writes the summaries
LAST, ALL = "last", "all"  # of train.py --targets
LRS, RANKS = (1e-4, 3e-4, 1e-3), (8, 32)  # of --tune


@dataclass(frozen=True)
class Settings:
    """The flags that all experiments share; each adds its models and what it varies."""

    data: str = option("data/demo", "dataset folder made by prepare", group="experiment")
    out: Path = option(
        Path("runs/experiments"), "folder for all run folders; experiments can share it", Path
    )
    history_items: int = option(paper.HISTORY_ITEMS, "recent items in the prompt", natural)
    seeds: tuple[int, ...] = option(
        (0,), "one run per seed; the table shows the means", seed_number, nargs="+"
    )
    k: tuple[int, ...] = option((3, 5, 10), "cut-offs of the metrics", positive, nargs="+")
    jobs: int = option(1, "stages that run at once, spread over the GPUs that there are", positive)
    nproc: int = option(
        1, "processes of summarize.py, train.py and evaluate.py, started by torchrun", positive
    )
    dry_run: bool = option(
        False, "report the tokens of what is left to run, from a sample of users, and stop"
    )
    speed: float | None = option(
        None,
        "tokens that train.py learns per second, for --dry-run (unset: as in finished runs)",
        positive_real,
    )
    fresh: bool = option(False, "start a process for every stage, instead of workers for many")
    summarize: str = option(
        "", 'more flags for summarize.py, such as "--int8 --batch-size 32"', metavar="FLAGS"
    )
    train: str = option(
        "", "more flags for train.py; write a single one as --train=--no-compile", metavar="FLAGS"
    )
    evaluate: str = option("", "more flags for evaluate.py", metavar="FLAGS")

    def grid(self) -> Sequence[Choice]:
        """Return what is chosen from for a language model, in order."""
        return DEFAULTS


@dataclass(frozen=True)
class TunedSettings(Settings):
    """The flags of experiments that can choose learning rates and ranks by validation."""

    lrs: tuple[float, ...] = option(
        (), "learning rates to choose from, by validation", positive_real, "tuning", nargs="+"
    )
    ranks: tuple[int, ...] = option((), "ranks of the adapter to choose from", positive, nargs="+")
    tune: bool = option(False, "choose from default values where none are given")

    def grid(self) -> Sequence[Choice]:
        """Return what is chosen from for a language model, in order."""
        lrs = self.lrs or (LRS if self.tune else ())
        ranks = self.ranks or (RANKS if self.tune else ())
        return combinations({"--lr": lrs, "--lora-r": ranks})


# ---- Language models


def model_of(settings: Settings, flag: str) -> str:
    """Return the model that a flag names; unset, the embedded one, for the data that it knows."""
    return getattr(settings, flag) or default_model(settings.data, MODEL, f"--{flag}")


@dataclass(frozen=True)
class LanguageModel:
    """What a row's prompts show, and which models make and read them.

    `{seed}` in a model's name is replaced by the run's seed.
    """

    paradigm: str
    summarizer: str | None  # None without summaries
    recommender: str
    items: int  # recent ones in the prompt
    budget: int | None = None  # tokens of a prompt; None: train.py's default
    targets: str = LAST  # of a user
    more: str = ""  # flags for train.py that come after those of --train, so that they win

    @classmethod
    def of(cls, settings: Settings, paradigm: str, items: int, **more) -> "LanguageModel":
        """Return what the flags --summarizer and --recommender say, the former if it is needed."""
        summarizer = model_of(settings, "summarizer") if paradigm in SUMMARIZED else None
        return cls(paradigm, summarizer, model_of(settings, "recommender"), items, **more)

    def of_seed(self, model: str, seed: int) -> str:
        """Return the name of the model for a seed."""
        return model.replace("{seed}", str(seed))

    def folder(self, settings: Settings, seed: int, *more: str) -> Path:
        """Return the run folder, whose name says all that can differ."""
        parts: list[object] = [self.paradigm]
        if self.paradigm in SUMMARIZED:
            parts.append(self.of_seed(self.summarizer, seed))
        parts.append(self.of_seed(self.recommender, seed))
        if PARADIGMS[self.paradigm] == "last":
            parts.append(f"items{self.items}")
        if self.budget is not None:
            parts.append(f"max{self.budget}")
        if self.targets != LAST:
            parts.append(f"targets-{self.targets}")
        return settings.out / slug(*parts, *filter(None, (self.more, *more)))


def language_model_run(
    settings: Settings, model: LanguageModel, choice: Choice, seed: int
) -> list[Stage]:
    """Return the stages from the data to the ranks of a language model, which the last one makes.

    Runs that differ only in seed, items, budget, recommender or choice share their summaries.
    """
    stages, shared = [], {}
    if model.paradigm in SUMMARIZED:
        summarizer = model.of_seed(model.summarizer, seed)
        stages.append(summary_stage(settings, model.paradigm, summarizer, model.targets != LAST))
        shared = {"summaries": stages[0].run, "before": stages[0].key}

    run = model.folder(settings, seed, choice.label, f"seed{seed}")
    recommender, own = model.of_seed(model.recommender, seed), []
    if model.budget is not None:
        own += ["--max-length", model.budget]
    if model.targets != LAST:
        own += ["--targets", model.targets]
    taken = [*choice.names, *map(str, own[::2])]
    flags = split_flags("train", settings.train, taken)
    flags += split_flags("positions", model.more, taken)
    flags += [*choice.flags, *own, "--data", settings.data, "--paradigm", model.paradigm]
    flags += ["--model", recommender, "--run-dir", run]
    flags += ["--seed", seed, "--history-items", model.items]
    train = make_stage(run, "train.py", flags, ("adapter", "model"), recommender, **shared)
    return [*stages, train, rank_stage(settings, train)]


def rank_stage(settings: Settings, train: Stage) -> Stage:
    """Return the stage that ranks the test users after a training."""
    own, makes = evaluation(settings)
    flags = [*own, "--run-dir", train.run, "--k", *settings.k]
    return make_stage(train.run, "evaluate.py", flags, makes, None, train.key)


def evaluation(settings: Settings, *parts: str) -> tuple[list[str], tuple[str]]:
    """Return the value of --evaluate as flags, and the file of ranks that is written with them.

    parts: what the experiment's own flags add to the file's name.
    """
    own = ("--k", "--split", "--users", "--scores", "--candidates")
    flags = split_flags("evaluate", settings.evaluate, own)
    # argparse takes abbreviations, and no other flag begins like this one.
    fp8 = any(flag.startswith("--f") and "--fp8".startswith(flag) for flag in flags)
    return flags, (Question(Path(), parts=[*parts, *parts_of(None, fp8=fp8)]).scores.name,)


def untrained_run(
    settings: Settings, model: LanguageModel, choice: Choice, seed: int
) -> list[Stage]:
    """Return the stages to the ranks of the recommender as it is, with a training's settings."""
    train = language_model_run(settings, model, choice, seed)[-2]
    run = model.folder(settings, seed, "untrained")
    own, makes = evaluation(settings, "untrained")
    flags = [*own, "--run-dir", run, "--untrained", "--k", *settings.k]
    ranks = make_stage(run, "evaluate.py", flags, makes, None, train.key, settings_of=train.run)
    return [train, ranks]


def summary_stage(settings: Settings, paradigm: str, summarizer: str, every: bool) -> Stage:
    """Return the stage that makes the summaries, in a run folder of their own.

    every: also of the blocks before each block, which a recurrent chain has anyway.
    """
    more = split_flags("summarize", settings.summarize)
    name, own = ["summaries", paradigm, summarizer], []
    if every and paradigm != "recurrent" and "--every-block" not in more:
        own.append("--every-block")
        name.append("every-block")
    run = settings.out / slug(*name)
    own += ["--data", settings.data, "--paradigm", paradigm]
    makes = ("summaries.jsonl",)
    if summarizer == RULE:
        if every and paradigm != "recurrent":
            raise InputError(f"--summarizer {RULE} has no summaries of the blocks before")
        if "--block-size" in more[:-1]:
            own += ["--block-size", more[more.index("--block-size") + 1]]
        return make_stage(run, "experiments.ruled", [*own, "--run-dir", run], makes, None)
    own += ["--model", summarizer, "--run-dir", run]
    return make_stage(run, "summarize.py", [*more, *own], makes, summarizer)


# ---- Baselines


@dataclass(frozen=True)
class BaselineModel:
    """A baseline, the encoder of its items' texts, and whether it learns from every position."""

    name: str
    encoder: str
    every_position: bool
    more: str  # the value of --baselines


def baseline_run(
    settings: Settings, model: BaselineModel, choice: Choice, seed: int
) -> list[Stage]:
    """Return the one stage of a baseline, which trains it and ranks the test users."""
    encoder = model.encoder.replace("{seed}", str(seed))
    own = ["--data", settings.data, "--run", settings.out, "--encoder", encoder]
    own += ["--models", model.name, "--seeds", seed]
    name = model.name
    if model.every_position:
        own.append("--every-position")
        name += "+positions"
    if choice.label:
        own += ["--label", choice.label]
        name += f"-{choice.label}"
    flags = split_flags("baselines", model.more, [*choice.names, "--encoder"])
    flags += [*choice.flags, *own, "--k", *settings.k]
    weights = encoder.removeprefix("llama:") if encoder.startswith("llama:") else None
    run = settings.out / "baselines" / f"{name}-{seed}"
    return [make_stage(run, "baselines", flags, ("scores-test.jsonl",), weights)]
