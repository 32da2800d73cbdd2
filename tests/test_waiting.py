"""launch/waiting.py and what processes.py makes of it: how many threads, and how they wait."""

from launch.waiting import OWN, wait_politely
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from launch.processes import allowed_threads


def test_threads_do_not_spin_unless_the_user_says_so():
    found = {}
    wait_politely(found)
    assert found == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
    for name in OWN:
        own = {name: "7"}
        wait_politely(own)
        assert own == {name: "7"}


@pytest.mark.parametrize(
    "module",
    ["summarize", "train", "evaluate", "bench.score", "baselines.__main__", "experiments.base"],
)
def test_it_is_decided_before_torch_is_there(module):
    """Torch reads the variables when it is loaded, so each program has to set them before."""
    program = f"""
import importlib.abc, os, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print("passive" == os.environ.get("OMP_WAIT_POLICY"))
            os._exit(0)
sys.meta_path.insert(0, Watch())
import {module}
"""
    kept = {name: value for name, value in os.environ.items() if name not in OWN}
    line = [sys.executable, "-c", program]
    options = {"cwd": ROOT, "env": kept | {"PYTHONUNBUFFERED": "1"}, "text": True}
    done = subprocess.run(line, capture_output=True, check=True, **options)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200000 100000\n", 2), ("150000 100000", 2), ("10000 100000", 1), ("max 100000", 64)],
)
def test_a_container_s_share_of_cores_limits_the_threads(tmp_path, monkeypatch, text, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    path = tmp_path / "cpu.max"
    path.write_text(text)
    assert allowed_threads(64, path) == expected
    assert allowed_threads(1, path) == 1
    assert allowed_threads(64, tmp_path / "none") == 64
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert allowed_threads(64, path) == 64
