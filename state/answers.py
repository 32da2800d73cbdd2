"""What the summarizer answered, by what determines it: RUN/answers.jsonl

No prompt is asked twice in a run: a history that grew costs its new blocks and what stands above
them, and an interruption loses no finished block. A prompt is kept as a hash. The file only saves
work: without it, the same answers are asked for again.
"""

from pathlib import Path

from files.jsonl import append_jsonl, read_jsonl, write_jsonl
from trsr import InputError, content_hash

# ended: by an end token ("end"), at the limit ("limit"), or where another turn began ("turn").
FIELDS = {"key": str, "answer": str, "ended": str}
ENDS = ("end", "limit", "turn")


class Answers:
    """A run's answers, and a process's part of answers.jsonl, to which new ones are appended."""

    def __init__(self, run: Path, settings: dict, rank: int = 0):
        """Read what was collected; InputError for a broken file.

        settings: what summarize.py recorded, which with the prompt determines an answer. The name
        of the dataset is no part of it.
        """
        self.settings = content_hash({n: v for n, v in settings.items() if n != "data"})
        self.part = run / f"answers.part{rank}.jsonl"
        whole = run / "answers.jsonl"
        self.found = read_answers(whole) if whole.is_file() else {}

    def _key(self, prompt: str) -> str:
        return content_hash([self.settings, prompt])

    def get(self, prompt: str) -> tuple[str, str] | None:
        """Return a prompt's answer and how it ended; None if it has not been asked yet."""
        return self.found.get(self._key(prompt))

    def add(self, prompt: str, answer: str, ended: str) -> None:
        """Keep what the model answered to a prompt."""
        key = self._key(prompt)
        self.found[key] = answer, ended
        append_jsonl(self.part, {"key": key, "answer": answer, "ended": ended})


def read_answers(*paths: Path) -> dict[str, tuple[str, str]]:
    """Return (answer, how it ended) by key, of answers.jsonl and of parts of it.

    Raises InputError for a broken file. The last line of a part may be cut short.
    """
    found = {}
    for path in paths:
        try:
            for where, record in read_jsonl(path, FIELDS, torn=".part" in path.name):
                if record["ended"] not in ENDS:
                    what = f"field 'ended' is {record['ended']!r}, expected one of {ENDS}"
                    raise InputError(f"{where}: {what}")
                found[record["key"]] = record["answer"], record["ended"]
        except InputError as error:
            raise InputError(f"{error}; delete {path.name}, which only saves work") from None
    return found


def collect_answers(run: Path) -> None:
    """Merge what each process wrote into one file. No process may be writing."""
    if not (parts := sorted(run.glob("answers.part*.jsonl"))):
        return
    whole = run / "answers.jsonl"
    found = read_answers(*([whole] if whole.is_file() else []), *parts)
    lines = (dict(zip(FIELDS, (key, *value), strict=True)) for key, value in found.items())
    write_jsonl(whole, lines)
    for part in parts:
        part.unlink()
