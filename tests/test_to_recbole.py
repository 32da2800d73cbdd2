"""prepare/to_recbole.py: a dataset in RecBole's files, with the candidates to score."""

import pytest
from helpers import prepared, read_lines, write_dataset

from prepare import to_recbole
from prepare.dataset import load_dataset
from trsr import InputError, shuffled_candidates


def test_the_dataset_as_recbole_s_files(tmp_path, data_folder):
    out = prepared(to_recbole, data=data_folder, out=tmp_path / "rec")
    _, items, splits = load_dataset(data_folder, ("train", "val", "test"))
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        head, *lines = (out / f"rec.{name}.inter").read_text().splitlines()
        assert head == "user_id:token\titem_id_list:token_seq\titem_id:token"
        assert lines == [f"{e.user}\t{' '.join(e.history)}\t{e.positive}" for e in splits[split]]
    _, *lines = (out / "rec.item").read_text().splitlines()
    assert lines == [f"{item}\t{text}" for item, text in items.items()]
    lines = [r for r in read_lines(out / "rec.candidates.jsonl") if r["split"] == "test"]
    assert [r["candidates"] for r in lines] == [shuffled_candidates(e) for e in splits["test"]]


@pytest.mark.parametrize(("old", "new"), [('"i1"', '"i 1"'), ('"test0"', '"test\\t0"')])
def test_ids_that_recbole_s_files_cannot_hold_are_refused(tmp_path, old, new):
    data = write_dataset(tmp_path / "data")
    for path in data.glob("*.jsonl"):
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=r"(item 'i 1' of|user 'test\\t0': the id has a tab)"):
        prepared(to_recbole, data=data, out=tmp_path / "rec")
    assert not (tmp_path / "rec").exists()


def test_only_a_folder_of_its_own_is_replaced(tmp_path, data_folder, capsys):
    raw = tmp_path / "games"
    raw.mkdir()
    (raw / "games.item").write_text("item_id:token\n")
    with pytest.raises(InputError, match=r"did not write \(games\.item\); choose another --out"):
        prepared(to_recbole, data=data_folder, out=raw)
    assert (raw / "games.item").read_text() == "item_id:token\n"
    (raw / "games.item").unlink()
    prepared(to_recbole, data=data_folder, out=raw)
    capsys.readouterr()
    prepared(to_recbole, data=data_folder, out=raw)
    assert f"{raw}: replacing the files" in capsys.readouterr().out
