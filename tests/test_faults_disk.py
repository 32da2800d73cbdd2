"""A full disk: what was written before is intact, and with room the same command ends well."""

import re
import resource
import shutil
import subprocess

import pytest
from helpers import command, count_lines, own_lines, run, wait_until


def run_limited(line, size):
    """Run a command that cannot write files larger than size."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return subprocess.run(line, capture_output=True, text=True, preexec_fn=limit)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB; skips where mounting one is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole(small_disk, fit, fit_command):
    folder, settings = small_disk / "run", {"epochs": 6, "batch_size": 4, "save_every": 1}
    line = fit_command(folder, **settings)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # After the first epoch, which writes an adapter, and long before the last.
    wait_until(lambda: count_lines(folder / "metrics.jsonl") >= 8, process)
    process.kill()
    process.wait()
    names = ("checkpoint", "adapter")
    paths = [path for name in names for path in (folder / name).glob("[!.]*")]
    saved = {path: path.read_bytes() for path in paths}
    size = max(map(len, saved.values()))
    for torn in folder.glob("*/.*"):  # what the kill may have left; it would be room
        torn.unlink()
    room = shutil.disk_usage(small_disk).free - size * 2 // 3
    (small_disk / "other").write_bytes(bytes(room))

    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (said,) = own_lines(done.stderr, "train")
    assert "Traceback" not in done.stderr
    message = r"not written; it needs ([\d.]+) MiB; the previous version is intact"
    needed = float(re.search(message, said)[1])
    assert 0.9 * size < needed * 2**20 < 1.6 * size
    assert "No space left" in said
    assert {path: path.read_bytes() for path in saved} == saved
    assert not list(folder.glob("*/.*"))  # nor a part of another
    (small_disk / "other").unlink()
    fit(folder, **settings)


def test_a_file_size_limit_leaves_nothing_torn(tmp_path, fit, fit_command):
    settings = {"epochs": 1, "batch_size": 4, "save_every": 1}
    done = run_limited(fit_command(tmp_path, **settings), 40_000)
    assert done.returncode == 2, done.stderr
    (said,) = own_lines(done.stderr, "train")
    assert "Traceback" not in done.stderr
    assert "not written; it needs 0.1 MiB" in said
    assert not list((tmp_path / "checkpoint").iterdir())
    fit(tmp_path, **settings)


def test_a_full_disk_keeps_the_summaries_that_are_there(tmp_path, data_folder, model_folder):
    settings = {"data": data_folder, "model": model_folder, "max_new_tokens": 12}
    whole, limited = tmp_path / "whole", tmp_path / "limited"
    run("summarize.py", run=whole, **settings)
    line = command("summarize.py", run=limited, **settings)
    # The answers of all blocks take the most room.
    done = run_limited(line, (whole / "answers.jsonl").stat().st_size * 3 // 4)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "not written" in done.stderr
    assert 0 < count_lines(limited / "summaries.part0.jsonl") < 40
    run("summarize.py", run=limited, **settings)
    assert (limited / "summaries.jsonl").read_bytes() == (whole / "summaries.jsonl").read_bytes()
