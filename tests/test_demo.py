"""prepare/demo.py: the files, and that only both interests together rank."""

import math
import random
import re
from collections import Counter

import pytest
from helpers import meta, prepared, read_lines

from prepare import demo
from prepare.shop import RECENT, make_shop, make_user
from trsr import InputError

N_TEST = 1000  # users of the statistics below: Recall@3 at chance has a standard error of 0.011
CHANCE = 3 / 21
SIZE = {"items": 1500, "users": 60, "test_users": 20}


@pytest.fixture(scope="module")
def shop():
    return make_shop(0, 6000)


@pytest.fixture(scope="module")
def splits(shop):
    return {split: list(demo.make_split(shop, 0, split, N_TEST)) for split in ("train", "test")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared(demo, out=tmp_path_factory.mktemp("demo") / "data", **SIZE)


# ---- The files


def test_rerun_is_byte_identical_and_another_seed_shares_nothing(folder, tmp_path):
    again = prepared(demo, out=tmp_path / "again", **SIZE)
    other = prepared(demo, out=tmp_path / "other", **SIZE, seed=1)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["items.jsonl", "meta.json", "test.jsonl", "train.jsonl", "val.jsonl"]
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    for name, key in (("items", "id"), ("train", "user"), ("test", "user")):
        file = f"{name}.jsonl"
        ours, theirs = ({r[key] for r in read_lines(f / file)} for f in (folder, other))
        assert not ours & theirs


def test_schema(folder):
    items = read_lines(folder / "items.jsonl")
    ids = {item["id"] for item in items}
    assert len(items) == len(ids) == 1500
    m2 = ["Title", "Price", "Brand", "Color", "Size", "Model", "Material", "Author", "Description"]
    for item in items:
        assert [name for name in m2 if name in item["attributes"]] == list(item["attributes"])
        assert all(isinstance(text, str) and text for text in item["attributes"].values())
    splits = {split: read_lines(folder / f"{split}.jsonl") for split in ("train", "val", "test")}
    sizes = {split: len(found) for split, found in splits.items()}
    assert sizes == {"train": 50, "val": 5, "test": 20}
    everyone = [example for found in splits.values() for example in found]
    assert len({example["user"] for example in everyone}) == 75
    for split, found in splits.items():
        for example in found:
            shown = [*example["history"], example["positive"], *example["negatives"]]
            assert len(set(shown)) == len(shown)
            assert set(shown) <= ids
            assert 10 <= len(example["history"]) <= 25
            assert len(example["negatives"]) == (1 if split == "train" else 20)


def test_meta_and_what_is_printed(folder, tmp_path, capsys):
    found = meta(folder)
    assert (found["domain"], found["seed"], found["items"]) == ("products", 0, 1500)
    assert found["settings"] == {"items": 1500, "users": {"train": 50, "val": 5, "test": 20}}
    prepared(demo, out=tmp_path, **SIZE)
    lines = capsys.readouterr().out.splitlines()
    what = "A synthetic shop of 1,500 items and 50 train, 5 val, 20 test users"
    assert lines[0] == f"{what} to {tmp_path} (products, seed 0)"
    assert f"  full history         {found['oracles']['full history']:.3f}" in lines
    assert lines[-1] == f"next    python summarize.py --data {tmp_path}"


def test_a_user_does_not_depend_on_the_number_of_others(shop, splits):
    assert list(demo.make_split(shop, 0, "test", 5)) == splits["test"][:5]
    assert make_shop(0, 50).products.keys() == set(list(shop.products)[:50])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"users": 2}, "--users 2: at least 3 are needed, one for each split"),
        ({"items": 50}, "50 items are too few for what the users look for; raise --items"),
    ],
)
def test_what_a_user_can_mend(tmp_path, settings, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        prepared(demo, out=tmp_path, **settings)


# ---- What can be known without the rule


def test_only_both_interests_together_rank(shop, splits):
    table = demo.oracle_table(shop, splits["train"], splits["test"])
    assert table["full history"] > 0.98
    # The positive and 7 others are of its category.
    assert table["recent items only"] == pytest.approx(3 / 8, abs=0.04)
    # 7 others fit, those of favorite categories ruled out.
    assert table["lasting taste only"] == pytest.approx(0.45, abs=0.04)
    assert table["popularity"] == pytest.approx(CHANCE, abs=0.033)
    assert table["random order"] == pytest.approx(CHANCE)


def test_inferred_taste_is_the_true_one_for_most(shop):
    users = [make_user(random.Random(f"taste {number}"), shop, 0) for number in range(300)]
    pairs = [(demo.inferred_taste(user.history[:-RECENT]), user.taste) for user in users]
    assert sum(a.color == b.color for a, b in pairs) > 270
    assert sum(a.material == b.material for a, b in pairs) > 270
    assert sum(set(a.categories) == set(b.categories) for a, b in pairs) > 270


def test_candidates_alone_do_not_tell_the_positive(shop, splits):
    # Naive Bayes over the words of the candidates, trained on the training split.
    def words(item):
        return set(re.findall(r"[\w-]+", " ".join(shop.products[item].attributes.values())))

    texts = {item: words(item) for item in shop.products}
    train = splits["train"]
    yes = Counter(word for example in train for word in texts[example["positive"]])
    no = Counter(word for example in train for i in example["negatives"] for word in texts[i])
    weight = {word: math.log((yes[word] + 1) / (no[word] + 1)) for word in yes | no}
    hits = 0
    for example in splits["test"]:
        candidates = [example["positive"], *example["negatives"]]
        scores = [sum(weight.get(word, 0.0) for word in sorted(texts[i])) for i in candidates]
        hits += sum(score >= scores[0] for score in scores) <= 3
    assert hits / N_TEST == pytest.approx(CHANCE, abs=0.033)


def test_positives_are_as_popular_as_negatives(shop, splits):
    chosen = (i for e in splits["train"] for i in [*e["history"], e["positive"]])
    counts = Counter(chosen)
    positives = [counts[e["positive"]] for e in splits["test"]]
    negatives = [counts[i] for e in splits["test"] for i in e["negatives"]]
    mean = sum(negatives) / len(negatives)
    assert sum(positives) / len(positives) == pytest.approx(mean, rel=0.06)
