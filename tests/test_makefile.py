"""The Makefile: the steps of the demos are numbered, and an interpreter is found or asked for."""

import os
import re
import shutil
import subprocess

import pytest
from helpers import ROOT

from launch.embedded import SHOP

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
pytestmark = needs_make


def planned(target, folder):
    """The commands of a target, as make would run them."""
    (folder / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    (folder / "pyproject.toml").touch()
    # Below another make it would say which folder it enters and leaves.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    options = {"cwd": folder, "env": alone, "capture_output": True, "text": True, "check": True}
    return subprocess.run(["make", "-n", target], **options).stdout


@pytest.mark.parametrize("target", ["demo", "demo-real"])
def test_the_steps_are_numbered_from_first_to_last_and_the_page_is_named(tmp_path, target):
    plan = planned(target, tmp_path)
    steps = [(int(n), int(of)) for n, of in re.findall(r" (\d+)/(\d+) \"[A-Z].*\.\"\n", plan)]
    assert steps == [(n, len(steps)) for n in range(1, len(steps) + 1)]
    assert len(steps) > 4
    assert f"runs/{target}/report.html" in plan.splitlines()[-1]
    assert "4.9 GB" in plan


def test_the_demo_makes_the_shop_of_the_embedded_default(tmp_path):
    assert f"python {' '.join(SHOP)}\n" in planned("demo", tmp_path)


def test_an_interpreter_that_does_not_run_is_asked_for(tmp_path):
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    shim = tmp_path / "shim"
    shim.write_text("#!/bin/sh\necho 'shim: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    line = ["make", ".venv/bin/python", f"PYTHON={shim}"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "does not run. Is it a version manager's shim?" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_pyenv_shim_is_followed_to_its_interpreter(tmp_path):
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    tools = {
        "python3.99": "echo 'pyenv: command not found' >&2; exit 127",
        "pyenv": f'[ "$1 $3" = "whence python3.99" ] && echo {tmp_path}/found',
        # An interpreter that is too old says so, which is enough to know that it was called.
        "found": '[ "$2" = "" ] || { echo "asked: found" >&2; exit 1; }',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    line = ["make", ".venv/bin/python", "PYTHON=python3.99"]
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(line, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "asked: found" in done.stderr
