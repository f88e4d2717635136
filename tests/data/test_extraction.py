import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nla_jax.data.corpora.documents import Document
from nla_jax.data.extraction import ExtractionConfig, Rows, columns_of, expected_words, next_words, read_rows
from nla_jax.data.positions import Context, Reading, Tally, choose_positions
from nla_jax.lm.logits import logits
from nla_jax.lm.tokenized import starts_with_bos
from nla_jax.lm.transformer import Transformer
from nla_jax.sharding.mesh import make_mesh

CONFIG = ExtractionConfig(
    max_tokens=64, min_position=5, positions_per_document=9, next_words=2, batch_size=2, length_buckets=2
)
TURNS = (("system", "Be"), ("user", "Hi"), ("assistant", "So"), ("user", "Ho"))
CHAT = tuple({"role": role, "content": content} for role, content in TURNS)
DOCUMENTS = [
    Document("doc0", "Number 0 of the texts says that words follow, and more words after them. " * 3, "g"),
    Document("doc1", "A short text, of few words.", "h"),
    Document("chat", "as it is", "c", CHAT),
    Document("doc2", "This one is of middling size.\nIt ends", "g"),
    Document("doc3", "Another long text, é 日 and others, that goes on and on. " * 4, "g"),
]


def choose(lm, config, documents=DOCUMENTS):
    return choose_positions(documents, lm.tokenizer, config, 0, Tally())


def extract(lm, contexts, config, layers=(2,)):
    return read_rows(contexts, lm.params, lm.config, layers, config, make_mesh())


@functools.partial(jax.jit, static_argnames="config")
def forward(params, tokens_1T, config):
    return Transformer(config).apply({"params": params}, tokens_1T, capture=(0, 1, 2, 3))


def streams_of(lm, context):
    """The plain forward of one document alone; padding follows it, where nothing sees it."""
    tokens_1T = np.zeros((1, 64), np.int32)
    tokens_1T[0, : len(context.tokens)] = context.tokens
    return forward(lm.params, tokens_1T, lm.config)


@pytest.mark.parametrize("words", [0, 2])
def test_rows_are_those_of_a_plain_forward_of_each_document_and_of_a_plain_decoding(tiny_lm, words):
    # What the first version did, one document and one row at a time.
    config = dataclasses.replace(CONFIG, next_words=words)
    contexts, tokenizer = choose(tiny_lm, config), tiny_lm.tokenizer
    rows = columns_of(contexts, extract(tiny_lm, contexts, config), 2, tokenizer, config)
    assert len(rows["doc_id"]) == sum(len(context.positions) for context in contexts)
    index = 0
    for context in contexts:
        out = streams_of(tiny_lm, context)
        whole = [*context.tokens, *context.continuation]
        for position in context.positions:
            expected = np.asarray(out.resid[2][0, position])
            np.testing.assert_allclose(rows["activation_vector"][index], expected, rtol=1e-4, atol=1e-5)
            assert rows["n_raw_tokens"][index] == position + 1
            text = tokenizer.decode(whole[: position + 1])
            assert rows["detokenized_text_truncated"][index] == text
            longer = tokenizer.decode(whole[: position + 17])
            after = longer.removeprefix(text) if longer.startswith(text) else None
            assert rows["true_continuation"][index] == (
                tokenizer.decode(whole[position + 1 : position + 17]) if after is None else after
            )
            assert (rows["doc_id"][index], rows["genre"][index]) == (
                context.document.id,
                context.document.genre,
            )
            if words:
                scores = logits(tiny_lm.params, tiny_lm.config, out.final_BTD[0, position])
                likeliest = np.argsort(-np.asarray(scores))[: 4 * words].tolist()
                chances = np.asarray(jax.nn.softmax(scores))[likeliest].tolist()
                expected = expected_words(likeliest, chances, tokenizer, words)
                assert rows["next_words"][index] == [*expected]
                np.testing.assert_allclose(rows["next_probabilities"][index], [*expected.values()], rtol=1e-4)
            else:
                assert rows["next_words"][index] == rows["next_probabilities"][index] == []
            assert rows["last_token_ids"][index] == list(whole[position - 1 : position + 1])
            index += 1
    assert set(rows["activation_layer"]) == {2} and "span_start" not in rows
    assert rows["place"] == [reading.place for context in contexts for reading in context.readings]
    assert {*rows["role"]} == {None, "system", "user", "assistant"} and {*rows["turn"]} > {None}


@pytest.mark.parametrize("words", [0, 2])
def test_spans_are_means_and_several_layers_are_read_in_one_pass(tiny_lm, words):
    config = dataclasses.replace(CONFIG, spans=2, span_tokens=(3, 9), next_words=words)
    contexts = choose(tiny_lm, config)
    read = extract(tiny_lm, contexts, config, layers=(1, 0, 3))
    assert set(read.activations) == {1, 0, 3}
    readings = [(context, reading) for context in contexts for reading in context.readings]
    assert sum(reading.place == "span" for _, reading in readings) > 3
    for layer, vectors_ND in read.activations.items():
        for (context, reading), vector in zip(readings, vectors_ND, strict=True):
            stream = np.asarray(streams_of(tiny_lm, context).resid[layer][0])
            expected = stream[reading.start : reading.end].mean(axis=0)
            np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-5)
    rows = columns_of(contexts, read, 3, tiny_lm.tokenizer, config)
    assert set(rows["activation_layer"]) == {3}
    assert rows["activation_vector"] is read.activations[3]
    for (context, reading), text, start, words_after in zip(
        readings, rows["detokenized_text_truncated"], rows["span_start"], rows["next_words"], strict=True
    ):
        assert start == reading.start
        assert text == tiny_lm.tokenizer.decode(context.tokens[: reading.end])
        if words:
            out = streams_of(tiny_lm, context)
            scores = jax.nn.softmax(logits(tiny_lm.params, tiny_lm.config, out.final_BTD[0, reading.end - 1]))
            likeliest = np.argsort(-np.asarray(scores))[: 4 * words].tolist()
            chances = np.asarray(scores)[likeliest].tolist()
            assert words_after == [*expected_words(likeliest, chances, tiny_lm.tokenizer, words)]


def test_rows_do_not_depend_on_the_batch(tiny_lm):
    contexts = choose(tiny_lm, CONFIG)
    together = extract(tiny_lm, contexts, CONFIG)
    for changes in ({"batch_size": 5}, {"length_buckets": 1}, {"length_buckets": 7, "batch_size": 3}):
        other = extract(tiny_lm, contexts, dataclasses.replace(CONFIG, **changes))
        np.testing.assert_allclose(other.activations[2], together.activations[2], rtol=1e-4, atol=1e-5)
        assert (other.top_ids == together.top_ids).all()
    backwards = extract(tiny_lm, contexts[::-1], CONFIG).activations[2]
    at, parts = 0, []
    for context in contexts[::-1]:
        parts.append(backwards[at : at + len(context.readings)])
        at += len(context.readings)
    np.testing.assert_allclose(np.concatenate(parts[::-1]), together.activations[2], rtol=1e-4, atol=1e-5)


def test_batches_are_no_longer_than_their_documents_need(tiny_lm, monkeypatch):
    shapes = []

    def residual_at(params, tokens_BT, positions_BP, **options):
        shapes.append(tokens_BT.shape)
        B, P = positions_BP.shape
        return (jnp.zeros((B, P, 4)),), (jnp.zeros((B, P, 8), jnp.int32), jnp.zeros((B, P, 8)))

    monkeypatch.setattr("nla_jax.data.extraction._residual_at", residual_at)
    done = []
    contexts = [
        Context(DOCUMENTS[0], tuple(range(64)), (), (Reading(length - 1, length, "inside", None, None),))
        for length in (6, 64, 7, 32, 33)
    ]
    read_rows(contexts, {}, tiny_lm.config, (2,), CONFIG, make_mesh(), on_batch=done.append)
    # Of the longest two together, of 32 and 7, and of 6; half of the longest length is a length as well.
    assert shapes == [(2, 64), (2, 32), (2, 32)]
    assert done == [2, 2, 1]


def test_a_second_shard_compiles_nothing(tiny_lm):
    documents = [Document(str(i), "The array has a shape and a type. " * 8, "x") for i in range(4)]
    config = ExtractionConfig(
        max_tokens=40, min_position=30, positions_per_document=2, next_words=1, batch_size=2, length_buckets=1
    )
    contexts = choose(tiny_lm, config, documents)
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    extract(tiny_lm, contexts[:2], config)
    events.clear()
    extract(tiny_lm, contexts[2:], config)
    assert events.count("/jax/core/compile/jaxpr_trace_duration") == 0


def test_no_rows(tiny_lm):
    empty = columns_of([], Rows.empty((2, 1), 32), 1, tiny_lm.tokenizer, CONFIG)
    assert empty["activation_vector"].shape == (0, 32)
    assert empty["doc_id"] == empty["next_words"] == empty["next_probabilities"] == []


def around(tokenizer, tokens, continuation=()):
    """The text up to the last of some tokens, and what it goes on with."""
    last = len(tokens)
    context = Context(
        DOCUMENTS[0], tuple(tokens), tuple(continuation), (Reading(last - 1, last, "inside", None, None),)
    )
    rows = columns_of([context], Rows({0: np.zeros((1, 4), np.float32)}, None, None), 0, tokenizer, CONFIG)
    return rows["detokenized_text_truncated"][0], rows["true_continuation"][0]


def test_text_of_a_document_has_no_bos(tiny_lm):
    plain = tiny_lm.tokenizer
    bos = copy.deepcopy(plain)
    bos.add_bos_token = True
    bos.update_post_processor()
    ids = plain.encode("Some text.")
    assert bos.encode("Some text.") == [plain.bos_token_id, *ids]
    assert around(bos, bos.encode("Some text."), ids) == around(plain, ids, ids) == ("Some text.",) * 2
    # A text may spell the token out; then it is the document's own.
    spelled = f"{plain.bos_token}user"
    assert around(bos, bos.encode(spelled))[0] == around(plain, plain.encode(spelled))[0] == spelled
    assert not starts_with_bos(plain.encode(spelled), plain)


def test_a_continuation_keeps_the_space_before_it(tiny_lm):
    words = Tokenizer(models.WordLevel({"▁ships": 0, "▁and": 1, "▁ice": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=words)
    assert sentencepiece.decode([1, 2]) == "and ice"
    assert around(sentencepiece, [0], [1, 2]) == ("ships", " and ice")
    # A character of several bytes may be cut in two.
    ids = tiny_lm.tokenizer.encode("né", add_special_tokens=False)
    for at in range(1, len(ids)):
        assert around(tiny_lm.tokenizer, ids[:at], ids[at:])[1][-1] in "é\ufffd"


def test_next_words_are_readable_and_different(tiny_lm):
    encode = tiny_lm.tokenizer.encode
    ids = [*encode("<|im_end|>"), *encode(" the"), *encode("the"), *encode("\n"), *encode(" a")]
    assert next_words(ids, tiny_lm.tokenizer, 3) == ["the", "newline", "a"]
    assert next_words(ids, tiny_lm.tokenizer, 1) == ["the"] and next_words([], tiny_lm.tokenizer, 1) == []
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    assert next_words([len(tokenizer) - 1, *encode(" the")], tokenizer, 2) == ["the"]


def test_probabilities_of_tokens_that_spell_one_word_are_summed_up(tiny_lm):
    encode = tiny_lm.tokenizer.encode
    ids = [*encode("<|im_end|>"), *encode(" a"), *encode(" the"), *encode("the"), *encode("\n")]
    words = expected_words(ids, [0.5, 0.15, 0.125, 0.0625, 0.03125], tiny_lm.tokenizer, 2)
    assert [*words.items()] == [("the", 0.1875), ("a", 0.15)]


def test_the_first_token_has_none_before_it(tiny_lm):
    context = Context(
        DOCUMENTS[0], (7, 8, 9), (), tuple(Reading(i, i + 1, "inside", None, None) for i in (0, 2))
    )
    rows = Rows({0: np.zeros((2, 4), np.float32)}, None, None)
    assert columns_of([context], rows, 0, tiny_lm.tokenizer, CONFIG)["last_token_ids"] == [[-1, 7], [8, 9]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_documents": 0}, "extraction.shard_documents is 0, expected at least 1"),
        ({"length_buckets": 0}, "extraction.length_buckets is 0, expected at least 1"),
        ({"layers": (2, 3, 2)}, r"extraction.layers names \[2\] more than once"),
    ],
)
def test_sizes_that_leave_nothing_to_read_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ExtractionConfig(**changes)
