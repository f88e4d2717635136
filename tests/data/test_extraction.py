import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nla_jax.data.documents import Document
from nla_jax.data.extraction import ExtractionConfig, extract, next_words, text_after, text_of, tokenize
from nla_jax.lm.logits import logits
from nla_jax.lm.tokenized import starts_with_bos
from nla_jax.lm.transformer import Transformer
from nla_jax.sharding.mesh import make_mesh

CONFIG = ExtractionConfig(max_tokens=24, min_position=5, positions_per_document=3, next_words=2, batch_size=2)
DOCUMENTS = [
    Document(
        f"doc{i}",
        f"Number {i} of the texts says that {i * 7} words follow, and more words after them. " * 3,
        "g",
    )
    for i in range(5)
]


def test_positions_depend_on_seed_and_document_alone(tiny_lm):
    contexts = tokenize(DOCUMENTS, tiny_lm.tokenizer, CONFIG, seed=0)
    again = tokenize(DOCUMENTS[::-1][:3], tiny_lm.tokenizer, CONFIG, seed=0)
    by_id = {context.document.id: context for context in contexts}
    assert all(by_id[context.document.id] == context for context in again)
    other = tokenize(DOCUMENTS, tiny_lm.tokenizer, CONFIG, seed=1)
    assert any(a.positions != b.positions for a, b in zip(contexts, other, strict=True))


def test_positions_are_distinct_late_enough_and_never_special(tiny_lm):
    special = Document("special", "word " * 4 + "<empty_output>" * 40, "g")
    assert len(tiny_lm.tokenizer(special.text)["input_ids"]) > CONFIG.min_position
    contexts = tokenize([*DOCUMENTS, special], tiny_lm.tokenizer, CONFIG, seed=0)
    for context in contexts:
        ids = set(tiny_lm.tokenizer.all_special_ids)
        assert not ids & {context.tokens[p] for p in context.positions}
        assert CONFIG.min_position <= min(context.positions)
        assert max(context.positions) < len(context.tokens) <= CONFIG.max_tokens
        assert len(set(context.positions)) == len(context.positions)


def test_a_document_that_spells_the_bos_gets_no_second_one(tiny_lm):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    spelled = [dataclasses.replace(d, text=f"<|im_start|>{d.text}") for d in DOCUMENTS]
    contexts = tokenize(spelled, tokenizer, CONFIG, seed=0)
    plain = tokenize(DOCUMENTS, tokenizer, CONFIG, seed=0)
    assert plain[0].tokens[:1] == (bos,) and bos not in plain[0].tokens[1:]
    assert [(c.tokens, c.positions) for c in contexts] == [(c.tokens, c.positions) for c in plain]


def test_tokens_only_declared_special_are_never_positions(tiny_lm):
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<tool>", special=True), AddedToken("<plain>")])
    tool, plain = len(tokenizer) - 2, len(tokenizer) - 1
    assert tool not in tokenizer.all_special_ids
    text = "word " * 4 + "<tool><plain>" * 20
    every = dataclasses.replace(CONFIG, positions_per_document=CONFIG.max_tokens)
    (context,) = tokenize([Document("a", text, "g")], tokenizer, every, seed=0)
    assert tool in context.tokens[CONFIG.min_position :]
    chosen = {context.tokens[p] for p in context.positions}
    assert plain in chosen and tool not in chosen
    assert next_words([tool, *tokenizer.encode(" the")], tokenizer, 2) == ["the"]


def test_text_of_a_document_has_no_bos(tiny_lm):
    plain = tiny_lm.tokenizer
    bos = copy.deepcopy(plain)
    bos.add_bos_token = True
    bos.update_post_processor()
    ids = plain.encode("Some text.")
    assert bos.encode("Some text.") == [plain.bos_token_id, *ids]
    assert text_of(bos.encode("Some text."), bos) == text_of(ids, plain) == "Some text."
    # A text may spell the token out; then it is the document's own.
    spelled = f"{plain.bos_token}user"
    assert text_of(bos.encode(spelled), bos) == text_of(plain.encode(spelled), plain) == spelled
    assert not starts_with_bos(plain.encode(spelled), plain)


def test_short_documents_are_an_error_that_names_the_longest(tiny_lm):
    with pytest.raises(
        ValueError, match=r"no document is longer than min_position=5 tokens \(the longest of 1 has"
    ):
        tokenize([Document("a", "one", "g")], tiny_lm.tokenizer, CONFIG, seed=0)


@pytest.mark.parametrize("words", [0, 2])
def test_activations_are_the_residual_stream_of_a_plain_forward(tiny_lm, words):
    contexts = tokenize(DOCUMENTS, tiny_lm.tokenizer, CONFIG, seed=0)
    config = dataclasses.replace(CONFIG, next_words=words)
    batches = list(
        extract(contexts, tiny_lm.params, tiny_lm.tokenizer, tiny_lm.config, 2, config, make_mesh())
    )
    rows = {name: [value for batch in batches for value in batch[name]] for name in batches[0]}
    assert len(rows["doc_id"]) == sum(len(context.positions) for context in contexts)
    index = 0
    for context in contexts:
        out = Transformer(tiny_lm.config).apply(
            {"params": tiny_lm.params}, jnp.array([context.tokens]), capture=(2,)
        )
        for position in context.positions:
            expected = np.asarray(out.resid[2][0, position])
            np.testing.assert_allclose(rows["activation_vector"][index], expected, rtol=1e-4, atol=1e-5)
            assert rows["n_raw_tokens"][index] == position + 1
            text = tiny_lm.tokenizer.decode(context.tokens[: position + 1])
            assert rows["detokenized_text_truncated"][index] == text
            if words:
                scores = logits(tiny_lm.params, tiny_lm.config, out.final_BTD[0, position])
                likeliest = np.argsort(-np.asarray(scores))[: 4 * words].tolist()
                assert rows["next_words"][index] == next_words(likeliest, tiny_lm.tokenizer, words)
            else:
                assert rows["next_words"][index] == []
            index += 1


def test_next_words_are_readable_and_different(tiny_lm):
    encode = tiny_lm.tokenizer.encode
    ids = [*encode("<|im_end|>"), *encode(" the"), *encode("the"), *encode("\n"), *encode(" a")]
    assert next_words(ids, tiny_lm.tokenizer, 3) == ["the", "newline", "a"]


def test_a_second_shard_compiles_nothing(tiny_lm):
    documents = [Document(str(i), "The array has a shape and a type. " * 8, "x") for i in range(4)]
    config = ExtractionConfig(
        max_tokens=40, min_position=5, positions_per_document=2, next_words=1, batch_size=2
    )
    contexts = tokenize(documents, tiny_lm.tokenizer, config, 0)
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))

    def shard(part):
        return list(extract(part, tiny_lm.params, tiny_lm.tokenizer, tiny_lm.config, 1, config, make_mesh()))

    shard(contexts[:2])
    events.clear()
    shard(contexts[2:])
    assert events.count("/jax/core/compile/jaxpr_trace_duration") == 0


def test_a_continuation_keeps_the_space_before_it(tiny_lm):
    words = Tokenizer(models.WordLevel({"▁ships": 0, "▁and": 1, "▁ice": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=words)
    assert sentencepiece.decode([1, 2]) == "and ice"
    assert text_after([0], [1, 2], sentencepiece) == " and ice"
    # A character of several bytes may be cut in two.
    ids = tiny_lm.tokenizer.encode("né", add_special_tokens=False)
    for at in range(1, len(ids)):
        assert text_after(ids[:at], ids[at:], tiny_lm.tokenizer)[-1] in "é\ufffd"


def test_documents_that_are_too_short_are_counted(tiny_lm, capsys):
    short = Document("short", "word", "g")
    contexts = tokenize([*DOCUMENTS, short], tiny_lm.tokenizer, CONFIG, seed=0)
    assert "1 of 6 documents have no token from position 5 on" in capsys.readouterr().err
    assert [context.document for context in contexts] == DOCUMENTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_tokens": 50},
            "min_position is 50, and documents are cut after extraction.max_tokens=50 tokens, so",
        ),
        ({"positions_per_document": 0}, "extraction.positions_per_document is 0, expected at least 1"),
        ({"shard_documents": 0}, "extraction.shard_documents is 0, expected at least 1"),
        ({"min_position": -1}, "extraction.min_position is -1, expected at least 0"),
    ],
)
def test_sizes_that_leave_nothing_to_read_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ExtractionConfig(**changes)
