"""runfolder/quality.py: the shares of summaries, by hand and by chance, and their advice."""

import random

import pytest
from helpers import read_lines, write_lines

from files.jsonl import read_json, write_json
from runfolder import quality
from runfolder.quality import Quality, quality_of
from trsr import InputError

GOOD = Quality(
    users=100,
    texts=400,
    ended=0.98,
    limit=0.01,
    turn=0.01,
    loop=0.004,
    loop_users=0.0,
    another=0.01,
    empty=0.0,
    own_first=0.6,
    chance=1 / 24,
)


def shop(n_users, seed=0, own=4, length=lambda user: 8):
    """Histories of random words, in which a user has `own` favorites among 300."""
    rng = random.Random(seed)
    texts = {}
    for user in range(n_users):
        favorites = [f"word{rng.randrange(300)}" for _ in range(own)]
        every = [rng.choice([*favorites, f"word{rng.randrange(300)}"]) for _ in range(999)]
        items = [f"Title: {every[2 * i]}; Brand: {every[2 * i + 1]}" for i in range(length(user))]
        texts[f"user{user}"] = items
    return texts


def records_from(texts, summary, ends=None):
    """Records whose summaries are summary(user)."""
    more = {} if ends is None else {"ends": ends}
    return {user: {"user": user, "summary": summary(user), "tree": {}} | more for user in texts}


def made(*summaries, texts=None, ends=None):
    """The quality of these summaries, of users with histories of their own."""
    texts = texts or {f"user{i}": [f"item{i}"] for i in range(len(summaries))}
    written = dict(zip(texts, summaries, strict=True))
    return quality_of(records_from(texts, written.get, ends), texts)


# ---- Each share by hand


def test_repeats_are_counted_in_runs_of_four_words():
    # 5 runs of which 3 are distinct: a b c d, b c d a, c d a b, d a b c, a b c d.
    assert quality.repeated_share(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)
    assert quality.repeated_share(["a", "a", "a", "a", "a", "a"]) == pytest.approx(2 / 3)
    assert quality.repeated_share(["a", "b", "c"]) == 0.0
    looping, sound = "tea " * 24, "this user likes green tea and small cups"
    found = made(looping, sound, sound + ".", sound.upper())
    assert found.loop == pytest.approx((20 / 21) / 4)
    assert found.loop_users == 1 / 4


def test_a_fifth_of_repeats_is_not_yet_a_loop():
    assert made("a b c d a b c d", "x").loop_users == 0.0
    assert made("a b c d a b c d a", "x").loop_users == 0.5


def test_another_users_summary_counts_only_for_another_history():
    texts = {"a": ["pan"], "b": ["pan"], "c": ["pot"], "d": ["cup"], "e": ["jar"], "f": ["lid"]}
    # a and b bought the same; c repeats them; the white space differs; two are empty.
    found = made("likes pans", "likes pans", "likes\n pans ", "likes cups", "", "  ", texts=texts)
    assert found.another == pytest.approx(3 / 6)
    assert found.empty == pytest.approx(2 / 6)
    assert made("likes pans", "likes pans", texts={"a": ["pan"], "b": ["pan"]}).another == 0.0


def test_ends_are_shares_of_all_texts():
    texts = {"a": ["pan"], "b": ["pot"]}
    records = records_from(texts, lambda user: user)
    records["a"]["ends"] = {"end": 3, "limit": 1, "turn": 0}
    records["b"]["ends"] = {"end": 2, "limit": 0, "turn": 2}
    found = quality_of(records, texts)
    assert (found.texts, found.ended, found.limit, found.turn) == (8, 5 / 8, 1 / 8, 2 / 8)


def test_ends_that_are_not_recorded_are_unknown():
    found = made("one", "two")
    assert (found.texts, found.ended, found.limit, found.turn) == (0, None, None, None)
    assert "unknown" in found.lines()[0]


@pytest.mark.parametrize("ends", [[1], "end", {"end": "3"}, {"end": -1}, {"stop": 1}, None])
def test_wrong_ends_are_named(ends):
    with pytest.raises(InputError, match="user 'a': field 'ends'"):
        quality_of({"a": {"user": "a", "summary": "x", "ends": ends}}, {"a": ["pan"]})


def test_users_without_a_history_are_left_out():
    texts = {"a": ["pan"], "b": ["pot"], "c": []}
    found = made("pan", "pot", "", texts=texts)
    assert (found.users, found.empty, found.own_first, found.chance) == (2, 0.0, 1.0, 0.5)
    nobody = made("", texts={"c": []})
    assert nobody.users == 0
    assert list(nobody.advice()) == []
    assert "nothing to judge" in nobody.lines()[0]


# ---- Own first


def test_every_user_is_compared_once_with_23_others():
    for n_users in (24, 25, 47, 48, 100):
        found = list(quality.groups(n_users, seed=3))
        assert sorted(u for group, n in found for u in group[:n]) == list(range(n_users))
        assert all(len(set(group)) == len(group) == 24 for group, _ in found)
    assert [len(group) for group, _ in quality.groups(7, seed=3)] == [7]


def test_summaries_of_the_own_history_come_first_and_those_of_others_by_chance():
    texts = shop(480)
    users = list(texts)
    own = quality_of(records_from(texts, lambda user: " ".join(texts[user])), texts)
    assert own.own_first > 0.99
    assert own.chance == 1 / 24

    other = dict(zip(users, users[1:] + users[:1], strict=True))
    found = quality_of(records_from(texts, lambda user: " ".join(texts[other[user]])), texts)
    # The standard deviation is 0.009.
    assert abs(found.own_first - 1 / 24) < 0.036
    words = {"the same for all": 0.0, "": 0.0, "nowhere in a history": 0.0, "brand title": 0.0}
    for summary, share in words.items():
        assert quality_of(records_from(texts, lambda _, s=summary: s), texts).own_first == share


def test_long_histories_have_no_advantage():
    # User 0 has bought everything: every word of every summary is in that history too.
    texts = shop(24)
    texts["user0"] = [item for items in texts.values() for item in items]
    found = quality_of(records_from(texts, lambda user: " ".join(texts[user][:2])), texts)
    assert found.own_first >= 23 / 24

    # Nor do short ones: a user of 4 or of 64 items is as easy to tell.
    texts = shop(240, own=2, length=lambda user: 64 if user % 2 else 4)
    firsts = quality.own_first(
        [quality.words_of(texts[user][-1]) for user in texts], list(texts.values())
    )
    assert abs(sum(firsts[::2]) - sum(firsts[1::2])) < 36  # of 120 each


def test_equal_histories_count_against_the_user():
    texts = {f"user{i}": [f"pan {i // 2}", "lid"] for i in range(40)}
    found = quality_of(records_from(texts, lambda user: texts[user][0]), texts)
    # First only if the twin is in another group.
    assert found.own_first < 1
    everyone = {f"user{i}": ["pan", "lid"] for i in range(30)}
    assert quality_of(records_from(everyone, lambda _: "pan lid"), everyone).own_first == 0


def test_few_users_have_their_own_chance():
    texts = shop(5)
    found = quality_of(records_from(texts, lambda user: " ".join(texts[user])), texts)
    assert (found.own_first, found.chance) == (1.0, 1 / 5)
    assert "better than 4 others' (by chance 20 %)" in "\n".join(found.lines())
    alone = made("pan", texts={"a": ["pan"]})
    assert (alone.own_first, alone.chance) == (None, None)
    assert "a single user" in "\n".join(alone.lines())


def test_the_seed_chooses_the_groups_and_nothing_else():
    texts = shop(100, own=1)
    records = records_from(texts, lambda user: texts[user][0])
    found = [quality_of(records, texts, seed) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert len({one.own_first for one in found}) > 1
    assert {one.record()["another"] for one in found} == {found[0].another}


def test_a_character_is_a_word_where_no_spaces_part_them():
    assert quality.words_of("Green-Tea_2, l’été") == ["green", "tea", "2", "l", "été"]
    assert quality.words_of("緑茶 cup") == ["緑", "茶", "cup"]


# ---- Lines and advice


def test_good_summaries_need_no_advice_and_lines_are_short():
    assert list(GOOD.advice()) == []
    worst = Quality(10**6, 10**8, *[0.123] * 8, chance=1 / 24)
    for found in (GOOD, worst, made("a", "b")):
        assert max(map(len, found.lines())) <= 100
    assert "60 % of the summaries fit their own history better than 23" in "\n".join(GOOD.lines())


@pytest.mark.parametrize(
    ("bad", "advice"),
    [
        ({"limit": 0.11}, "--max-new-tokens"),
        ({"turn": 0.11}, "--no-chat"),
        ({"loop": 0.11}, "--no-repeat-ngram-size"),
        ({"loop_users": 0.06}, "--repetition-penalty"),
        ({"empty": 0.06}, "ends at once"),
        ({"another": 0.06}, "larger summarizer"),
        ({"own_first": 0.12}, "larger summarizer"),
        ({"own_first": 0.49, "chance": 0.25}, "larger summarizer"),
    ],
    ids=str,
)
def test_advice_is_given_for_what_is_bad(bad, advice):
    (sentence,) = Quality(**GOOD.record() | bad).advice()
    assert advice in sentence


def test_a_higher_limit_is_no_advice_for_what_goes_in_circles():
    circles = GOOD.record() | {"loop_users": 0.2}
    # Loops of a fifth of the users do not explain why nine of ten texts are cut.
    first, _ = Quality(**circles | {"limit": 0.9}).advice()
    assert "--max-new-tokens" in first
    (sentence,) = Quality(**circles | {"limit": 0.3}).advice()
    assert "summaries repeat themselves" in sentence


def test_what_is_just_good_enough_needs_no_advice():
    edge = {"limit": 0.1, "turn": 0.1, "loop": 0.1, "loop_users": 0.05, "another": 0.05}
    edge |= {"empty": 0.05, "own_first": 0.125}
    assert list(Quality(**GOOD.record() | edge).advice()) == []
    assert list(Quality(**GOOD.record() | {"own_first": 0.5, "chance": 0.5}).advice()) == []


def test_percentages_look_like_none_or_all_only_if_they_are():
    shares = {
        0.0: "0 %",
        0.0001: "0.1 %",
        0.004: "0.4 %",
        0.4567: "46 %",
        0.9999: "99.9 %",
        1: "100 %",
    }
    assert {share: quality.percent(share) for share in shares} == shares


# ---- The file, and the command


def test_the_file_holds_what_was_found(tmp_path):
    path = tmp_path / "quality.json"
    assert quality.read_quality(path) is None
    for found in (GOOD, made("one", "two"), made("", texts={"a": []})):
        write_json(path, found.record())
        assert quality.read_quality(path) == found
    for wrong in ({"loop": None}, {"users": "3"}, {"ended": "all"}):
        write_json(path, GOOD.record() | wrong)
        with pytest.raises(InputError, match=r"quality\.json: field '\w+' is missing or not a num"):
            quality.read_quality(path)
    write_json(path, {name: value for name, value in GOOD.record().items() if name != "turn"})
    with pytest.raises(InputError, match="field 'turn'"):
        quality.read_quality(path)


def test_the_command_prints_a_run(evaluated_runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quality", str(evaluated_runs / "one")])
    quality.main()
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:5]] == ["sound", "ends", "loops", "copies", "own"]


def test_the_command_names_a_run_about_other_texts(evaluated_runs, tmp_path, monkeypatch):
    records = read_lines(evaluated_runs / "one/summaries.jsonl")
    config = read_json(evaluated_runs / "one/config.json")
    monkeypatch.setattr("sys.argv", ["quality", str(tmp_path)])
    with pytest.raises(InputError, match=r"first run python summarize\.py"):
        quality.main()
    write_lines(tmp_path / "summaries.jsonl", records)
    with pytest.raises(InputError, match=r"no settings of summarize\.py"):
        quality.main()
    write_json(tmp_path / "config.json", config)
    quality.main()
    records[1]["key"] = "0"
    write_lines(tmp_path / "summaries.jsonl", records)
    with pytest.raises(InputError, match=r"summaries\.jsonl: .* is of another history"):
        quality.main()
