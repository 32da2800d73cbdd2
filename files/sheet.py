"""CSV files, for those who go on in a spreadsheet."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from files.atomic import atomic_write


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a line of column names and a line per row, whole or not at all.

    UTF-8, with commas; texts with a comma, a quote or a line break are quoted. None is left empty.
    """
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def table_rows(rows: dict[str, dict]) -> list[list]:
    """Return a line per row and metric of a table (name -> metric -> {"mean", "interval"}).

    Its columns are TABLE.
    """
    return [
        [name, metric, found["mean"], *found.get("interval", (None, None))]
        for name, metrics in rows.items()
        for metric, found in metrics.items()
    ]


TABLE = ("row", "metric", "mean", "low", "high")
