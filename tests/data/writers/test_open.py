"""The writer that a config names, and classes of the user's own."""

import textwrap

import numpy as np
import pytest

from nla_jax.chat.config import ChatConfig
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.data.writers.chat import ChatWriter, ChatWriterConfig
from nla_jax.data.writers.column import ColumnConfig
from nla_jax.data.writers.config import WriterConfig
from nla_jax.data.writers.open import Writer, open_writer
from nla_jax.data.writers.predictive import PredictiveWriter
from nla_jax.data.writers.word_counts import WordCounts

CONTEXTS = ["the engine burns diesel", "the garden needs water"]


def rows(explanations=None, **extra) -> ActivationDataset:
    n = len(CONTEXTS)
    return ActivationDataset(
        activations=np.zeros((n, 2), np.float32),
        explanations=explanations,
        doc_ids=[f"d{i}" for i in range(n)],
        n_raw_tokens=np.full(n, 60),
        contexts=list(CONTEXTS),
        extra=extra,
        sidecar=Sidecar("x", "base", n, Extraction("m", 2, 1, "c", CorpusSlice(0, n), 1)),
    )


def opened(config: WriterConfig, tmp_path, words=None) -> Writer:
    return open_writer(
        config, seed=7, words=words or (lambda split: WordCounts(split=split)), cache=tmp_path / "chat.sqlite"
    )


def test_each_name_opens_its_writer_and_only_one_counts_words(tmp_path):
    def no_words(split):
        raise AssertionError("the words of all contexts were counted")

    chat = WriterConfig("chat", chat=ChatWriterConfig(ChatConfig("local:somewhere")))
    assert isinstance(opened(chat, tmp_path, no_words), ChatWriter)
    assert not (tmp_path / "chat.sqlite").exists()
    assert opened(WriterConfig("column"), tmp_path, no_words).prompts(rows()) is None
    writer = opened(WriterConfig(), tmp_path, lambda split: WordCounts(CONTEXTS, split))
    assert isinstance(writer, PredictiveWriter) and isinstance(writer, Writer)
    texts = writer.explain(rows(next_words=[["and"], ["so"]], genre=["g", "g"]))
    assert writer.report() | {"rows": 2, "written": 2, "left_out": 0} == writer.report()
    assert "diesel" in texts[0] and writer.about() == {"writer": "predictive"}


def test_words_counted_in_parts_are_those_of_all_at_once():
    parts = WordCounts(CONTEXTS[:1])
    parts.add(CONTEXTS[1:])
    whole = WordCounts(CONTEXTS)
    assert (parts.texts, parts.frequency) == (whole.texts, whole.frequency) and parts.texts == 2
    assert parts.rarity("engine") == pytest.approx(np.log(3 / 2)) and parts.rarity("x") > 1


def test_texts_of_a_column(tmp_path):
    writer = opened(WriterConfig("column", column=ColumnConfig("note")), tmp_path)
    assert writer.explain(rows(note=[" It burns. ", "  "])) == ["It burns.", None]
    assert writer.explain(rows(note=[None, "a <explanation> tag"])) == [None, None]
    assert writer.report()["refused"] == {"no text in the column": 2, "an explanation tag in the text": 1}
    given = opened(WriterConfig("column"), tmp_path).explain(rows(["One.", "Two."]))
    assert given == ["One.", "Two."]
    with pytest.raises(
        ValueError, match="no column 'note' with texts; the rows have genre, memo: name the one"
    ):
        writer.explain(rows(memo=["a", "b"], genre=["g", "g"]))
    with pytest.raises(ValueError, match="column 'note' holds '3' of type int in row 1, expected a text"):
        writer.explain(rows(note=["a", 3]))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module in the working directory, with writers of a user's own."""
    (tmp_path / "my_writers.py").write_text(
        textwrap.dedent("""
            class Loud:
                def __init__(self, options, *, seed):
                    self.mark = options["mark"] * seed

                def explain(self, rows):
                    return [None if "garden" in text else f" {text}{self.mark}" for text in rows.contexts]

                def about(self):
                    return {"mark": self.mark}

            class Short:
                def __init__(self, options, *, seed):
                    self.returned = options["returned"]

                def explain(self, rows):
                    return self.returned

            class NoSeed:
                def __init__(self, options): ...
                def explain(self, rows): ...

            class Mute: ...
            """)
    )
    (tmp_path / "needs_more.py").write_text("import a_module_that_there_is_not")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_class_of_the_users_own_writes(own, tmp_path):
    writer = opened(WriterConfig("my_writers:Loud", options='{"mark": "!"}'), tmp_path)
    assert writer.explain(rows()) == ["the engine burns diesel!!!!!!!", None]
    assert writer.about() == {"writer": "my_writers:Loud", "mark": "!!!!!!!"}
    assert writer.report()["refused"] == {"no text from the class": 1} and writer.prompts(rows()) is None


@pytest.mark.parametrize(
    ("returned", "message"),
    [('["one"]', "returned 1 texts for 2 rows"), ('["one", 2]', "returned '2' of type int for row 1")],
)
def test_what_a_class_returns_is_checked_for_its_form(own, tmp_path, returned, message):
    config = WriterConfig("my_writers:Short", options=f'{{"returned": {returned}}}')
    with pytest.raises(ValueError, match=message):
        opened(config, tmp_path).explain(rows())


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere.to_be:Found", ModuleNotFoundError, "needs the module nowhere.to_be, which is neither"),
        ("needs_more:Writer", ModuleNotFoundError, "No module named 'a_module_that_there_is_not'"),
        ("my_writers:Missing", ValueError, "has no class Missing; it has Loud, Short, NoSeed, Mute"),
        ("my_writers:Mute", ValueError, r"has no method explain\(rows\)"),
        ("my_writers:NoSeed", ValueError, r"cannot be made as CLASS\(OPTIONS, seed=SEED\)"),
    ],
)
def test_classes_that_cannot_be_used(own, tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        opened(WriterConfig(name), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "typed"},
            "no writer 'typed'; writer.name is one of predictive, descriptive, chat, column, or MODULE:CLASS",
        ),
        ({"options": "{'a': 1}"}, "which is no JSON"),
        ({"options": "[1]"}, "a JSON value of type list; write an object"),
    ],
)
def test_configs_of_writers_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        WriterConfig(**fields)
