"""launch/numbers.py: every number of the scripts has a range, checked before any work."""

import argparse
import re

import pytest
from helpers import run

from launch.numbers import fraction, natural, positive, positive_real, real, seed_number


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (natural, "0", 0),
        (positive, "7", 7),
        (real, "0", 0.0),
        (real, "1e3", 1000.0),
        (positive_real, "1e-9", 1e-9),
        (fraction, "0.999", 0.999),
        (seed_number, str(2**64 - 1), 2**64 - 1),
    ],
)
def test_numbers_within_their_range(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (natural, ["-1", "1.5", "", "x", "٣", str(2**31), "nan"]),
        (positive, ["0", "-3"]),
        (real, ["-0.1", "nan", "inf", "x", ""]),
        (positive_real, ["0", "-1", "nan", "inf"]),
        (fraction, ["1", "1.5", "-0.1", "nan"]),
        (seed_number, ["-1", str(2**64)]),
    ],
)
def test_numbers_beyond_their_range_are_refused(kind, texts):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(text))):
            kind(text)


@pytest.mark.parametrize(
    "flag",
    [
        "--lr=0",
        "--lr=nan",
        "--lr=-0.1",
        "--lora-alpha=0",
        "--lora-dropout=1",
        "--lora-dropout=nan",
        "--weight-decay=-1",
        "--max-grad-norm=-1",
        "--timeout=0",
        "--epochs=0",
        "--k=0",
    ],
)
def test_a_flag_out_of_range_is_one_line_before_any_work(flag):
    done = run("train.py", flag, data="nowhere", check=False)
    name, value = flag.split("=")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert re.match(rf"train\.py: argument {name}: expected .*, not '{value}'", line)


def test_beta_of_one_is_refused():
    done = run("train.py", "--betas", 0.9, 1.0, check=False)
    assert done.returncode == 2
    assert "--betas" in done.stderr


def test_a_seed_may_be_as_large_as_torch_takes(tmp_path, data_folder, model_folder):
    more = ("--seed", 2**64 - 1, "--epochs", 1, "--batch-size", 8)
    flags = {"data": data_folder, "model": model_folder, "run": tmp_path}
    run("train.py", *more, paradigm="recent-only", **flags)
