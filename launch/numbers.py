"""Numbers with a range, as types for argparse: what is out of range is refused before any work."""

import argparse
import math
from functools import partial

LARGEST = 2**31 - 1  # of a count
LARGEST_SEED = 2**64 - 1  # of torch.manual_seed


def natural(text: str, least: int = 0, most: int = LARGEST) -> int:
    """Return text as a whole number in a range, for argparse; `positive` is the same from 1."""
    if not (text.isascii() and text.isdecimal()) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} to {most}, not {text!r}"
        )
    return int(text)


def real(text: str, least: float = 0.0, below: float = math.inf, open: bool = False) -> float:
    """Return text as a number in [least, below), or with open in (least, below), for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < below or (open and value == least):
        start = f"above {least:g}" if open else f"from {least:g} on"
        end = "" if below == math.inf else f" and below {below:g}"
        raise argparse.ArgumentTypeError(f"expected a number {start}{end}, not {text!r}")
    return value


def count_or(text: str, **words: int) -> int:
    """Return the number that one of the words stands for, or text as a whole number from 1."""
    if text not in words and not text.isdecimal():
        known = ", ".join(words)
        raise argparse.ArgumentTypeError(f"expected {known} or a whole number, not {text!r}")
    return words[text] if text in words else positive(text)


positive = partial(natural, least=1)
seed_number = partial(natural, most=LARGEST_SEED)
positive_real = partial(real, open=True)  # above 0
fraction = partial(real, below=1.0)  # from 0 on, below 1
