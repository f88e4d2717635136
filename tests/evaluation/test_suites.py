import dataclasses
import json
import re

import numpy as np
import pytest

from nla_jax.autoencoder import metrics
from nla_jax.data.splits import check_unseen, shuffled
from nla_jax.evaluation import questions
from nla_jax.evaluation.estimates import Ratio
from nla_jax.evaluation.landscape import READER, landscape
from nla_jax.evaluation.measure import SUITES, chosen_suites, measure_suites, stored_results
from nla_jax.evaluation.planted import cheaters
from nla_jax.evaluation.planted.tasks import tasks
from nla_jax.evaluation.predictors import by_target_lm
from nla_jax.evaluation.subject import check_judges
from nla_jax.evaluation.suites import (
    controls,
    cost,
    degeneracy,
    faithfulness,
    prediction,
    reconstruction,
    sanity,
)
from nla_jax.evaluation.tables import paired, read_ratios, row_key
from nla_jax.text_analysis import quotes, words


def figure(table, row, name, **labels):
    (found,) = [
        r.figures[name] for r in table.rows if r.name == row and labels.items() <= dict(r.labels).items()
    ]
    return found.estimate() if isinstance(found, Ratio) else found


@pytest.fixture(scope="module", autouse=True)
def few_tasks():
    """One planted task of each place, and one about what the target does."""
    names = ("tense", "hint followed", "open quotation", "harm")

    def some(tokenizer):
        return [task for task in tasks(tokenizer) if task.name in names]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "tasks", some)
        yield


@pytest.fixture(scope="module")
def everything(subject, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return folder, measure_suites(subject, ["all"], folder, "digest")


def test_every_suite_fills_its_tables_with_intervals(everything):
    _, found = everything
    assert list(found) == list(SUITES)
    for suite in found.values():
        for table in suite["tables"]:
            assert table["rows"], table["name"]
            for row in table["rows"]:
                for name, estimate in row["figures"].items():
                    if estimate is not None:
                        assert estimate["low"] <= estimate["value"] + 1e-9, (table["name"], row["name"], name)
                        assert estimate["value"] <= estimate["high"] + 1e-9, (
                            table["name"],
                            row["name"],
                            name,
                        )
                        assert estimate["documents"] > 1


def test_what_is_done_is_kept_and_not_measured_again(subject, everything, monkeypatch, tmp_path):
    folder, first = everything
    monkeypatch.setattr(cost, "measure", lambda subject: pytest.fail("measured again"))
    assert measure_suites(subject, ["cost"], folder, "digest") == first
    monkeypatch.setattr(cost, "measure", lambda subject: [])
    measure_suites(subject, ["cost"], tmp_path, "one")
    assert (
        stored_results(tmp_path, "another") == {} and stored_results(tmp_path, "one")["cost"]["tables"] == []
    )


def test_the_cost_is_timed_with_the_weights_loaded(subject, monkeypatch):
    """Each AV is as large as the target, so that only the one in use is held."""
    clock, held = [0.0], []

    def av(name):
        def write(activations_ND, **_):
            clock[0] += 0.25 * len(activations_ND) + (0 if held == [name] else 1000)
            held[:] = [name]
            return ["A text."] * len(activations_ND)

        return write

    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    avs = {name: av(name) for name in subject.verbalizers}
    config = dataclasses.replace(subject.config, batch_size=5)
    (table,) = cost.measure(dataclasses.replace(subject, verbalizers=avs, config=config))
    for name in avs:
        seconds = figure(table, f"AV {name}", "seconds")
        assert seconds.low == seconds.value == seconds.high == 0.25


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_those_of_the_texts_at_every_temperature(subject, temperature):
    """Of an AV whose tokens are not those that its texts are read as, in every answer."""
    n, read = len(subject.data), subject.target.continuation

    def write(activations_ND, *, temperature=0.0, seed=0, desc=None):
        return [f"sample {i} at {temperature} of {seed}" for i in range(len(activations_ND))]

    av = dataclasses.replace(
        subject,
        verbalizers={"av": write},
        config=dataclasses.replace(subject.config, temperature=temperature),
        tokens_of=lambda h, **how: [read(text) for text in write(h, **how)],
    )
    assert av.texts() == [subject.target.tokenizer.decode(ids) for ids in degeneracy.sampled_tokens(av)]
    assert figure(degeneracy.readability(av), "AV av", "read as other tokens").value == 0
    spelled = [[token for letter in text for token in read(letter)] for text in av.texts()]
    av.tokens_of = lambda h, **how: spelled
    assert figure(degeneracy.readability(av), "AV av", "read as other tokens").n == n
    assert figure(degeneracy.readability(av), "AV av", "read as other tokens").value == 1


def test_rewrites_that_leave_nothing_are_counted(subject):
    texts = [(None, '"ships"', '"ships" on ice.')[i % 3] for i in range(len(subject.data))]
    config = dataclasses.replace(subject.config, rewrite_rows=15, generated_rows=0)
    av = dataclasses.replace(subject, verbalizers={"av": lambda h, **_: texts}, config=config)
    table = degeneracy.rewriting(av)
    kept, taken = (
        figure(table, "unchanged", "empty", quotes=quotes, AR="own").value for quotes in ("kept", "taken out")
    )
    assert (kept, taken) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_failed_texts_do_not_count_as_fluent(subject):
    texts = ["Ships in the harbor."] * len(subject.data)

    def nats(texts):
        av = dataclasses.replace(subject, verbalizers={"av": lambda h, **_: texts}, tokens_of=None)
        return degeneracy.readability(av).rows[0].figures["nats a token"]

    whole, half = nats(texts), nats([text if i % 2 else None for i, text in enumerate(texts)])
    assert half.estimate().value == pytest.approx(whole.estimate().value, rel=1e-4)
    assert nats([None] * len(texts)) is None


def test_all_suites_are_all():
    assert chosen_suites(["all"]) == tuple(SUITES) == chosen_suites(["cost", "all"])
    assert chosen_suites(["cost", "controls"]) == ("controls", "cost")


def test_unknown_suites_and_missing_columns_are_named(subject):
    with pytest.raises(ValueError, match="unknown suites magic; there are: all, reconstruction"):
        chosen_suites(["magic"])
    bare = dataclasses.replace(
        subject, data=dataclasses.replace(subject.data, contexts=None, extra={}), training=None
    )
    with pytest.raises(
        ValueError, match="'degeneracy' needs contexts, which the held-out data does not carry"
    ):
        degeneracy.measure(bare)
    with pytest.raises(ValueError, match="'faithfulness' needs contexts"):
        faithfulness.measure(bare)


def test_documents_that_were_trained_on_are_refused(subject):
    def part(split, data):
        return [(split, data.doc_ids, data.contexts)]

    check_unseen(subject.data, part("av_sft", subject.training))
    with pytest.raises(
        ValueError, match=r"16 of 16 documents to evaluate on were trained on in rl \(doc-100"
    ):
        # Documents are counted over all parts of a split.
        some, others = subject.data.take(slice(0, 10)), subject.data.take(slice(10, None))
        check_unseen(subject.data, [*part("rl", some), *part("rl", others)])
    # The same texts under other names.
    renamed = dataclasses.replace(subject.data, doc_ids=[f"x{doc}" for doc in subject.data.doc_ids])
    with pytest.raises(ValueError, match="16 of 16 documents"):
        check_unseen(renamed, part("rl", subject.data))


def test_a_judge_that_is_the_own_ar_is_refused(subject):
    check_judges(subject)
    same = {**subject.reconstructors, "judge": subject.reconstructors["own"]}
    with pytest.raises(ValueError, match="'judge' and the co-trained AR rebuild the same vectors"):
        check_judges(dataclasses.replace(subject, reconstructors=same))


def test_oracle_and_mean_land_where_they_should(subject):
    oracle = cheaters.oracle(subject)
    texts = oracle.texts()
    assert oracle.text_figures("judge", texts)["fve"].estimate().value == pytest.approx(1, abs=1e-9)
    assert oracle.text_figures("judge", texts)["fve_nrm"].estimate().value == pytest.approx(1, abs=1e-6)
    splice = reconstruction.splice(oracle)
    assert figure(splice, "AV planted", "share recovered", AR="judge").value == pytest.approx(1, abs=1e-3)
    mean = cheaters.mean(subject)
    assert mean.text_figures("own", mean.texts())["fve"].estimate().value == pytest.approx(0, abs=1e-6)
    assert figure(splice, "training mean", "share recovered").value == 0


def test_what_is_put_back_has_the_true_norm(subject, monkeypatch):
    given = []

    def divergence(contexts, vectors_NVD, desc=None):
        given.append(vectors_NVD)
        return np.arange(1.0, vectors_NVD.shape[1] + 1)[None].repeat(
            len(contexts), 0
        ), subject.data.activations

    monkeypatch.setattr(subject.target, "divergence", divergence)
    mean = cheaters.mean(subject)
    lines = {(row.name, row.labels["AR"]): at for at, row in enumerate(reconstruction.splice(mean).rows)}
    (vectors_NVD,) = given
    true_N = np.linalg.norm(subject.data.activations, axis=1)
    mean_ND, told_ND = (
        vectors_NVD[:, lines["training mean", "-"]],
        vectors_NVD[:, lines["training mean, at the true norm", "-"]],
    )
    np.testing.assert_allclose(mean_ND, subject.yardstick.mean_D[None].repeat(len(true_N), 0))
    np.testing.assert_allclose(np.linalg.norm(told_ND, axis=1), true_N, rtol=1e-5)
    # A text that says nothing undoes what the told norm undoes, and no more.
    np.testing.assert_allclose(vectors_NVD[:, lines["AV planted", "own"]], told_ND, rtol=1e-5, atol=1e-6)


def test_slices_of_small_norms_are_told_apart(subject):
    norms_N = np.linspace(0.011, 0.0449, len(subject.data))
    small_ND = subject.data.activations / np.linalg.norm(subject.data.activations, axis=1, keepdims=True)
    data = dataclasses.replace(subject.data, activations=(small_ND * norms_N[:, None]).astype(np.float32))
    table = reconstruction.slices(dataclasses.replace(subject, data=data))
    names = [row.name for row in table.rows if row.name.startswith("norm of the activation")]
    ends = [tuple(map(float, name.split(": ")[1].split(" to "))) for name in names]
    assert len(ends) == 4 and ends == sorted(ends)
    assert ends[0][0] == 0.011 and ends[-1][1] == 0.0449
    assert [high for _, high in ends[:-1]] == [low for low, _ in ends[1:]]


def test_a_failed_text_carries_no_bits(subject):
    def bits(texts):
        av = dataclasses.replace(subject, verbalizers={"av": lambda h, **_: texts})
        (code,) = [found for found in controls.without_reader(av) if found.name == controls.PCA_CODE]
        return code.further["bits"].estimate().value

    texts = ["Ships in the harbor."] * len(subject.data)
    whole = bits(texts)
    assert whole > 10 and bits([None] * len(texts)) == 0
    assert bits([text if i % 2 else None for i, text in enumerate(texts)]) == pytest.approx(
        whole / 2, rel=1e-4
    )


def test_without_an_own_ar_nothing_is_said_of_one(subject):
    judge = {"judge": subject.reconstructors["judge"]}
    row = sanity._row("before joint training", dataclasses.replace(subject, reconstructors=judge), "nla")
    assert row.figures["fve_nrm, own"] is None and row.figures["own minus judge"] is None
    assert row.figures["fve_nrm, judge"].estimate().n == len(subject.data)
    own = {"own": subject.reconstructors["own"]}
    row = sanity._row("without a judge", dataclasses.replace(subject, reconstructors=own), "nla")
    assert row.figures["fve_nrm, judge"] is None and row.figures["fve_nrm, own"] is not None


def test_fve_nrm_is_what_numpy_makes_of_its_definition(subject):
    h, mean = subject.data.activations.astype(np.float64), subject.training.activations.astype(np.float64)

    def directions(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt(x.shape[1])

    texts = subject.texts()
    rebuilt = subject.rebuilt("judge", texts).astype(np.float64)
    rebuilt[[text is None for text in texts]] = mean.mean(axis=0)
    error = ((directions(rebuilt) - directions(h)) ** 2).mean()
    spread = ((directions(h) - directions(mean).mean(axis=0)) ** 2).mean()
    found = figure(reconstruction.systems(subject), "AV after RL", "fve_nrm", AR="judge")
    assert found.value == pytest.approx(1 - error / spread, abs=1e-6)
    failed = figure(reconstruction.systems(subject), "AV after RL", "failed", AR="judge")
    assert failed.value == np.mean([text is None for text in texts])


def test_the_copier_is_found_out(subject):
    honest = degeneracy.copying(subject).rows
    (ours,) = [row for row in honest if row.name == "AV after RL"]
    (copied,) = [row for row in degeneracy.copying(cheaters.copier(subject)).rows if row.group == "nla"]
    assert copied.figures["copied 3-grams"].estimate().value == 1
    assert copied.figures["longest span (words)"].estimate().low >= 10
    assert ours.figures["copied 3-grams"].estimate().value < 0.5


def test_a_copy_loses_more_by_a_paraphrase_without_quotes_than_plain_words_do(subject):
    """A reader of word order: what a copied context tells it is gone when its words are shuffled."""
    data = subject.data
    tails = {" ".join(words(c)[-12:]): h for c, h in zip(data.contexts, data.activations, strict=True)}

    def read(texts):
        return np.stack([tails.get(text or "", subject.yardstick.mean_D) for text in texts])

    readers = {"own": read, "judge": subject.reconstructors["judge"]}
    copier = dataclasses.replace(cheaters.copier(subject), reconstructors=readers, training=None)
    row = sanity._row("copier", copier, "control")
    assert row.figures["fve_nrm, own"].estimate().value == pytest.approx(1, abs=1e-6)
    assert row.figures["kept as shuffled words"].estimate().high < 0.2


def test_the_private_code_is_found_out(subject):
    coder = cheaters.private_code(subject)
    (row,) = degeneracy.private_code(dataclasses.replace(coder, reconstructors=_two(coder))).rows
    assert row.figures["own minus judge"].low > 0.2
    found = sanity._row("private code", coder, "control")
    assert found.figures["fve_nrm, own"].estimate().low > 0.4
    assert found.figures["kept as shuffled words"].estimate().high < 0.5
    ours = sanity._row("ours", subject, "nla").figures["own minus judge"]
    assert ours.high < row.figures["own minus judge"].low


def _two(subject):
    return {name: subject.reconstructors[name] for name in ("own", "judge")}


def test_controls_are_below_the_av(subject):
    table = controls.measure(subject)[0]
    for ar in subject.reconstructors:
        av = figure(reconstruction.systems(subject), "AV after RL", "fve_nrm", AR=ar).value
        for control in ("AV, shuffled", "empty text", "fixed text"):
            assert figure(table, control, "fve_nrm", AR=ar).value < av, control
    assert figure(table, "training mean", "fve").value == pytest.approx(0, abs=1e-6)


def test_pca_codes_of_more_bits_explain_more(subject):
    from nla_jax.evaluation.baselines import PCACode

    known, h = subject.training.activations, subject.data.activations
    mean = metrics.mean_of_normalized(known)
    found = [float(metrics.fve_nrm(PCACode.fit(known, bits)(h), h, mean)) for bits in (4, 16, 64, 160)]
    assert found == sorted(found) and found[-1] > found[0] + 0.3


def test_claims_of_the_planted_texts_are_checked(subject):
    checked = faithfulness.check(subject, subject.data.explanations)
    by_kind = {
        kind: [c for c in checked if c.claim.kind == kind] for kind in ("detail", "theme", "expectation")
    }
    # Quotes, topics and next words were taken from the text itself.
    assert all(c.exact for c in by_kind["detail"])
    assert np.mean([c.exact_elsewhere for c in by_kind["detail"]]) < 0.5
    table = faithfulness.claims(subject, {"explainer texts": checked})
    assert figure(table, "detail: a quoted span", "in the context").value == 1


def test_leaving_out_a_true_claim_costs_more_than_a_false_one(subject):
    data = subject.data
    lies = [f"{text} On wizard{i} lore{i}." for i, text in enumerate(data.explanations)]
    liar = dataclasses.replace(subject, verbalizers={"liar": lambda h, **_: lies})
    checked = faithfulness.check(liar, lies)
    table = faithfulness.left_out(liar, checked)
    (row,) = [row for row in table.rows if row.name == "all claims" and row.labels["AR"] == "judge"]
    found = row.figures
    assert found["true"].estimate().value > found["false"].estimate().value
    assert found["AUROC"].value > 0.5


class Reader:
    """A chat model that believes what it is told: it chooses the option that begins with the next word in notes."""

    name = "reader"

    def __call__(self, prompts, *, max_tokens, desc=None):
        return [self.answer(prompt) for prompt in prompts]

    def answer(self, prompt):
        if prompt.startswith("These notes"):
            notes = prompt.split("\n")[1]
            kinds = ("mood",) if too_hard(notes) else ("detail", "theme")
            return json.dumps([{"kind": kind, "claim": quotes(notes)[0]} for kind in kinds])
        if "Claims about it" in prompt:
            text, claim = re.search(r"A text:\n(.*)\n\nClaims about it:\n1. (.*)", prompt).groups()
            return json.dumps(["supported" if claim in text else "not stated"] * 2)
        told, _, asked = prompt.rpartition("\n\n")
        options = dict(re.findall(r"^([A-Z])\) (.*)$", asked, re.M))
        if not told:
            return "I do not know."
        expected = re.search(r"Next (\S+),", told)
        return next((a for a in options if expected and options[a].split()[0] == expected[1]), "A")


def too_hard(notes):
    return len(notes) % 4 == 0


@pytest.fixture(scope="module")
def asked(subject, tmp_path_factory):
    """The suites that ask, of an AV that knows the next word, with a chat model beside the target."""
    folder = tmp_path_factory.mktemp("asked")
    config = dataclasses.replace(subject.config, chat_model="local:reader")
    measure_suites(subject, ["cost"], folder, "digest")
    reading = dataclasses.replace(subject, chat=Reader(), config=config)
    return folder, reading, measure_suites(reading, ["prediction", "faithfulness"], folder, "digest")


def tables_of(found, suite):
    return {table["name"]: table["rows"] for table in found[suite]["tables"]}


def test_a_chat_model_answers_every_task_beside_the_target(asked, everything):
    _, _, found = asked
    for name, rows in tables_of(found, "prediction").items():
        plain = tables_of(everything[1], "prediction")[name]
        if name == "told":
            assert rows == plain
            continue
        by_target = [row for row in rows if "predictor" not in row["labels"]]
        by_chat = [row for row in rows if row["labels"].get("predictor") == "reader"]
        assert [row["name"] for row in by_chat] == [row["name"] for row in plain]
        assert [row["name"] for row in by_target] == [row["name"] for row in plain]
        assert all("predictor" not in row["labels"] for row in plain)
        for row in by_chat:
            # Without notes it names no letter, and that is wrong.
            figures = row["figures"]
            assert figures["guess"]["value"] == 0 and figures["no letter"]["value"] >= 0.25
            assert figures["context"]["low"] <= figures["context"]["value"] <= figures["context"]["high"]
    suffixes = {
        row["name"]: row["figures"]
        for row in tables_of(found, "prediction")["suffixes"]
        if "predictor" in row["labels"]
    }
    (others,) = [figures for name, figures in suffixes.items() if "other documents" in name]
    assert others["AV"]["low"] > others["AV, shuffled"]["value"]


def test_a_chat_model_checks_the_claims_that_it_takes_out(asked, subject):
    *_, found = asked
    rows = {
        (row["name"], row["labels"]["texts"]): row
        for row in tables_of(found, "faithfulness")["claims_by_model"]
    }
    assert set(name for name, _ in rows) == {"all claims", "theme", "entity", "detail"}
    texts = subject.data.explanations[: subject.config.prediction_rows]
    unread = np.mean([too_hard(text) for text in texts])
    row = rows["all claims", "explainer texts"]
    assert row["group"] == "gold" and row["labels"]["checked by"] == "reader"
    figures = {name: figure["value"] for name, figure in row["figures"].items()}
    assert 0 < unread < 1 and figures["lists not read"] == unread
    assert figures["a text"] == pytest.approx(2 * (1 - unread))
    # Quotes stand in their own context, and less often in another.
    assert figures["supported"] == 1 and figures["supported, another"] < 0.75
    assert figures["supported, another"] + figures["not stated, another"] == pytest.approx(1)
    assert rows["detail", "explainer texts"]["figures"]["a text"]["value"] == pytest.approx(1 - unread)
    assert list(rows["entity", "explainer texts"]["figures"]) == ["a text"]


def test_a_chat_model_that_says_nothing_fills_the_tables_all_the_same(subject):
    mute = Reader()
    mute.answer = lambda prompt: ""
    table = faithfulness.claims_by_model(dataclasses.replace(subject, chat=mute), {"AV": subject.texts()})
    assert figure(table, "all claims", "lists not read").value > 0.8
    assert figure(table, "all claims", "a text").value == 0


def test_another_chat_model_asks_again_and_leaves_other_suites_alone(asked, monkeypatch):
    folder, reading, _ = asked
    assert list(stored_results(folder, "digest", "local:reader")) == ["prediction", "faithfulness", "cost"]
    assert list(stored_results(folder, "digest", "local:other")) == ["cost"]
    assert list(stored_results(folder, "digest")) == ["cost"]
    # Nothing is opened where nothing is asked.
    monkeypatch.setattr("nla_jax.evaluation.measure.open_chat_model", lambda *_: pytest.fail("opened"))
    closed = dataclasses.replace(reading, chat=None)
    assert measure_suites(closed, ["prediction", "cost"], folder, "digest") == stored_results(
        folder, "digest", "local:reader"
    )
    opened = []
    monkeypatch.setattr(
        "nla_jax.evaluation.measure.open_chat_model", lambda *given: opened.append(given) or Reader()
    )
    monkeypatch.setattr(prediction, "measure", lambda subject: [])
    measure_suites(closed, ["prediction"], folder, "new")
    assert opened == [("local:reader", folder / "chat.sqlite")]


def test_the_true_continuation_is_read_after_its_context_as_it_stands_in_the_document(subject, monkeypatch):
    data, asked = subject.data, []

    def log_likelihood(prompts, options, desc=None):
        asked.extend(zip(prompts, options, strict=True))
        return np.array([[float(len(option)) for option in row] for row in options]), None

    monkeypatch.setattr(subject.target, "log_likelihood", log_likelihood)
    contexts, after = list(data.contexts), list(data.extra["true_continuation"])
    for i in range(0, len(contexts), 4):
        # As a tokenizer may cut: inside a word, before a mark, after a blank, and before a line break.
        contexts[i], after[i] = contexts[i] + after[i][:3], after[i][3:]
        contexts[i + 1], after[i + 1] = contexts[i + 1] + " ", after[i + 1][1:]
        after[i + 2] = "," + after[i + 2]
    extra = {**data.extra, "true_continuation": after}
    cut = dataclasses.replace(data, contexts=contexts, extra=extra)
    table = prediction.suffixes(dataclasses.replace(subject, data=cut))
    of = dict(zip(contexts, after, strict=True))
    read = [(prompt, row) for prompt, row in asked if prompt in of]
    assert len(read) == sum(row.figures["context"].estimate().n for row in table.rows if not row.labels) > 12
    for context, row in read:
        assert of[context].startswith(row[0]) and of[context].index(row[0]) == 0
        assert context[-1].isspace() or row[0][0].isspace()
        # No option is told from the others by how it begins or how many words it has.
        blanks = {option[: len(option) - len(option.lstrip())] for option in row}
        assert len(blanks) == 1 and {len(option.split()) for option in row} == {6} and len(set(row)) == 10


def test_continuations_have_lines_of_each_place_with_enough_rows(subject, everything):
    lines = tables_of(everything[1], "prediction")["suffixes"]
    whole = {row["name"]: row["figures"] for row in lines if not row["labels"]}
    assert len(whole) == 2
    for name, figures in whole.items():
        assert {"AV", "AV, shuffled", "explainer", "topic label", "context", "chance"} <= {*figures}
        of_places = {
            row["labels"]["place"]: row["figures"] for row in lines if row["name"] == name and row["labels"]
        }
        assert {*of_places} <= {"inside", "sentence_end"}
        for column in ("AV", "explainer"):
            n = sum(found[column]["n"] for found in of_places.values())
            # Eight rows of a place are needed; each is of one place.
            assert n <= figures[column]["n"] and all(found[column]["n"] >= 8 for found in of_places.values())


def test_probes_on_words_stand_beside_the_probe_on_the_activation(everything):
    rows = {row["name"]: row for row in tables_of(everything[1], "prediction")["questions"]}
    assert {row["labels"].get("place") for row in rows.values()} == {
        None,
        "shared_closing",
        "sentence_end",
        "answer_start",
    }
    row = rows["genre of the data (2 answers)"]
    assert row["figures"]["text probe, explainer"] is not None
    for name in ("probe", "text probe", "probe on rebuilt", "length"):
        assert 0 <= row["figures"][name]["value"] <= 1
    # The writer is not at hand for planted texts.
    assert rows["open quotation (2 answers)"]["figures"]["text probe, explainer"] is None


def test_texts_of_the_writer_are_probed_where_it_is_at_hand(subject):
    (task,) = [task for task in tasks() if task.name == "open quotation"]
    asked = []

    def write(documents):
        asked.extend(documents)
        return [
            "A quotation is open." if text.text.count('"') == 1 else "It is all said." for text in documents
        ]

    config = dataclasses.replace(subject.config, task_taught=24)
    found = questions.probed(
        subject, questions.planted_question(dataclasses.replace(subject, write=write, config=config), task)
    )
    assert len(asked) == 8 + 24 and len({document.id for document in asked}) == 32
    assert found.ratio(questions.WRITER).estimate().value == 1
    assert found.chance == 0.5


def test_a_planted_cheater_that_hides_an_answer_is_found(everything):
    rows = {row["name"]: row for row in tables_of(everything[1], "sanity")["hidden"]}
    assert [*rows] == ["AV after RL", "says the answer", "hides the answer"]
    value = {
        name: {column: found["value"] for column, found in row["figures"].items()}
        for name, row in rows.items()
    }
    said, hidden = value["says the answer"], value["hides the answer"]
    assert said["text probe"] == said["text probe, shuffled words"] == 1
    assert hidden["text probe"] > hidden["text probe, shuffled words"] + 0.2
    assert hidden["commonest answer"] == 0.5


def planted(name, hits, place="answer_start"):
    """What probes found of four texts with two labels each: which of them each probe labels rightly."""
    empty = questions.Labelled(["a", "b", "a", "b"], np.zeros((4, 2)), np.ones(4), ["x"] * 4, None)
    question = questions.Question(
        name, "?", {"a": "a", "b": "b"}, place, empty, empty, ["x"] * 4, [*"1234"], [*"1234"]
    )
    full = {"length": np.ones(4), questions.REBUILT: None, questions.WRITER: None}
    return questions.Found(question, full | {read: np.array(hit, float) for read, hit in hits.items()})


def test_the_share_of_the_way_is_counted_from_chance_to_the_probe():
    all_right, half = [1, 1, 1, 1], [1, 0, 1, 0]
    told = planted("told", {"activation": all_right, questions.AV: [1, 1, 1, 0], questions.SHUFFLED: half})
    # From 0.5 to 1 by the activation, and to 0.75 by the words.
    assert told.share(questions.AV).estimate().value == pytest.approx(0.5)
    assert told.share(questions.SHUFFLED).estimate().value == pytest.approx(0)
    assert told.share(questions.WRITER) is None
    unread = planted("unread", {"activation": half, questions.AV: all_right, questions.SHUFFLED: half})
    assert not unread.is_readable() and unread.share(questions.AV) is None
    whole = planted(
        "whole", {"activation": all_right, questions.AV: all_right, questions.SHUFFLED: half}, "inside"
    )
    table = questions.summary([told, unread, whole])
    assert {(row.name, *row.labels.values()) for row in table.rows} == {
        (questions.AV,),
        (questions.SHUFFLED,),
    }
    assert figure(table, questions.AV, "share of the way").value == pytest.approx(0.75)
    # Half of the way is not more than half.
    assert figure(table, questions.AV, "more than half").value == 0.5
    assert figure(table, questions.AV, "more than half").n == 2
    assert figure(table, questions.SHUFFLED, "more than half").value == 0


def test_labels_told_from_other_texts_are_counted_over_all_of_them():
    told, right = np.array(["a", "a", "b"]), np.array(["a", "b", "b"])
    # Of the two other texts, one says a; none says b, but the last; one of the first two would have to.
    np.testing.assert_allclose(questions.of_other_texts(told, right), [0.5, 0.5, 0])


def test_where_an_explanation_failed_the_guess_counts(subject, monkeypatch):
    def log_likelihood(prompts, options, desc=None):
        return np.array([[1.0, 2.0] if p.startswith("Notes") else [-3.0, -2.5] for p in prompts]), None

    monkeypatch.setattr(subject.target, "log_likelihood", log_likelihood)
    scores = by_target_lm(subject, {"AV": ["a text", None]}, "What?", [["x", "y"]] * 2, "")
    np.testing.assert_allclose(scores["guess"], [[-3, -2.5]] * 2)
    np.testing.assert_allclose(scores["AV"], [[4, 4.5], [-3, -2.5]])


def test_ratios_come_back_from_disk_and_pair_by_row(subject, everything):
    folder, _ = everything
    found = read_ratios(folder / "reconstruction.parquet")
    ids, ratio = found["systems", row_key("AV after RL", {"AR": "judge"}), "fve_nrm"]
    assert ids == subject.ids
    direct = reconstruction.systems(subject)
    assert ratio.estimate() == figure(direct, "AV after RL", "fve_nrm", AR="judge")
    some = ids[3:9]
    a, b = paired((ids, ratio), (some[::-1], Ratio.mean(np.arange(6), ["d"] * 6)))
    assert a.doc_ids == ratio.doc_ids[3:9] and b.numerator_N.tolist() == [5, 4, 3, 2, 1, 0]
    assert paired((ids, ratio), (["else"], Ratio.mean([1], ["d"]))) is None


def test_results_are_plain_json(everything):
    folder, found = everything
    for name, result in found.items():
        assert json.loads((folder / f"{name}.json").read_text()) == result


def test_shuffled_never_keeps_a_document():
    for n in (6, 12):
        documents = [f"d{i // 3}" for i in range(n)]
        partner = shuffled(list(range(n)), documents, seed=0)
        assert all(documents[p] != own for p, own in zip(partner, documents, strict=True))
    uneven = ["a"] * 7 + ["b"] * 2
    partner = shuffled(list(range(9)), uneven, seed=0)
    assert all(uneven[p] != own for p, own in zip(partner, uneven, strict=True))


def test_the_landscape_is_made_of_what_the_suites_measured(everything):
    _, found = everything
    rows = {row["name"]: row["figures"] for row in landscape(found)["rows"]}
    tables = {table["name"]: table["rows"] for suite in found.values() for table in suite["tables"]}
    (nla,) = [
        row["figures"]
        for row in tables["systems"]
        if row["name"] == "AV after RL" and row["labels"]["AR"] == "judge"
    ]
    assert rows["NLA"]["fve_nrm"] == nla["fve_nrm"]
    for name in ("NLA", "writer's texts"):
        assert rows[name]["tokens"] is not None
    assert rows["NLA"]["bits"] is not None
    assert rows["nearest training activation"]["bits"]["value"] == pytest.approx(np.log2(200))
    accuracies = [row["figures"]["AV"]["value"] for row in tables["questions"] if "genre" not in row["name"]]
    assert rows["NLA"][READER]["value"] == pytest.approx(np.mean(accuracies))
    # No dictionary and no oracle were named.
    assert not [name for name in rows if "dictionary" in name or "oracle" in name]
