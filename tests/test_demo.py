"""prepare/demo.py: the shop's texts tell the truth, its users follow the rule, and only both interests rank."""

import json
import math
import random
import re
import sys
from collections import Counter

import pytest

from prepare import demo
from prepare.shop import BRANDS, CATEGORIES, COLORS, LINES, MATERIALS
from trsr import InputError

N_TEST = 1000  # users of the statistics below: Recall@3 at chance has a standard error of 0.011
CHANCE = 3 / 21


@pytest.fixture(scope="module")
def shop():
    return demo.make_shop(0, 6000)


@pytest.fixture(scope="module")
def splits(shop):
    return {split: list(demo.make_split(shop, 0, split, N_TEST)) for split in ("train", "test")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "data"
    generate(["--out", str(out), "--items", "1500", "--users", "60", "--test-users", "20"])
    return out


def generate(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["demo", *arguments])
        demo.main()


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def words_of(product):
    return set(re.findall(r"[\w-]+", " ".join(product.attributes.values())))


# ---------------------------------------------------------------------------------------------------------------------
# The files


def test_rerun_is_byte_identical_and_another_seed_shares_nothing(folder, tmp_path):
    size = ["--items", "1500", "--users", "60", "--test-users", "20"]
    generate(["--out", str(tmp_path / "again"), *size])
    generate(["--out", str(tmp_path / "other"), *size, "--seed", "1"])
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["items.jsonl", "meta.json", "test.jsonl", "train.jsonl", "val.jsonl"]
    assert all(
        (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names
    )
    for name, key in (("items", "id"), ("train", "user"), ("test", "user")):
        ours, theirs = (
            read_lines(folder / f"{name}.jsonl"),
            read_lines(tmp_path / "other" / f"{name}.jsonl"),
        )
        assert not {record[key] for record in ours} & {record[key] for record in theirs}


def test_schema(folder):
    items = read_lines(folder / "items.jsonl")
    ids = {item["id"] for item in items}
    assert len(items) == len(ids) == 1500
    m2 = ["Title", "Price", "Brand", "Color", "Size", "Model", "Material", "Author", "Description"]
    for item in items:
        assert [name for name in m2 if name in item["attributes"]] == list(item["attributes"])
        assert all(isinstance(text, str) and text for text in item["attributes"].values())
    examples = {split: read_lines(folder / f"{split}.jsonl") for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in examples.items()} == {
        "train": 50,
        "val": 5,
        "test": 20,
    }
    everyone = [example for found in examples.values() for example in found]
    assert len({example["user"] for example in everyone}) == 75
    for split, found in examples.items():
        for example in found:
            shown = [*example["history"], example["positive"], *example["negatives"]]
            assert len(set(shown)) == len(shown)
            assert set(shown) <= ids
            assert 10 <= len(example["history"]) <= 25
            assert len(example["negatives"]) == (1 if split == "train" else 20)


def test_meta_and_what_is_printed(folder, tmp_path, capsys):
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    assert (meta["domain"], meta["seed"], meta["items"]) == ("products", 0, 1500)
    assert meta["settings"] == {"items": 1500, "users": {"train": 50, "val": 5, "test": 20}}
    generate(["--out", str(tmp_path), "--items", "1500", "--users", "60", "--test-users", "20"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"A synthetic shop of 1,500 items and 50 train, 5 val, 20 test users to {tmp_path} (products, seed 0)"
    )
    assert f"  full history         {meta['oracles']['full history']:.3f}" in lines
    assert lines[-1] == f"Next: python summarize.py --data {tmp_path}"


def test_a_user_does_not_depend_on_the_number_of_others(shop, splits):
    assert list(demo.make_split(shop, 0, "test", 5)) == splits["test"][:5]
    assert demo.make_shop(0, 50).products.keys() == set(list(shop.products)[:50])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--users", "2"], "--users 2: at least 3 are needed, one for each split"),
        (["--items", "50"], "50 items are too few for what the users look for; raise --items"),
    ],
)
def test_what_a_user_can_mend(tmp_path, flags, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        generate(["--out", str(tmp_path), *flags])


# ---------------------------------------------------------------------------------------------------------------------
# The texts


def test_texts_do_not_repeat_and_have_the_length_meant(shop):
    products = list(shop.products.values())
    assert (
        len({p.attributes["Title"] for p in products})
        == len({p.attributes["Description"] for p in products})
        == 6000
    )
    lengths = [
        sum(len(f"{name} {text}".split()) for name, text in p.attributes.items()) for p in products
    ]
    assert 40 <= min(lengths) <= max(lengths) <= 75
    # Many sentence forms, not one: even with all facts blotted out, no form makes up a hundredth of the shop.
    blot = re.compile("|".join([*BRANDS, *COLORS, *MATERIALS, *CATEGORIES, *LINES, r"\d+"]))
    forms = Counter(blot.sub("_", p.attributes["Description"]) for p in products)
    assert forms.most_common(1)[0][1] < 60


def test_texts_name_the_facts_and_no_others(shop):
    values = {
        "category": CATEGORIES,
        "brand": BRANDS,
        "color": COLORS,
        "material": MATERIALS,
    }
    assert (
        len({v for options in values.values() for v in options})
        == sum(map(len, values.values()))
        == 48
    )
    for product in shop.products.values():
        title, everything = set(re.findall(r"\w+", product.attributes["Title"])), words_of(product)
        for name, options in values.items():
            fact = getattr(product, name)
            assert fact in title
            assert everything & set(options) == {fact}


# ---------------------------------------------------------------------------------------------------------------------
# The rule, and what can be known without it


def test_users_follow_the_rule(shop):
    long_fit, recent_fit = [], []
    for number in range(300):
        user = demo.make_user(random.Random(f"rule {number}"), shop, 20)
        before, recent = user.history[: -demo.RECENT], user.history[-demo.RECENT :]
        assert user.need not in user.taste.categories
        assert user.target.category == user.need
        assert user.taste.matches(user.target) >= 2
        assert {product.category for product in recent} == {user.need}
        long_fit += [
            user.taste.matches(p) >= 2 and p.category in user.taste.categories for p in before
        ]
        recent_fit += [user.taste.matches(product) for product in recent]
        kinds = Counter(
            (p.category == user.need, user.taste.matches(p) >= 2) for p in user.negatives
        )
        assert kinds == {(True, False): 7, (False, True): 7, (False, False): 6}
    assert sum(long_fit) / len(long_fit) == pytest.approx(0.90, abs=0.02)
    # The last purchases ignore the taste: 2 of 16 brands, 1 of 10 colors, 1 of 10 materials, by chance.
    assert sum(recent_fit) / len(recent_fit) == pytest.approx(2 / 16 + 1 / 10 + 1 / 10, abs=0.06)


def test_only_both_interests_together_rank(shop, splits):
    table = demo.oracle_table(shop, splits["train"], splits["test"])
    assert table["full history"] > 0.98
    assert table["recent items only"] == pytest.approx(
        3 / 8, abs=0.04
    )  # the positive and 7 others of its category
    assert table["lasting taste only"] == pytest.approx(
        0.45, abs=0.04
    )  # 7 others fit, those of favorites ruled out
    assert table["popularity"] == pytest.approx(CHANCE, abs=0.033)
    assert table["random order"] == pytest.approx(CHANCE)


def test_inferred_taste_is_the_true_one_for_most(shop):
    users = [demo.make_user(random.Random(f"taste {number}"), shop, 0) for number in range(300)]
    pairs = [(demo.inferred_taste(user.history[: -demo.RECENT]), user.taste) for user in users]
    assert sum(a.color == b.color for a, b in pairs) > 270
    assert sum(a.material == b.material for a, b in pairs) > 270
    assert sum(set(a.categories) == set(b.categories) for a, b in pairs) > 270


def test_candidates_alone_do_not_tell_the_positive(shop, splits):
    # Naive Bayes over the words of the candidates, trained on the training split's positives and negatives.
    texts = {i: words_of(product) for i, product in shop.products.items()}
    yes = Counter(word for example in splits["train"] for word in texts[example["positive"]])
    no = Counter(
        word for example in splits["train"] for i in example["negatives"] for word in texts[i]
    )
    weight = {word: math.log((yes[word] + 1) / (no[word] + 1)) for word in yes | no}
    hits = 0
    for example in splits["test"]:
        candidates = [example["positive"], *example["negatives"]]
        scores = [sum(weight.get(word, 0.0) for word in sorted(texts[i])) for i in candidates]
        hits += sum(score >= scores[0] for score in scores) <= 3
    assert hits / N_TEST == pytest.approx(CHANCE, abs=0.033)


def test_positives_are_as_popular_as_negatives(shop, splits):
    counts = Counter(
        i for example in splits["train"] for i in [*example["history"], example["positive"]]
    )
    chosen = [counts[example["positive"]] for example in splits["test"]]
    others = [counts[i] for example in splits["test"] for i in example["negatives"]]
    assert sum(chosen) / len(chosen) == pytest.approx(sum(others) / len(others), rel=0.06)
