"""docs/extending.md: its files and commands, run as they stand there."""

import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, read_lines, run_here

import trsr
from files.jsonl import read_json
from prepare.dataset import load_dataset

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
(WORDS,) = (text for kind, text in BLOCKS if kind == "json")
(CODE,) = (text for kind, text in BLOCKS if kind == "python")
OF_DOMAIN, OF_PARADIGM = (text.splitlines() for kind, text in BLOCKS if kind == "sh")
SMALLER = {  # so that it takes seconds
    "summarize": ["--max-new-tokens", "8", "--block-size", "2"],
    "train": ["--epochs", "1", "--batch-size", "4"],
}


def execute(lines, model):
    """Run the commands in this process, one after the other."""
    for line in lines:
        python, *words = shlex.split(line.replace("owner/llama", str(model)))
        assert python == "python"
        name = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
        arguments = words[2:] if words[0] == "-m" else words[1:]
        main = importlib.import_module(name).main
        done = run_here(main, name, [*arguments, *SMALLER.get(name, [])])
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def films(tmp_path_factory, model_folder):
    """A folder in which the commands about the domain have been run."""
    folder = tmp_path_factory.mktemp("films")
    (folder / "films.json").write_text(WORDS)
    rows = ["user_id,item_id,timestamp"]
    rows += [f"u{u},m{(u * 7 + n) % 40},{n}" for u in range(24) for n in range(12)]
    (folder / "ratings.csv").write_text("\n".join(rows) + "\n")
    names = ["[Films Watched]", "[Historical Purchase Data]", *(f"Film {n}" for n in range(38))]
    items = [f"m{n},{name}" for n, name in enumerate(names)]
    (folder / "movies.csv").write_text("\n".join(["item_id,title", *items]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        execute(OF_DOMAIN, model_folder)
    return folder


def test_a_paradigm_whose_name_is_taken_is_told_in_one_line(tmp_path):
    (tmp_path / "paradigms").mkdir()
    shutil.copy(ROOT / "paradigms/__init__.py", tmp_path / "paradigms")
    code = "from trsr import register\n\nregister('none', recent='all')\n"
    (tmp_path / "paradigms/mine.py").write_text(code)
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", "import launch.command"]
    done = subprocess.run(command, capture_output=True, text=True, env=path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("paradigms/mine.py: paradigm 'none': the name is taken")
    assert done.stderr.count("\n") == 1


def test_each_half_is_a_page():
    halves = PAGE.split("\n## ")[1:]
    assert [half.split(":")[0] for half in halves] == ["A domain", "A paradigm"]
    assert all(len(half.splitlines()) < 60 for half in halves)


def test_a_domain_is_a_file_of_words(films):
    domain, items, splits = load_dataset(films / "data/films", ("train", "val", "test"))
    assert domain.recommend == "Decide whether the user will watch the next film."
    assert items["m0"] == "Title: (Films Watched)"  # a title in the place of a header
    assert items["m1"] == "Title: [Historical Purchase Data]"  # no header here
    config = read_json(films / "runs/films/config.json")
    assert config["train"]["prompt"].startswith(f"### User:\n{domain.recommend}")
    assert "[Films Watched]\n1. ITEM" in config["summarize"]["prompts"]["block"]
    assert len(read_lines(films / "runs/films/scores-test.jsonl")) == len(splits["test"])


@pytest.fixture
def _sliding(monkeypatch):
    """The page's paradigm is known, and forgotten afterwards."""
    for registry in (trsr.PARADIGMS, trsr.SUMMARIZED):
        monkeypatch.setitem(registry, "sliding", None)
        del registry["sliding"]
    exec(CODE, {})


@pytest.mark.usefixtures("_sliding")
def test_a_paradigm_is_a_generator_and_its_entry(films, model_folder, monkeypatch):
    monkeypatch.chdir(films)
    execute(OF_PARADIGM, model_folder)
    run = films / "runs/sliding"
    assert read_json(run / "config.json")["train"]["paradigm"] == "sliding"
    assert read_json(run / "results.json")["paradigm"] == "sliding"
    _, _, splits = load_dataset(films / "data/films", ("train", "val", "test"))
    lengths = {e.user: len(e.history) for found in splits.values() for e in found}
    for line in read_lines(run / "summaries.jsonl"):
        n = lengths[line["user"]]
        assert line["tree"] == {"summary": line["summary"], "items": [n - 4, n]}


@pytest.mark.usefixtures("_sliding")
def test_tables_have_rows_for_it_if_asked():
    table2 = runpy.run_path(ROOT / "experiments" / "table2.py")
    assert list(table2["OWN"]) == ["sliding", "sliding-alone"]
    assert "recurrent" in table2["Settings"].rows
    assert "sliding" not in table2["Settings"].rows


def test_every_command_imports_the_files_in_the_folder(tmp_path):
    for folder in ("launch", "paradigms"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "trsr.py", tmp_path)
    (tmp_path / "paradigms" / "sliding.py").write_text(CODE)
    script = "import launch.command, trsr; print(*trsr.PARADIGMS, '/', *trsr.SUMMARIZED)"
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    known, summarized = done.stdout.split("/")
    assert known.split() == [*trsr.PARADIGMS, "sliding"]
    assert summarized.split() == [*trsr.SUMMARIZED, "sliding"]
