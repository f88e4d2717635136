"""Topics: which words, out of their order, in several languages."""

import math

from nla_jax.data.writers.statements.content import phrases_of, topic, topic_phrases
from nla_jax.data.writers.statements.facts import Facts

SENTENCE = "The grand jury of Fulton County said on Friday that 14 voters had seen irregularities."


def facts(context, place="sentence_end", **fields) -> Facts:
    return Facts("key", 0, context, place, **fields)


def test_neighboring_words_of_content_make_phrases():
    assert phrases_of(SENTENCE, "en") == [
        ("grand", "jury"),
        ("Fulton", "County"),
        ("Friday",),
        ("14", "voters"),
        ("seen", "irregularities"),
    ]
    # The marks of a list part words, adverbs say little, and a name keeps its capital unless it begins the sentence.
    assert phrases_of("Boats, nets sadly lost Ahab. Ahab", "en") == [
        ("boats",),
        ("nets",),
        ("lost", "Ahab"),
        ("ahab",),
    ]
    assert phrases_of("boats and boats", "en", {"boat"}) == []


def test_other_languages_lose_their_own_function_words():
    assert phrases_of("Die alte Brücke und der Fluss", "de") == [("alte", "Brücke"), ("Fluss",)]
    assert phrases_of("我的行李没有到", "zh") == [("行李",)]
    assert phrases_of("図書館でコンピューター", "ja") == [("図書館",), ("コンピューター",)]


def test_the_rarest_words_come_first_and_only_as_many_as_fit():
    rarity = {"jury": 5.0, "grand": 5.0, "voters": 3.0, "14": 3.0}
    found = topic_phrases(facts(SENTENCE, rarity=lambda word: rarity.get(word, 1.0), topic_words=4))
    assert found == ["grand jury", "14 voters"]


def test_no_word_is_said_twice_and_neighbors_are_parted():
    assert topic_phrases(facts("The boat met a boat, boats and nets.", topic_words=3)) == [
        "boat",
        "met",
        "nets",
    ]
    in_order = topic_phrases(facts("old boats, new nets, dry docks.", topic_words=6))
    assert in_order == ["new nets", "old boats", "dry docks"]


def test_a_short_sentence_is_filled_up_from_the_text_before():
    context = "The fisherman repaired his wooden boat. It sank."
    assert topic_phrases(facts(context, rarity=len))[0] == "sank" and "boat" in " ".join(
        topic_phrases(facts(context))
    )
    turns = (
        ("user", "Describe a lighthouse."),
        ("assistant", "Tall."),
        ("user", "Shorter."),
        ("assistant", ""),
    )
    chat = "".join(f"<|a|>{role}\n{said}<|b|>" for role, said in turns)
    found = topic_phrases(facts(chat, "answer_start", role="assistant"))
    assert found[0] == "shorter" and "lighthouse" in " ".join(found)


def test_inside_a_sentence_the_quoted_ending_is_left_out():
    found = topic_phrases(facts("The captain left. A storm broke the mast", "inside", inside_topic_words=9))
    assert "captain" in " ".join(found) and not {"the", "mast"} & set(" ".join(found).split())


def test_nothing_to_be_about():
    assert topic(facts("")) is None and topic(facts("It is.")) is None
    assert topic(facts("boats sank.", topic_words=0)) is None and math.isfinite(
        len(topic(facts("boats sank.")))
    )
