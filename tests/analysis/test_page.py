"""The page of explained texts, on texts whose tokens, rows and colours are written out by hand."""

import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from nla_jax.analysis.page import Reading, write_page
from nla_jax.autoencoder.results import ExplainedRow, Explanations, Scores
from nla_jax.lm.activations import Activations
from nla_jax.lm.tokenized import TokenizedText, tokenize_chat

EVIL = '<script>alert("x")</script> & \'"'


def words(text: str) -> TokenizedText:
    """A text whose tokens are its words and line ends, with the space before."""
    found = list(re.finditer(r" ?[^ \n]+|\n", text))
    nothing = (None,) * len(found)
    return TokenizedText(
        text=text,
        ids=tuple(range(len(found))),
        tokens=tuple(match.group() for match in found),
        spans=tuple(match.span() for match in found),
        starts_with_bos=False,
        roles=nothing,
        turns=nothing,
        in_content=(True,) * len(found),
    )


def explained(
    position: int, text: str | None, fve_nrm: float | None, sample: int = 0, **known
) -> ExplainedRow:
    cosine = None if fve_nrm is None else 0.9
    return ExplainedRow(text, 0, sample, position, cosine=cosine, fve_nrm=fve_nrm, **known)


class Page(HTMLParser):
    """The elements of a page: (tag, attributes, the text inside, the elements around)."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open = [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "around": list(self.open)}
        self.elements.append(element)
        if tag not in ("meta", "br"):
            self.open.append(element)

    def handle_endtag(self, tag):
        while self.open.pop()["tag"] != tag:
            pass

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def having(self, name: str, tag: str | None = None) -> list[dict]:
        """Elements of a class."""
        return [
            element
            for element in self.elements
            if name in element["attrs"].get("class", "").split() and tag in (None, element["tag"])
        ]

    def by_id(self, identity: str) -> dict:
        (found,) = [element for element in self.elements if element["attrs"].get("id") == identity]
        return found


@pytest.fixture
def show(tmp_path):
    def show(*readings: Reading, about: str = "") -> Page:
        return Page(write_page(tmp_path / "out" / "page.html", readings, title="T", about=about))

    return show


def colour(element: dict) -> str:
    return element["attrs"]["style"].removeprefix("background-color: ")


def test_the_whole_text_is_there_with_its_line_ends_and_what_no_token_covers(show):
    source = dataclasses.replace(words("a b\n\nc"), text="a b\n\nc  ")
    page = show(Reading(source, [explained(1, "one", 0.5)]))
    (turn,) = page.having("turn")
    assert turn["text"].strip("\n ") == "a b\n\nc"
    assert "c  </p>" in page.source
    assert len([e for e in page.having("end") if turn in e["around"]]) == 2


def test_whatever_comes_in_is_escaped(show):
    rows = [explained(1, EVIL, 0.5, judges={EVIL: {"cosine": 0.5, "fve_nrm": 0.1}}, token=EVIL)]
    reading = Reading(words(f"one {EVIL} \ud83d"), rows, 1, EVIL, EVIL)
    page = show(reading, reading, about=EVIL)
    assert [e["tag"] for e in page.elements].count("script") == 1
    assert page.source.count("<script>") == 1 and "alert(" in page.source
    assert page.source.count("alert(&#34;x&#34;)") >= 5


def test_nothing_but_the_pages_own_script_runs_and_nothing_is_requested(show):
    page = show(Reading(words("a b"), [explained(0, "x", 0.5)]))
    policy = next(e["attrs"]["content"] for e in page.elements if "http-equiv" in e["attrs"])
    script = re.search(r"<script>(.*)</script>", page.source, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    for element in page.elements:
        assert not {"src", "onclick", "srcset"} & set(element["attrs"])
        assert element["attrs"].get("href", "#").startswith("#")
    assert "http" not in page.source.replace("http-equiv", "")


def test_a_tokens_colour_is_the_mean_of_its_samples(show):
    rows = [
        explained(2, "x", 0.2),
        explained(0, "y", -0.4),
        explained(2, "z", 0.6, sample=1),
        explained(1, "w", 3.0),
    ]
    page = show(Reading(words("a b c d"), rows, measured_against="against the mean of 7 activations"))
    tokens = page.having("token")
    # 0.75 of the value is the opacity; beyond 1 it grows no more.
    assert [colour(token) for token in tokens] == [
        "rgba(226, 120, 36, 0.300)",
        "rgba(56, 132, 220, 0.750)",
        "rgba(56, 132, 220, 0.300)",
    ]
    assert [token["text"] for token in tokens] == ["a", " b", " c"]
    assert "Colour: fve_nrm against the mean of 7 activations; the mean" in " ".join(
        page.elements[next(i for i, e in enumerate(page.elements) if e["text"].startswith("Colour"))][
            "text"
        ].split()
    )


def test_without_a_training_mean_the_cosine_colours(show):
    row = ExplainedRow("x", 0, 0, 0, cosine=0.75)
    page = show(Reading(words("a b"), [row], measured_against="this NLA came without a training mean"))
    assert colour(page.having("token")[0]) == "rgba(56, 132, 220, 0.375)"
    assert "cosine; this NLA came without a training mean" in " ".join(
        re.sub("<.*?>", "", page.source).split()
    )
    assert "fve_nrm" not in page.source.partition("<script>")[0]


def test_without_scores_there_is_no_colour(show):
    page = show(Reading(words("a b"), [ExplainedRow("x", 0, 0, 0), ExplainedRow("y", 1, 0, 1)]))
    assert {colour(token) for token in page.having("token")} == {"transparent"}
    assert "not scored" in page.source


def test_a_token_leads_to_all_its_samples_with_all_their_figures(show):
    judge = {"judge": {"cosine": 0.8, "fve_nrm": 0.25}}
    rows = [explained(1, "first", 0.5, judges=judge), explained(1, None, -0.1, sample=1, judges=judge)]
    page = show(Reading(words("a b"), rows))
    (token,) = page.having("token")
    article = page.by_id(token["attrs"]["href"][1:])
    assert "1 ' b'" in article["text"]
    samples = [
        " ".join(e["text"].split()) for e in page.elements if e["tag"] == "li" and article in e["around"]
    ]
    assert samples == [
        "first own AR: fve_nrm 0.500 cosine 0.900 judge: fve_nrm 0.250 cosine 0.800",
        "(no closed explanation) own AR: fve_nrm −0.100 cosine 0.900 judge: fve_nrm 0.250 cosine 0.800",
    ]


def test_tokens_before_the_first_trained_position_are_marked(show):
    page = show(Reading(words("a b c d"), [explained(1, "x", 0.1), explained(2, "y", 0.1)], min_position=2))
    words_of = page.having("words")[0]
    early = [e for e in page.having("early") if words_of in e["around"]]
    assert [(e["tag"], e["text"]) for e in early] == [("span", "a"), ("a", " b")]
    assert "Before position 2" in page.by_id("t0p1")["text"]
    assert "Before position 2" not in page.by_id("t0p2")["text"]


def test_a_chat_is_shown_in_turns(show, tiny_lm):
    messages = [{"role": "user", "content": "Hello <b>"}, {"role": "assistant", "content": "Yes"}]
    source = tokenize_chat(tiny_lm.tokenizer, messages)
    last = source.last_of_turns()[-1]
    page = show(Reading(source, [explained(last, "x", 0.1, role="assistant")]))
    turns = page.having("turn")
    heads = [e["text"] for e in page.elements if e["tag"] == "h4"]
    assert heads == ["user", "assistant"] and len(turns) == 2
    assert "Hello <b>" in turns[0]["text"] and "Yes" in turns[1]["text"]
    template = "".join(e["text"] for e in page.having("template"))
    assert "<|im_start|>" in template and "Yes" not in template and "Hello" not in template


def test_several_texts_have_a_list(show):
    reading = Reading(words("one two"), [explained(0, "x", 0.25)], name="the first")
    page = show(reading, dataclasses.replace(reading, name=""))
    (texts,) = page.having("texts")
    links = [e for e in page.elements if e["tag"] == "a" and texts in e["around"]]
    assert [(e["attrs"]["href"], e["text"]) for e in links] == [
        ("#t0", "the first1 of 2 tokens, 0.25"),
        ("#t1", "one two1 of 2 tokens, 0.25"),
    ]
    assert page.by_id("t1")["tag"] == "section"


def test_tokens_that_share_a_character_can_each_be_chosen(show):
    source = dataclasses.replace(
        words("é b"), ids=(0, 1, 2), tokens=("�", "�", " b"), spans=((0, 1), (0, 1), (1, 3))
    )
    source = dataclasses.replace(source, roles=(None,) * 3, turns=(None,) * 3, in_content=(True,) * 3)
    page = show(Reading(source, [explained(0, "x", 0.1), explained(1, "y", 0.1)]))
    assert [token["text"] for token in page.having("token")] == ["é", "▯"]


def test_activations_serve_as_the_text_and_the_file_depends_on_nothing_else(tmp_path):
    source = words("a b c")
    activations = Activations(np.ones((1, 4), np.float32), 3, source, (1,))
    explanations = Explanations(("x",), 1, activations)
    scores = Scores(np.array([0.9]), np.array([0.2]), np.array([0.5]), 0.5, "against a mean")
    paths = [
        write_page(tmp_path / name, [Reading(given, explanations.rows(scores))], title="T", about="")
        for name, given in (("a.html", activations), ("b.html", source))
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


@pytest.mark.parametrize("position", [None, 2, -1])
def test_a_row_without_a_place_is_refused(show, position):
    with pytest.raises(ValueError, match="has no place in a text of 2 tokens"):
        show(Reading(words("a b"), [ExplainedRow("x", 0, 0, position)]))


def test_no_texts_are_refused(show):
    with pytest.raises(ValueError, match="no texts"):
        show()
