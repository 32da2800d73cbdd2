"""What a study has made, in archives from which another machine resumes (experiments.study)."""

import gzip
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.stages import MARKS
from files.atomic import atomic_write
from files.jsonl import read_json, read_jsonl
from trsr import InputError

RANKS, RESULTS, TEXTS = "scores-test*.jsonl", "results*.json", "summaries.jsonl"
DATA = "data.json"  # in the folder of a dataset: which one its runs were made with
SMALL = (
    *(MARKS, "seconds.json", "tokens.json", "trimmed.json", DATA, "config.json"),
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
    texts |= dict.fromkeys(out.glob(f"*/{DATA}"), Path.read_bytes)
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
    """Write the files of archives into out; those that are there already stay as they are.

    But a run of which the archives have all finished stages and more replaces the one in out: what
    was begun there must not pass for what they finished. InputError, before anything is written,
    for an archive that is damaged or of another dataset.
    """
    found = [(path, contents(path, out)) for path in archives]
    known: dict[Path, bytes] = {}
    for path, files in found:
        for target, content in files.items():
            if target.name != DATA:
                continue
            if target not in known:
                known[target] = target.read_bytes() if target.is_file() else content
            if known[target] != content:
                what = f"its runs are of another dataset than those in {target.parent}"
                raise InputError(f"{path}: {what}; choose another --out")

    ahead = {folder for _, files in found for folder in runs_ahead(files)}
    for folder in ahead:
        # A folder with runs in it, such as that of the baselines, is more than what was begun.
        runs = [run for each in (MARKS, RESULTS) for run in folder.glob(f"*/{each}")]
        if folder.is_dir() and not runs and not (folder / MARKS).is_file():
            shutil.rmtree(folder)  # with half an adapter, which no archive has
    for path, files in found:
        new = {
            target: content
            for target, content in files.items()
            if not target.exists() or target.parent in ahead
        }
        for target, content in new.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target, "wb") as file:
                file.write(content)
        print(f"unpacked {len(new)} files from {path} into {out}")


def runs_ahead(files: dict[Path, bytes]) -> list[Path]:
    """Return the run folders of which these files have every finished stage, and one more."""
    found = []
    for path, content in files.items():
        if path.name != MARKS:
            continue
        theirs, ours = json.loads(content), read_json(path) if path.is_file() else {}
        if theirs != ours and ours.items() <= theirs.items():
            found.append(path.parent)
    return found


def contents(path: Path, out: Path) -> dict[Path, bytes]:
    """Return an archive's files by their paths in out; InputError if it is damaged."""
    try:
        # Read to its end, where gzip has the checksum: tarfile would stop before it.
        with gzip.open(path) as file:
            whole = io.BytesIO(file.read())
        with tarfile.open(fileobj=whole, mode="r:") as archive:
            # The filter refuses a path that leads out of the folder.
            return {
                out / tarfile.data_filter(member, str(out)).name: archive.extractfile(member).read()
                for member in archive
                if member.isfile()
            }
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: no archive of a study, or a damaged one ({error})") from None
