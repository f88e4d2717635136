import copy
import dataclasses

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from nla_jax.data.corpora.documents import Document
from nla_jax.data.positions import PlaceWeights, PositionConfig, Tally, choose_positions
from nla_jax.data.splits import hash_fraction
from nla_jax.lm.places import TOKEN_PLACES, places
from nla_jax.lm.tokenized import tokenize_chat, tokenize_text

CONFIG = PositionConfig(max_tokens=24, min_position=5, positions_per_document=3)
UNIFORM = dataclasses.replace(CONFIG, by_place=False)
DOCUMENTS = [
    Document(
        f"doc{i}",
        f"Number {i} of the texts says that {i * 7} words follow, and more words after them. " * 3,
        "g",
    )
    for i in range(5)
]


def choose(documents, tokenizer, config=CONFIG, seed=0, tally=None):
    return choose_positions(documents, tokenizer, config, seed, tally or Tally())


def chat(doc_id, *contents, roles=("user", "assistant")):
    messages = tuple({"role": roles[i % len(roles)], "content": text} for i, text in enumerate(contents))
    return Document(doc_id, "\n".join(contents), "chat", messages)


def test_positions_depend_on_seed_and_document_alone(tiny_lm):
    contexts = choose(DOCUMENTS, tiny_lm.tokenizer)
    again = choose(DOCUMENTS[::-1][:3], tiny_lm.tokenizer)
    by_id = {context.document.id: context for context in contexts}
    assert all(by_id[context.document.id] == context for context in again)
    other = choose(DOCUMENTS, tiny_lm.tokenizer, seed=1)
    assert any(a.positions != b.positions for a, b in zip(contexts, other, strict=True))


def test_without_weights_plain_documents_keep_the_positions_that_they_always_had(tiny_lm):
    # The rule of the first version, written out: a keyed choice among all tokens that are not special.
    for context in choose(DOCUMENTS, tiny_lm.tokenizer, UNIFORM):
        ids = tiny_lm.tokenizer(context.document.text)["input_ids"]
        special = {*tiny_lm.tokenizer.all_special_ids}
        allowed = [i for i in range(5, min(len(ids), 24)) if ids[i] not in special]
        key = int(hash_fraction(context.document.id, seed=0, purpose="positions") * 2**53)
        expected = sorted(np.random.default_rng(key).choice(allowed, size=3, replace=False).tolist())
        assert list(context.positions) == expected
        assert (list(context.tokens), list(context.continuation)) == (ids[:24], ids[24:40])


def test_positions_are_distinct_late_enough_and_never_special(tiny_lm):
    special = Document("special", "word " * 4 + "<empty_output>" * 40, "g")
    assert len(tiny_lm.tokenizer(special.text)["input_ids"]) > CONFIG.min_position
    for context in choose([*DOCUMENTS, special], tiny_lm.tokenizer):
        ids = set(tiny_lm.tokenizer.all_special_ids)
        assert not ids & {context.tokens[p] for p in context.positions}
        assert CONFIG.min_position <= min(context.positions)
        assert max(context.positions) < len(context.tokens) <= CONFIG.max_tokens
        assert len(set(context.positions)) == len(context.positions)
        assert context.length == max(context.positions) + 1


def test_a_document_that_spells_the_bos_gets_no_second_one(tiny_lm):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    spelled = [dataclasses.replace(d, text=f"<|im_start|>{d.text}") for d in DOCUMENTS]
    contexts, plain = choose(spelled, tokenizer), choose(DOCUMENTS, tokenizer)
    assert plain[0].tokens[:1] == (bos,) and bos not in plain[0].tokens[1:]
    assert [(c.tokens, c.positions) for c in contexts] == [(c.tokens, c.positions) for c in plain]


def test_tokens_only_declared_special_are_never_positions(tiny_lm):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<tool>", special=True), AddedToken("<plain>")])
    tool, plain = len(tokenizer) - 2, len(tokenizer) - 1
    assert tool not in tokenizer.all_special_ids
    text = "word " * 4 + "<tool><plain>" * 20
    every = dataclasses.replace(CONFIG, positions_per_document=CONFIG.max_tokens)
    (context,) = choose([Document("a", text, "g")], tokenizer, every)
    assert tool in context.tokens[CONFIG.min_position :]
    chosen = {context.tokens[p] for p in context.positions}
    assert plain in chosen and tool not in chosen


def test_readings_know_their_places(tiny_lm):
    every = dataclasses.replace(CONFIG, min_position=0, max_tokens=60, positions_per_document=60)
    document = Document("a", "It is so. Then\nwe go. And so on we went", "g")
    (context,) = choose([document], tiny_lm.tokenizer, every)
    source = tokenize_text(tiny_lm.tokenizer, document.text)
    assert tuple(reading.place for reading in context.readings) == places(source)
    assert {reading.place for reading in context.readings} == {"inside", "sentence_end", "line_end"}
    assert all(reading.role is reading.turn is None for reading in context.readings)


@pytest.fixture
def conversation():
    return chat("c", "Add these two. Now\nplease", "It is four, as all know", "And now?")


def test_of_chats_contents_and_the_starts_of_answers_are_read(tiny_lm, conversation):
    every = dataclasses.replace(CONFIG, min_position=0, max_tokens=400, positions_per_document=400)
    (context,) = choose([conversation], tiny_lm.tokenizer, every)
    source = tokenize_chat(tiny_lm.tokenizer, conversation.messages)
    assert context.tokens == source.ids
    found = places(source)
    assert list(context.positions) == [i for i, place in enumerate(found) if place is not None]
    for reading in context.readings:
        at = reading.start
        assert (reading.place, reading.role, reading.turn) == (found[at], source.roles[at], source.turns[at])
        assert source.in_content[at] or reading.place == "answer_start"
    assert {reading.place for reading in context.readings} >= {"turn_end", "answer_start", "inside"}
    assert context.positions[-1] == len(source) - 1  # the generation prompt's last token


def test_an_answer_starts_with_a_token_that_may_be_special(tiny_lm):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<empty_output>' }}{% endif %}"
    )
    every = dataclasses.replace(CONFIG, min_position=0, max_tokens=400, positions_per_document=400)
    (context,) = choose([chat("c", "Hello")], tokenizer, every)
    special = [context.tokens[p] for p in context.positions if context.tokens[p] in tokenizer.all_special_ids]
    assert special == tokenizer.convert_tokens_to_ids(["<empty_output>"])
    assert context.readings[-1].place == "answer_start"


def test_positions_are_chosen_by_role(tiny_lm, conversation):
    config = dataclasses.replace(
        CONFIG, min_position=0, max_tokens=400, positions_per_document=400, roles=("assistant",)
    )
    tally = Tally()
    (context,) = choose([conversation, DOCUMENTS[0]], tiny_lm.tokenizer, config, tally=tally)
    assert {reading.role for reading in context.readings} == {"assistant"}
    assert {reading.place for reading in context.readings} >= {"answer_start", "turn_end"}
    assert (tally.documents, tally.used, tally.without_role) == (2, 1, 1)
    assert tally.roles == {"user", "assistant"}


def test_an_unknown_role_is_refused_with_the_roles_there_are(tiny_lm, conversation):
    config = dataclasses.replace(CONFIG, roles=("tool",))
    tally = Tally()
    assert choose([conversation], tiny_lm.tokenizer, config, tally=tally) == []
    with pytest.raises(
        ValueError, match="no document has the role tool .*roles of the corpus are assistant, user$"
    ):
        tally.check(config)
    tally = Tally()
    choose(DOCUMENTS, tiny_lm.tokenizer, config, tally=tally)
    with pytest.raises(ValueError, match="the roles of the corpus are none, since it has no chats"):
        tally.check(config)


def test_chats_that_the_template_refuses_are_counted(tiny_lm, capsys):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    check = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"
    tokenizer.chat_template = check + tokenizer.chat_template
    # The template begins with a system's turn of its own.
    long = dataclasses.replace(CONFIG, max_tokens=400)
    good = chat("good", "Hello there, you", "And more words than this")
    bad = chat("bad", "Hello there, you", "And more", roles=("assistant", "user"))
    tally = Tally()
    contexts = choose([bad, good, DOCUMENTS[0]], tokenizer, long, tally=tally)
    assert [context.document.id for context in contexts] == ["good", "doc0"]
    tally.check(CONFIG)
    tally.warn(CONFIG)
    said = capsys.readouterr().err
    assert "1 of 3 documents are chats that the tokenizer's chat template refuses" in said
    assert "left out: 1 because the user begins" in said and said.count("warning") == 1
    tally = Tally()
    assert choose([bad], tokenizer, tally=tally) == []
    with pytest.raises(ValueError, match="refuses all chats, the first because the user begins"):
        tally.check(CONFIG)


def test_chats_need_a_chat_template(tiny_lm, conversation):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the corpus holds chats, and the tokenizer has no chat template"):
        choose([DOCUMENTS[0], conversation], tokenizer)


def test_spans_lie_in_one_turn_and_disturb_no_position(tiny_lm, conversation):
    config = dataclasses.replace(CONFIG, max_tokens=400, spans=4, span_tokens=(2, 6))
    plain, spanned = (
        choose([*DOCUMENTS, conversation], tiny_lm.tokenizer, c)
        for c in (dataclasses.replace(config, spans=0), config)
    )
    lengths = set()
    for before, context in zip(plain, spanned, strict=True):
        assert context.positions == before.positions and before.spans == ()
        assert 1 <= len(context.spans) <= 4 and len({*context.spans}) == len(context.spans)
        lengths |= {end - start for start, end in context.spans}
        for reading in context.readings[len(context.positions) :]:
            assert reading.place == "span" and reading.start >= CONFIG.min_position
            assert reading.end <= context.length <= len(context.tokens)
    assert lengths <= {2, 3, 4, 5, 6} and len(lengths) > 2
    source = tokenize_chat(tiny_lm.tokenizer, conversation.messages)
    for start, end in spanned[-1].spans:
        assert len({source.turns[i] for i in range(start, end)}) == 1
        assert all(source.in_content[start:end])


def test_a_document_without_room_for_a_span_has_none(tiny_lm):
    config = dataclasses.replace(CONFIG, spans=2, span_tokens=(8, 9))
    words = "Some words, and a few more of them here, as there always are"
    for tokens in range(6, 16):
        ids = tiny_lm.tokenizer(words)["input_ids"][:tokens]
        text = tiny_lm.tokenizer.decode(ids)
        if len(tiny_lm.tokenizer(text)["input_ids"]) == tokens:
            (context,) = choose([Document("a", text, "g")], tiny_lm.tokenizer, config)
            assert bool(context.spans) == (tokens - CONFIG.min_position >= 8)


def test_short_documents_are_an_error_that_names_the_longest(tiny_lm):
    tally = Tally()
    choose([Document("a", "one", "g")], tiny_lm.tokenizer, tally=tally)
    with pytest.raises(
        ValueError, match=r"no document is longer than min_position=5 tokens \(the longest of 1 has"
    ):
        tally.check(CONFIG)


def test_documents_that_are_too_short_are_counted(tiny_lm, capsys):
    tally = Tally()
    contexts = choose([*DOCUMENTS, Document("short", "word", "g")], tiny_lm.tokenizer, tally=tally)
    tally.warn(CONFIG)
    assert "1 of 6 documents have no token from position 5 on" in capsys.readouterr().err
    assert [context.document for context in contexts] == DOCUMENTS


def test_rows_expected_of_places_by_hand():
    weights = PlaceWeights(inside=0.4, sentence_end=0.2, line_end=0.0, turn_end=0.1, answer_start=0.3)
    # Weights of the places that occur are 0.4 and 0.2: two thirds and one third of 6 rows.
    assert weights.expected_rows({"inside": 50, "sentence_end": 9, "line_end": 9}, 6) == pytest.approx(
        {"inside": 4, "sentence_end": 2}
    )
    # The one start of an answer is short of 6 · 0.3 / 0.9 = 2; the other 5 rows are divided 2 to 1.
    assert weights.expected_rows({"inside": 50, "sentence_end": 9, "answer_start": 1}, 6) == pytest.approx(
        {"inside": 10 / 3, "sentence_end": 5 / 3, "answer_start": 1}
    )
    # A second place is short once the first is: 5 · 0.2 / 0.6 is more than 1.
    assert weights.expected_rows({"inside": 50, "sentence_end": 1, "answer_start": 1}, 6) == pytest.approx(
        {"inside": 4, "sentence_end": 1, "answer_start": 1}
    )
    # Fewer tokens than rows: all of them.
    assert weights.expected_rows({"inside": 2, "turn_end": 1}, 6) == {"inside": 2, "turn_end": 1}
    assert weights.expected_rows({"line_end": 3}, 6) == {}


def test_places_have_shares_by_their_weights(tiny_lm):
    sentences = "We saw a dog. They ran off. It was so. "
    documents = [Document(f"d{i}", sentences * 4, "g") for i in range(300)]
    weights = PlaceWeights(inside=0.3, sentence_end=0.7)
    config = dataclasses.replace(CONFIG, positions_per_document=2, place_weights=weights)
    tally = Tally()
    contexts = choose(documents, tiny_lm.tokenizer, config, tally=tally)
    counts = [sum(r.place == "sentence_end" for r in context.readings) for context in contexts]
    assert {*counts} == {1, 2}  # 2 · 0.7 = 1.4 is rounded up or down
    # Of 300 roundings 120 ± 8.5 go up.
    assert abs(counts.count(2) - 120) < 35
    assert tally.rows == {"inside": counts.count(1), "sentence_end": sum(counts)}
    shares = {place: f"{count / 6:.1f}%" for place, count in tally.rows.items()}
    expected = f"600 rows by place: sentence_end {shares['sentence_end']}, inside {shares['inside']}"
    assert tally.describe_rows() == expected and Tally().describe_rows() == "no rows"
    again = choose(documents[::-1][:7], tiny_lm.tokenizer, config)
    assert again[::-1] == contexts[-7:]
    # Of one place all tokens are as likely: the first and the last of its tokens are both read somewhere.
    inside = {r.start for context in contexts for r in context.readings if r.place == "inside"}
    ends = {r.start for context in contexts for r in context.readings if r.place == "sentence_end"}
    assert len(inside) > 8 and inside.isdisjoint(ends) and min(inside) < 7 and max(inside) > 20


def test_places_without_weight_are_never_read(tiny_lm, conversation, capsys):
    config = dataclasses.replace(
        CONFIG, max_tokens=400, place_weights=PlaceWeights(0.0, 0.0, 0.0, turn_end=1.0, answer_start=1.0)
    )
    tally = Tally()
    (context,) = choose([conversation, *DOCUMENTS], tiny_lm.tokenizer, config, tally=tally)
    assert {reading.place for reading in context.readings} == {"turn_end", "answer_start"}
    tally.check(config)
    tally.warn(config)
    said = capsys.readouterr().err
    assert "5 of 6 documents have no token of the places turn_end, answer_start, and are left out" in said
    assert said.count("warning") == 1
    tally = Tally()
    assert choose(DOCUMENTS, tiny_lm.tokenizer, config, tally=tally) == []
    with pytest.raises(
        ValueError, match="no document has a token to read of the places turn_end, answer_start, which alone"
    ):
        tally.check(config)
    # Spans run over tokens of any place.
    spanned = dataclasses.replace(config, spans=2, span_tokens=(4, 5))
    assert all(
        context.spans and not context.positions for context in choose(DOCUMENTS, tiny_lm.tokenizer, spanned)
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"inside": -0.1}, "extraction.place_weights.inside is -0.1, expected a finite number that is not"),
        ({"turn_end": float("nan")}, "extraction.place_weights.turn_end is nan, expected"),
        ({"line_end": float("inf")}, "extraction.place_weights.line_end is inf, expected"),
        (dict.fromkeys(TOKEN_PLACES, 0.0), "extraction.place_weights are all 0, so that no token would be"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        PlaceWeights(**weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_tokens": 50},
            "min_position is 50, and documents are cut after extraction.max_tokens=50 tokens, so",
        ),
        ({"positions_per_document": 0}, "extraction.positions_per_document is 0, expected at least 1"),
        ({"min_position": -1}, "extraction.min_position is -1, expected at least 0"),
        ({"spans": -1}, "extraction.spans is -1, expected at least 0"),
        (
            {"span_tokens": (9, 8)},
            r"extraction.span_tokens is \(9, 8\), expected the shortest and the longest",
        ),
    ],
)
def test_positions_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PositionConfig(**changes)
