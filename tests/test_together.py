"""launch/together.py: flags that contradict each other; --fp8 in the scripts."""

import re

import pytest
from helpers import run, write_dataset

from files.jsonl import read_json
from launch.together import check_together
from train import Settings
from trsr import InputError


@pytest.mark.parametrize(
    ("flags", "world", "message"),
    [
        ({"fp8": True, "lora_r": 0}, 1, "--fp8 is for frozen matrices, and --lora-r 0 trains them"),
        ({"fp8": True, "shard": "zero3"}, 2, "choose --shard zero2 or replicate"),
        ({"fp8": True, "shard": "zero3"}, 1, None),
        ({"fp8": True}, 2, None),
        ({"negatives_past": True}, 1, "--negatives-past is for earlier positions; add --targets"),
        ({"negatives_past": True, "targets": 2}, 1, None),
        ({"cuda_graphs": True}, 2, "choose --shard replicate"),
        ({"cuda_graphs": True, "shard": "replicate"}, 2, None),
        ({"cuda_graphs": True}, 1, None),
        ({"cuda_graphs": True, "activation_checkpointing": True}, 1, "leave --activation-checkpo"),
    ],
)
def test_flags_of_training_that_contradict_each_other(flags, world, message):
    if message is None:
        return check_together(Settings(**flags), world)
    with pytest.raises(InputError, match=message):
        check_together(Settings(**flags), world)


def test_contradicting_flags_are_one_line(tmp_path, fit):
    done = fit(tmp_path, fp8=True, lora_r=0, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "config.json").exists()


def test_fp8_in_training_and_evaluation(tmp_path, fit):
    done = fit(tmp_path, epochs=1, fp8=True)
    assert "fp8, emulated on the CPU" in done.stdout
    again = fit(tmp_path)  # the run's own
    assert "all epochs were trained before" in again.stdout
    fit(tmp_path / "plain", epochs=1)
    assert "fp8" not in read_json(tmp_path / "plain" / "config.json")["train"]  # as older runs'

    # Evaluated with and without, side by side.
    done = [run("evaluate.py", run=tmp_path, fp8=fp8) for fp8 in (False, True)]
    assert ["emulated" in one.stdout for one in done] == [False, True]
    tables = [read_json(tmp_path / name)["table"] for name in ("results.json", "results-fp8.json")]
    assert tables[0].keys() == tables[1].keys()
    scores = [(tmp_path / f"scores-test{end}.jsonl").read_text() for end in ("", "-fp8")]
    assert scores[0] != scores[1]


def test_fewer_negatives_make_fewer_examples(tmp_path, fit):
    data, told = tmp_path / "data", []
    write_dataset(data, negatives=(3, 5, 5))
    for flags in ({}, {"negatives": 1}):
        done = fit(tmp_path / str(len(told)), data=data, **flags, dry_run=True)
        told.append(int(re.search(r"(\d+) tokens an epoch", done.stdout)[1]))
    assert told[1] < told[0]

    done = fit(tmp_path / "more", data=data, negatives=4, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "fewer than --negatives 4" in done.stderr
