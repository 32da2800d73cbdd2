"""What a study has made, in archives that another machine can go on from (experiments.study)."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from files.atomic import atomic_write
from files.jsonl import read_json, read_jsonl
from trsr import InputError

RANKS, RESULTS, TEXTS = "scores-test*.jsonl", "results*.json", "summaries.jsonl"
SMALL = (
    *("stages.json", "seconds.json", "tokens.json", "trimmed.json", "data.json", "config.json"),
    *("forecast.json", "metrics.jsonl", "*.md", "*.svg", "*.csv"),
)


def pack_up(out: Path) -> list[Path]:
    """Write OUT/study.tar.gz, without any item's text, and OUT/texts.tar.gz; return the paths."""
    small: dict[Path, Callable[[Path], bytes]] = {}
    for pattern in SMALL:
        small |= dict.fromkeys(out.rglob(pattern), Path.read_bytes)
    small |= dict.fromkeys(out.rglob(RESULTS), without_example)
    small |= dict.fromkeys(out.rglob(RANKS), ranks_alone)
    texts = dict.fromkeys(out.glob(f"*/summaries-*/{TEXTS}"), Path.read_bytes)
    wrote = []
    for name, files in (("study.tar.gz", small), ("texts.tar.gz", texts)):
        wrote.append(out / name)
        with (
            atomic_write(wrote[-1], "wb") as file,
            tarfile.open(fileobj=file, mode="w:gz") as archive,
        ):
            for path in sorted(files):
                content = files[path](path)
                about = tarfile.TarInfo(str(path.relative_to(out)))
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))
    return wrote


def without_example(path: Path) -> bytes:
    """Return a file of results without the whole prompt that it shows."""
    found = read_json(path)
    found.pop("example", None)
    return (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()


def ranks_alone(path: Path) -> bytes:
    """Return a file of scores without candidates and scores."""
    lines = [
        json.dumps({name: line[name] for name in ("user", "rank")}, ensure_ascii=False)
        for _, line in read_jsonl(path, {"user": str, "rank": int})
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def unpack(archives: Sequence[Path], out: Path) -> None:
    """Lay the files of archives into out; those that are there already stay as they are."""
    for path in archives:
        count = 0
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.isfile() and not (out / member.name).exists():
                        archive.extract(member, out, filter="data")
                        count += 1
        except (tarfile.TarError, EOFError) as error:
            raise InputError(f"{path}: no archive of a study ({error})") from None
        print(f"laid    {count} files of {path} into {out}")
