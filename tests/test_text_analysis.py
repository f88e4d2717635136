import pytest

from nla_jax import text_analysis

CONTEXT = "The cat sat on the mat. Nobody had seen the Fulton County jury in 1958, it said."


def test_copied_runs_by_hand():
    # Of "the cat sat", "cat sat down", "sat down here" the first stands in the context.
    assert text_analysis.copied_ngrams("The cat sat down here", CONTEXT) == (1, 3)
    assert (
        text_analysis.copied_ngrams(CONTEXT, CONTEXT)[0]
        == text_analysis.copied_ngrams(CONTEXT, CONTEXT)[1]
        == 15
    )
    assert text_analysis.copied_ngrams("too short", CONTEXT) == (0, 0)


def test_longest_copied_span_by_hand():
    assert text_analysis.longest_copied_span("It says that nobody had seen the Dallas jury", CONTEXT) == 4
    assert text_analysis.longest_copied_span("entirely other", CONTEXT) == 0
    assert text_analysis.longest_copied_span(CONTEXT, CONTEXT) == 17


def test_repetition_and_boilerplate_by_hand():
    # ab ba ab ba ab: three runs stood there before.
    assert text_analysis.repeated_ngrams("a b a b a b") == (3, 5)
    texts = ["it ends with the cat", "it ends with the dog", "it ends with the cat"]
    # Of the first text's two runs of four words "it ends with the" is elsewhere; the other only in its own document.
    assert text_analysis.boilerplate(texts, ["d0", "d1", "d0"]) == [(1, 2), (1, 2), (1, 2)]
    assert text_analysis.foreign_letters("aé 日1") == (2, 3)


def test_sentences_leave_quotes_whole():
    written = 'Ends "it. Then he". Next the, a. Topic cats.'
    assert text_analysis.sentences(written) == ['Ends "it. Then he".', "Next the, a.", "Topic cats."]
    assert text_analysis.quotes(written) == ["it. Then he"]
    assert text_analysis.without_quotes(written) == "Ends . Next the, a. Topic cats."


def test_claims_by_rule():
    found = text_analysis.claims(
        'It ends with "the mat". Likely next: jury, court. About cats. On the Fulton trial.',
        frame={"ends"},
    )
    assert [(claim.kind, claim.text) for claim in found] == [
        ("detail", "the mat"),
        ("expectation", "Likely next: jury, court."),
        ("theme", "About cats."),
        ("entity", "On the Fulton trial."),
    ]
    assert found[0].rest == "It ends with . Likely next: jury, court. About cats. On the Fulton trial."
    assert found[2].rest == 'It ends with "the mat". Likely next: jury, court. On the Fulton trial.'
    assert text_analysis.claims("") == []


def test_a_share_of_nothing_is_not_zero():
    assert text_analysis.share([(1, 2), (0, 2)]) == 0.25 and text_analysis.share([(0, 3), (0, 0)]) == 0
    assert text_analysis.share([]) is None and text_analysis.share([(0, 0)]) is None


def test_frame_words_are_what_all_texts_share():
    texts = [f'Ends "w{i}". Topic t{i}.' for i in range(10)]
    assert text_analysis.frame_words(texts) == {"ends", "topic"}


@pytest.mark.parametrize(
    ("claim", "exact", "by_stem"),
    [
        ("sat on the", True, True),
        ("seeing cats", False, False),  # "seen" has another stem than "seeing"
        ("About the cats", False, True),
        ("jury, mat", True, True),
        ("the dog", False, False),
        ("", False, False),
    ],
)
def test_what_a_context_says(claim, exact, by_stem):
    assert text_analysis.says_exactly(claim, CONTEXT) == exact
    assert text_analysis.says_by_stem(claim, CONTEXT) == by_stem


def test_quotes_stand_in_order():
    assert text_analysis.stands_in("sat ON the", CONTEXT) and not text_analysis.stands_in(
        "on sat the", CONTEXT
    )
    assert not text_analysis.stands_in("", CONTEXT)
