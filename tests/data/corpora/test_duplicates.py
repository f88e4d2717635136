import sys

import numpy as np
import pytest

from nla_jax.data.corpora.documents import Document
from nla_jax.data.corpora.duplicates import (
    SeenHashes,
    hash64,
    shared_between,
    text_hashes,
    without_repeated_runs,
    words_of,
)

WORDS = [f"word{number}" for number in range(500)]


def text(rng, length=120):
    return " ".join(rng.choice(WORDS, length))


def are_near(one, other):
    return not {*text_hashes(one, "near")}.isdisjoint(text_hashes(other, "near"))


def test_words_forget_case_punctuation_and_forms_of_characters():
    assert words_of("The ﬁrst, FULL-width Ｗord!") == ["the", "first", "full", "width", "word"]
    assert words_of("?? !") == ["??", "!"]


def test_exact_duplicates_have_the_same_words():
    assert (
        text_hashes("One, two.", "exact") == text_hashes("one  TWO", "exact") != text_hashes("one", "exact")
    )
    assert text_hashes("One, two.", "same_id") == []


def test_texts_with_a_few_changed_words_are_near_and_others_are_not():
    rng = np.random.default_rng(0)
    found = {0.9: 0, 0.5: 0, 0.0: 0}
    for _ in range(40):
        first = text(rng)
        words = first.split()
        words[60] = "changed"  # five of 116 runs of five words differ: Jaccard 111 / 121
        found[0.9] += are_near(first, " ".join(words))
        # Of two sets of 116 runs 76 are shared: Jaccard 76 / 156, which is found with probability 0.04.
        found[0.5] += are_near(first, " ".join([*words[:40], *rng.choice(WORDS, 80)]))
        found[0.0] += are_near(first, text(rng))
    assert found[0.9] == 40 and found[0.5] < 8 and found[0.0] == 0


def test_short_texts_have_one_run():
    assert are_near("Just three words", "just three words!")
    assert not are_near("Just three words", "just three others")


def test_what_was_seen_is_found_and_leaves_nothing_behind(tmp_path):
    with SeenHashes(tmp_path) as seen:
        seen.add([1, -(2**63), 2**63 - 1], 7)
        seen.add([1, 5], 8)
        assert sorted(seen.find([1, 5, 6])) == [7, 8] and seen.find([-(2**63)]) == [7]
    assert not list(tmp_path.iterdir())


def test_hashes_of_different_kinds_are_independent():
    assert hash64("id", "a") == hash64("id", b"a") != hash64("text", "a")


def test_texts_shared_between_parts_are_counted(tmp_path):
    rng = np.random.default_rng(0)
    first, second, third = (text(rng) for _ in range(3))
    changed = first.replace(first.split()[50], "changed", 1)
    texts = [
        ("av_sft", first),
        ("rl", second),
        ("av_sft", first),
        ("held_out", first.upper()),
        ("held_out", changed),
        ("rl", third),
        ("av_sft", second),
    ]
    exact = shared_between(texts, folder=tmp_path, duplicates="exact")
    assert exact == {"av_sft and held_out": 1, "av_sft and rl": 1}
    near = shared_between(texts, folder=tmp_path, duplicates="near")
    assert near == {"av_sft and held_out": 2, "av_sft and rl": 1}


def test_near_duplicates_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ModuleNotFoundError, match=r"`rensa`; run `pip install rensa`, or set"):
        text_hashes("a", "near")


def test_built_in_corpora_keep_few_documents_of_a_group_and_none_that_mostly_repeat():
    def document(doc_id, words, genre="a"):
        return Document(doc_id, " ".join(words), genre)

    words = [f"word{number}" for number in range(60)]
    # Of its 13 runs of 8 words the second repeats 3 of the first's, and the third 8 of either's; the hash of the ids
    # orders them 4, 1, 2, 3.
    first, second, third = words[:20], words[10:30], words[5:25]
    documents = [document("1", first), document("2", second), document("3", third), document("4", words[40:])]
    chosen = list(without_repeated_runs(documents, purpose="test", limits=lambda _: {"all": 9}))
    assert [one.id for one in chosen] == ["4", "1", "2"]
    few = list(without_repeated_runs(documents, purpose="test", limits=lambda one: {"all": 9, one.genre: 1}))
    assert few == chosen[:1]
    # A script without spaces is compared by its characters.
    poem = "春眠不觉晓处处闻啼鸟夜来风雨声花落知"
    chinese = [Document("5", f"{poem}多少", "a"), Document("6", f"{poem}几何", "a")]
    assert len(list(without_repeated_runs(chinese, purpose="test", limits=lambda _: {}))) == 1
