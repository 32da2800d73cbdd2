"""The files that an evaluation writes, whose names say what was asked.

    results.json            the table of the trained model on all test users
    scores-test.jsonl       a line per user
    report.html             both, for a browser

The names say what differs from that question, so that no evaluation replaces another's files:
results-untrained.json, results-val.json, results-20-users.json, results-mind.json (other data),
results-interim.json (before the last epoch).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Question:
    """What an evaluation asks: which users are ranked, and by which model."""

    run: Path
    split: str = "test"
    parts: Sequence[str] = ()  # what differs from the run's own trained model and data

    def _path(self, name: str, ending: str) -> Path:
        split = [self.split] if self.split != "test" or name == "scores" else []
        return self.run / ("-".join([name, *split, *self.parts]) + ending)

    @property
    def results(self) -> Path:
        """The path of the table."""
        return self._path("results", ".json")

    @property
    def scores(self) -> Path:
        """The path of the users' lines."""
        return self._path("scores", ".jsonl")

    @property
    def report(self) -> Path:
        """The path of the page."""
        return self._path("report", ".html")
