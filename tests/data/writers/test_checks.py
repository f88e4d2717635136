import pytest

from nla_jax.data.writers.checks import RefusedText, TextChecks, checked_text

CONTEXT = (
    "The harbor master counted the crates twice before he signed, and then he said that the ship could not"
)
GOOD = (
    "A verb such as leave or sail is due, since a modal was negated.\n"
    "It is a report about an official who checks cargo in a port.\n"
    'It ends with "the ship could not".'
)


def refusal(answer: str, **checks) -> RefusedText:
    with pytest.raises(RefusedText) as caught:
        checked_text(answer, CONTEXT, TextChecks(**checks))
    return caught.value


@pytest.mark.parametrize(
    "answer",
    [
        f"<explanation>{GOOD}</explanation>",
        f"Here it is:\n<explanation>\n{GOOD}\n</explanation>\nI hope that it helps.",
        f"< Explanation >\n{GOOD}\n</ EXPLANATION >",
        f"<think>About <explanation> tags.</think><explanation>{GOOD}</explanation>",
        f"{GOOD}\n</explanation>",
        f"&lt;explanation&gt;{GOOD}&lt;/explanation&gt;".replace('"', "&quot;"),
        "<explanation>\n```text\n"
        + "\n".join(f"{n}. {line}" for n, line in enumerate(GOOD.splitlines(), 1))
        + "\n```\n</explanation>",
        "<explanation>\n\n- " + GOOD.replace("\n", "\n\n- ") + "\n</explanation>",
    ],
    ids=["bare", "chatter", "odd tags", "thoughts", "no opening", "escaped", "numbered fence", "bullets"],
)
def test_forms_that_are_tolerated_give_one_text(answer):
    assert checked_text(answer, CONTEXT, TextChecks()) == GOOD


def test_without_tags_all_of_the_answer_is_the_text_where_that_is_allowed():
    assert checked_text(GOOD, CONTEXT, TextChecks(needs_tag=False)) == GOOD
    assert refusal(GOOD).reason == "no tag"


@pytest.mark.parametrize(
    ("answer", "reason", "complaint"),
    [
        (f"<explanation>{GOOD}", "no closing tag", "</explanation> is missing"),
        ("<explanation>\n \n</explanation>", "nothing inside the tags", "nothing inside"),
        (f"<explanation><text>{GOOD}</text></explanation>", "a tag inside the text", "one pair"),
        (
            f"<explanation>{GOOD.splitlines()[0]}</explanation>",
            "too few statements",
            "has 1 statements; write 2 to 4",
        ),
        (f"<explanation>{GOOD}\n{GOOD}</explanation>", "too many statements", "has 6 statements"),
        ("<explanation>A verb.\nA port.</explanation>", "too few words", "has 4 words; write 12 to 140"),
        (f"<explanation>{GOOD} {'word ' * 140}</explanation>", "too many words", "words; write 12 to 140"),
    ],
)
def test_what_fails_says_why(answer, reason, complaint):
    failed = refusal(answer)
    assert failed.reason == reason and complaint in str(failed)


def test_sentences_of_one_line_are_statements():
    line = GOOD.replace("\n", " ")
    assert checked_text(f"<explanation>{line}</explanation>", CONTEXT, TextChecks()) == line


def test_words_of_the_context_may_be_repeated_in_the_last_quotation_alone():
    copied = "the harbor master counted the crates twice before he signed"
    first, middle, _ = GOOD.splitlines()
    at_the_end = f'<explanation>{first}\n{middle}\nIt ends "{copied}".</explanation>'
    assert copied in checked_text(at_the_end, CONTEXT, TextChecks())
    for answer in (
        f'<explanation>{first}\nIt begins "{copied}".\nThat is all.</explanation>',
        f"<explanation>{first}\n{middle}\nIt ends {copied}.</explanation>",
    ):
        assert refusal(answer).reason == "copied words"
        assert checked_text(answer, CONTEXT, TextChecks(copied_words=10))
    assert refusal(at_the_end, quoted_words=9).reason == "a long quotation"
    assert refusal(at_the_end, copied_words=3, quoted_words=0).reason == "a long quotation"


def test_checks_that_contradict_themselves():
    with pytest.raises(ValueError, match="fewest_words=5 and most_words=4"):
        TextChecks(fewest_words=5, most_words=4)
    with pytest.raises(ValueError, match="copied_words=-1; expected 0 or more"):
        TextChecks(copied_words=-1)
