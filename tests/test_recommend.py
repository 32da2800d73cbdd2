"""recommend/: users from outside of the dataset get what evaluate.py would give them."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, count_lines, flags, read_lines, run, run_here, write_dataset, write_lines
from safetensors.torch import load_file, save_file

import summarize
from files.jsonl import read_json, write_json
from recommend import load_run
from recommend.__main__ import main
from trsr import InputError

COLD = {"id": "new", "attributes": {"Title": "blue lamp", "Color": "coral"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_folder):
    """A run with summaries, trained and evaluated, its data, and the test users as a file."""
    parent = tmp_path_factory.mktemp("recommend")
    data = write_dataset(parent / "data", history=(4, 14))
    common = {"data": data, "model": model_folder, "run": parent / "run"}
    run("summarize.py", **common, max_new_tokens=12)
    run("train.py", **common, epochs=1, batch_size=8, lr=0.01)
    run("evaluate.py", run=parent / "run")
    users = []
    for example in read_lines(data / "test.jsonl"):
        candidates = [*example["negatives"], example["positive"]]
        users.append({n: example[n] for n in ("user", "history")} | {"candidates": candidates})
    write_lines(parent / "users.jsonl", users)
    return parent


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the run, which the test may change."""
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "users.jsonl", tmp_path / "users.jsonl")
    return tmp_path


def call(folder, check=True, processes=1, **settings):
    """Run python -m recommend on users.jsonl, or with other settings."""
    given = {"run": folder / "run", "users": folder / "users.jsonl", "out": folder / "out.jsonl"}
    given |= settings
    if processes > 1:
        given["run_dir"] = given.pop("run")
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        line += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "recommend"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*line, *flags(**given)], env=environment, capture_output=True, text=True, timeout=600
        )
    else:
        done = run_here(main, "recommend", flags(**given))
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def ranked(folder):
    """The lines of --out by user."""
    return {record["user"]: record for record in read_lines(folder / "out.jsonl")}


def pairs(record):
    return dict(zip(record["items"], record["probabilities"], strict=True))


def assert_same(a, b):
    """Two files say the same but for rounding, since packs may differ."""
    assert [r["user"] for r in read_lines(a)] == [r["user"] for r in read_lines(b)]
    for one, other in zip(read_lines(a), read_lines(b), strict=True):
        assert pairs(one) == pytest.approx(pairs(other), abs=1e-5)
        assert one["summary"] == other["summary"]
        assert one["key"] == other["key"]


# ---- What is ranked


def test_the_datasets_users_get_what_evaluate_gives_them(folder):
    call(folder)
    found = ranked(folder)
    evaluated = read_lines(folder / "run/scores-test.jsonl")
    summaries = {r["user"]: r["summary"] for r in read_lines(folder / "run/summaries.jsonl")}
    assert list(found) == [line["user"] for line in evaluated]
    for line in evaluated:
        record = found[line["user"]]
        scores = dict(zip(line["candidates"], line["scores"], strict=True))
        assert pairs(record) == pytest.approx(scores, abs=1e-5)
        assert record["probabilities"] == sorted(record["probabilities"], reverse=True)
        assert record["summary"] == summaries[line["user"]]
        assert record["candidates"] == 6
        assert record["trimmed"] == {}


def test_a_cold_item_counts_by_its_text_alone(made, folder):
    users = read_lines(folder / "users.jsonl")
    items = {item["id"]: item for item in read_lines(made / "data/items.jsonl")}
    known = users[0]
    cold = {"user": "cold"}
    for name in ("history", "candidates"):
        cold[name] = [items[i] | {"id": f"cold {i}"} for i in known[name]]
    write_lines(folder / "users.jsonl", [known, cold])
    call(folder)
    found = ranked(folder)
    named = {f"cold {i}": score for i, score in pairs(found[known["user"]]).items()}
    assert pairs(found["cold"]) == pytest.approx(named, abs=1e-5)
    assert found["cold"]["summary"] == found[known["user"]]["summary"]


def test_the_catalogue_is_all_that_is_not_in_the_history(made, folder):
    users = read_lines(folder / "users.jsonl")
    bare = [{n: user[n] for n in ("user", "history")} for user in users]
    write_lines(folder / "users.jsonl", bare)
    call(folder, catalogue=True, top=7)
    found = ranked(folder)
    ids = [item["id"] for item in read_lines(made / "data/items.jsonl")]
    loaded = load_run(folder / "run")
    for user in bare[:2]:
        rest = [i for i in ids if i not in user["history"]]
        expected = loaded.rank(user["history"], rest)
        assert len(expected) == len(rest)
        assert found[user["user"]]["candidates"] == len(rest)
        scores = [score for _, score in expected[:7]]
        assert found[user["user"]]["probabilities"] == pytest.approx(scores, abs=1e-5)
        assert loaded.rank(user["history"], top=7)[0][1] == pytest.approx(scores[0], abs=1e-5)

    # The same as a file, with a cold item besides.
    (folder / "some.txt").write_text("\n".join([*ids, json.dumps(COLD)]) + "\n")
    call(folder, candidates=folder / "some.txt", top=100)
    for user in bare:
        record = ranked(folder)[user["user"]]
        assert set(record["items"]) == {*ids, "new"} - {*user["history"]}


def test_functions_and_the_command_agree(folder):
    users = read_lines(folder / "users.jsonl")
    users[0]["history"].append(COLD)
    write_lines(folder / "users.jsonl", users)
    call(folder, top=3)
    loaded = load_run(folder / "run")
    for user in users:
        record = ranked(folder)[user["user"]]
        assert loaded.summarize(user["history"]) == record["summary"]
        best = loaded.rank(user["history"], user["candidates"], top=3)
        assert [score for _, score in best] == pytest.approx(record["probabilities"], abs=1e-5)
    assert loaded.summarize([]) == ""
    with pytest.raises(InputError, match=r"history: item 'new' is not in .*items.jsonl; give it"):
        loaded.summarize(["new"])  # what was cold for one call is not known to the next


def test_one_user_of_the_command_line(folder):
    user = read_lines(folder / "users.jsonl")[0]
    (folder / "some.txt").write_text("\n".join(user["candidates"]))
    history = [*user["history"], json.dumps(COLD)]
    given = {"users": None, "out": None, "candidates": folder / "some.txt", "top": 2}
    done = call(folder, history=history, **given)
    best = load_run(folder / "run").rank([*user["history"], COLD], user["candidates"], top=2)
    rows = re.findall(r"^ +(\d)  +(0\.\d{4})  (\w+): Title", done.stdout, re.MULTILINE)
    assert [(item, float(score)) for _, score, item in rows] == [
        (item, pytest.approx(score, abs=1e-4)) for item, score in best
    ]


def test_a_run_that_needs_no_summary_loads_no_summarizer(trained_run, data_folder, tmp_path):
    user = read_lines(data_folder / "test.jsonl")[0]  # a dataset's own line is understood
    write_lines(tmp_path / "users.jsonl", [user | {"candidates": user["negatives"]}])
    call(tmp_path, run=trained_run)
    (record,) = read_lines(tmp_path / "out.jsonl")
    assert record["summary"] is None
    assert set(record["items"]) == set(user["negatives"])
    assert load_run(trained_run).rank(user["history"], user["negatives"], top=1)[0][
        0
    ] == pytest.approx(record["items"][0])
    with pytest.raises(InputError, match="no summaries were made here"):
        load_run(trained_run).summarize(user["history"])


# ---- What is not done twice


def test_a_grown_history_asks_for_its_new_blocks_and_a_rerun_for_nothing(folder, monkeypatch):
    users = read_lines(folder / "users.jsonl")
    call(folder)
    before = count_lines(folder / "run/answers.jsonl")
    for n, user in enumerate(users):
        attributes = COLD["attributes"]
        new = {"attributes": attributes | {"Title": f"lamp {n}"}, "id": f"new {n}"}
        user["history"].append(new)
    write_lines(folder / "users.jsonl", users)
    call(folder)
    blocks = sum(1 + (len(user["history"]) > 5) for user in users)  # the last one, and its merge
    assert 0 < count_lines(folder / "run/answers.jsonl") - before <= blocks

    def never(self, texts, device):
        raise AssertionError("the summarizer was loaded, and all is known")

    monkeypatch.setattr(summarize.Summarizer, "generator", never)
    done = call(folder, top=4)  # all are ranked again
    assert f"users   {len(users)}, 0 of them ranked before" in done.stdout


def test_an_interrupted_call_resumes(folder):
    call(folder)
    lines = read_lines(folder / "out.jsonl")
    shutil.copy(folder / "out.jsonl", folder / "whole.jsonl")
    (folder / "out.jsonl").unlink()
    marked = lines[1] | {"trimmed": {"kept": 1}}  # shows that a line was not made again
    write_lines(folder / ".out.jsonl.recommend-part0", [lines[2]])
    write_lines(folder / ".out.jsonl.recommend-part1", [marked])
    with open(folder / ".out.jsonl.recommend-part1", "a") as file:
        file.write('{"user": "torn')
    done = call(folder)
    assert "2 of them ranked before" in done.stdout
    assert ".out.jsonl.recommend-part1:2: dropped" in done.stderr
    assert_same(folder / "out.jsonl", folder / "whole.jsonl")
    assert ranked(folder)[marked["user"]] == marked
    assert not list(folder.glob(".out*"))


def test_files_of_the_user_s_own_stay_whatever_their_names(folder):
    own = [folder / name for name in ("out[1].part1.jsonl", "out1.jsonl", ".out[1].jsonl.part0")]
    for path in own:
        path.write_text("mine")
    call(folder, out=folder / "out[1].jsonl")
    assert len(read_lines(folder / "out[1].jsonl")) == len(read_lines(folder / "users.jsonl"))
    assert [path.read_text() for path in own] == ["mine"] * 3


def test_an_unfinished_training_is_announced(folder):
    checkpoint = folder / "run/config.json"
    config = read_json(checkpoint)
    config["train"]["epochs"] += 1
    write_json(checkpoint, config)
    assert "trained (adapter, unfinished: the best of 1 of 2 epochs)" in call(folder).stdout


def test_what_changed_is_ranked_again_and_nothing_else(made, folder):
    call(folder)
    users = read_lines(folder / "users.jsonl")
    users[1]["history"] = users[1]["history"][:-1]
    write_lines(folder / "users.jsonl", users[1:])
    assert "users   3, 2 of them ranked before" in call(folder).stdout
    assert list(ranked(folder)) == [user["user"] for user in users[1:]]
    (path,) = (folder / "run/adapter").glob("*.safetensors")
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    assert "users   3, 0 of them ranked before" in call(folder).stdout
    config = folder / "run/adapter/adapter_config.json"
    write_json(config, read_json(config) | {"lora_alpha": 99})
    assert "users   3, 0 of them ranked before" in call(folder).stdout
    assert "users   3, 3 of them ranked before" in call(folder).stdout


def test_two_processes_write_the_same(folder):
    users = read_lines(folder / "users.jsonl")
    users[0]["history"].append(COLD)
    write_lines(folder / "users.jsonl", users)
    call(folder, out=folder / "alone.jsonl")
    (folder / "run/answers.jsonl").unlink()
    call(folder, processes=2)
    assert_same(folder / "out.jsonl", folder / "alone.jsonl")
    left = [path.name for path in (*folder.glob("*part*"), *(folder / "run").glob("*.part*"))]
    assert left == []


# ---- Errors in one line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"user": "a"}, "users.jsonl:1: field 'history' is missing"),
        ({"history": ["i1"]}, "users.jsonl:1: field 'user' is missing"),
        ({"user": "a", "history": "i1"}, "field 'history' is a str, expected a list"),
        ({"user": "a", "history": ["zz"]}, "field 'history': item 'zz' is not in"),
        (
            {"user": "a", "history": [3]},
            "users.jsonl:1: field 'history': 3 is neither an id in quotes",
        ),
        ({"user": "a", "history": [{"id": "n", "text": "x"}]}, "is neither an id in quotes nor"),
        ({"user": "a", "history": [{"id": "n", "attributes": {}}]}, "no object with texts"),
        ({"user": "a", "history": [{"id": "n", "attributes": {"T": 3}}]}, "no object with texts"),
        ({"user": "a", "history": [COLD | {"id": "i1"}]}, "'i1' has another text than before"),
        ({"user": "a", "history": ["i1"]}, "field 'candidates' is missing; add it, or"),
        ({"user": "a", "history": [], "candidates": []}, "no item to rank"),
        ({"user": "a", "history": [], "candidates": ["i1", "i1"]}, "item 'i1' is there twice"),
        ({"user": "a", "history": [], "candidate": ["i1"]}, "field 'candidate' is none of"),
    ],
)
def test_a_wrong_line_is_named(made, tmp_path, line, message):
    write_lines(tmp_path / "users.jsonl", [line])
    assert message in only_line(call(tmp_path, run=made / "run", check=False))


def only_line(done):
    """The message of a call that has to end in one line."""
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_wrong_files_flags_and_runs_are_named(made, folder):
    user = read_lines(folder / "users.jsonl")[0]
    other = folder / "other.jsonl"

    def message(**settings):
        return only_line(call(folder, check=False, **settings))

    write_lines(other, [user, user])
    assert f"other.jsonl:2: field 'user': {user['user']!r} is there twice" in message(users=other)
    other.write_text("")
    assert "other.jsonl: no users in it" in message(users=other)
    assert "no candidates in it" in message(candidates=other)
    other.write_text("i1\ni1\n")
    assert "other.jsonl:2: item 'i1' is there twice" in message(candidates=other)
    assert "no such file" in message(users=folder / "nowhere")
    assert "--out is missing" in message(out=None)
    assert "give either --users FILE, or --history" in message(users=None, out=None)
    assert "give either --users FILE, or --history" in message(history=["i1"])
    assert "give one of them" in message(catalogue=True, candidates=other)
    assert "it would replace what is read" in message(out=folder / "users.jsonl")
    write_lines(folder / "out.jsonl", [{"user": "a", "mine": 1}])
    assert "out.jsonl:1: field 'key' is missing" in message()
    assert read_lines(folder / "out.jsonl") == [{"user": "a", "mine": 1}]
    assert "nothing trained here yet" in message(run=folder / "empty")
    assert "argument --out: expected a file or folder, not an empty text" in message(out="")
    shutil.rmtree(folder / "run/adapter")
    assert "nothing trained here yet" in message()


def test_a_summarizer_that_is_another_now_is_refused(made, folder):
    config = json.loads((folder / "run/config.json").read_text())
    config["summarize"]["fingerprint"] = "another"
    (folder / "run/config.json").write_text(json.dumps(config))
    message = only_line(call(folder, check=False))
    assert "the model's files are other ones now" in message


def test_a_dataset_that_was_prepared_again_is_refused(made, folder):
    config = json.loads((folder / "run/config.json").read_text())
    config["train"]["learned_texts"] = "others"
    (folder / "run/config.json").write_text(json.dumps(config))
    assert "the texts of their items are not those that" in only_line(call(folder, check=False))


# ---- The documented example


def test_the_documented_example_runs(made, folder, monkeypatch, capsys):
    """docs/recommend.md's notebook, on a small run whose items have the ids of the example."""
    page = (ROOT / "docs/recommend.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(folder)
    code = code.replace("runs/demo", "run")
    for n, name in enumerate(dict.fromkeys(re.findall(r"P0-\d{5}", code))):
        code = code.replace(name, f"i{n}")
    exec(compile(code, "docs/recommend.md", "exec"), {})
    shown = capsys.readouterr().out
    assert re.search(r"^new-lamp 0\.\d{3}$", shown, re.MULTILINE)
