"""Write every user's summary by rule, in the place of a model: RUN/summaries.jsonl

    python -m experiments.ruled --data data/mind --run runs/rule
    python train.py --data data/mind --model owner/llama --run runs/rule    # then as always

The rule (experiments.rule) counts what the blocks contain. Which attributes it counts, and which
words it leaves out as common, is decided by the training split alone.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from experiments.corpus import BLOCK, Corpus
from experiments.rule import Rule
from files.jsonl import write_jsonl
from launch.command import option, parse_settings, run_main
from launch.numbers import positive
from prepare.dataset import load_dataset
from state.settings import claim_config, locked
from trsr import Domain, Node, clean, content_hash, split_blocks


def hierarchical(rule: Rule, texts: list[str], domain: Domain, block_size: int) -> Node:
    """Return the tree of a user's summaries: one per block, then one of all of them."""
    leaves = [
        {"summary": clean(rule.summary(items=texts[first:end]), domain), "items": [first, end]}
        for first, end in split_blocks(len(texts), block_size)
    ]
    if len(leaves) == 1:
        return leaves[0]
    merged = rule.summary(summaries=[leaf["summary"] for leaf in leaves])
    return {"summary": clean(merged, domain), "children": leaves}


def recurrent(rule: Rule, texts: list[str], domain: Domain, block_size: int) -> Node:
    """Return the chain of a user's summaries, each of a block and of the summary before it."""
    node: Node = {"summary": "", "items": [0, 0]}
    for first, end in split_blocks(len(texts), block_size):
        before = [node["summary"]] if first else []
        summary = clean(rule.summary(items=texts[first:end], summaries=before), domain)
        node = {"summary": summary, "items": [first, end]} | ({"previous": node} if first else {})
    return node


# Those of trsr.SUMMARIZED that a rule can follow too.
WAYS = {"hierarchical": hierarchical, "recurrent": recurrent}


@dataclass(frozen=True)
class Settings:
    """The flags."""

    data: Path = option(Path("data/demo"), "dataset folder made by prepare", Path)
    run: Path = option(Path("runs/rule"), "run folder", Path)
    paradigm: str = option(
        "hierarchical", "how blocks become one", choices=WAYS, group="summarization"
    )
    block_size: int = option(BLOCK, "items per block", positive)


def main() -> None:
    """Summarize the users of all splits."""
    settings = parse_settings(Settings, __doc__)
    domain, items, splits = load_dataset(settings.data, ("train", "val", "test"))
    rule = Corpus.load(str(settings.data)).rule
    # The fields that other scripts expect of a run's summaries.
    recorded = {
        "data": str(settings.data),
        "model": "rule",
        "paradigm": settings.paradigm,
        "block_size": settings.block_size,
        "max_length": 0,
        "dtype": "none",
        "fingerprint": content_hash([rule.facets, sorted(rule.common)]),
    }
    with locked(settings.run):
        claim_config(settings.run, "summarize", recorded, started=False)
        lines = []
        for example in chain(*splits.values()):
            texts = [items[i] for i in example.history]
            root = WAYS[settings.paradigm](rule, texts, domain, settings.block_size)
            line = {"user": example.user, "paradigm": settings.paradigm}
            line |= {"key": content_hash([recorded, texts]), "summary": root["summary"]}
            lines.append(line | {"tree": root})
        path = settings.run / "summaries.jsonl"
        write_jsonl(path, lines)
    print(f"counts  {', '.join(rule.lists)}")
    print(f"wrote   {path} ({len(lines)} users)")


if __name__ == "__main__":
    run_main(main)
