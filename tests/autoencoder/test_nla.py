import dataclasses

import numpy as np
import pytest
from small_nla import LAYER, WIDTH, random_activations, small_nla

from nla_jax.autoencoder import metrics
from nla_jax.autoencoder.results import Explanations
from nla_jax.autoencoder.yardstick import Yardstick

TEXT = "The array has a shape and a type."
OTHER = "Every axis has a length of its own, and the array has several of them."


@pytest.fixture(scope="module")
def nla(tiny_lm):
    return small_nla(tiny_lm)


@pytest.fixture(scope="module")
def acts(nla):
    return nla.activations(TEXT)


def cosines(left_ND, right_ND):
    return (left_ND * right_ND).sum(1) / np.linalg.norm(left_ND, axis=1) / np.linalg.norm(right_ND, axis=1)


def axes(*rows):
    """Vectors along the first axes, as (axis, length)."""
    vectors_ND = np.zeros((len(rows), WIDTH), np.float32)
    for row, (axis, length) in enumerate(rows):
        vectors_ND[row, axis] = length
    return vectors_ND


def test_scores_by_hand(nla):
    # Two orthogonal training activations: their normalized mean has half their mean square, which leaves a half.
    yardstick = Yardstick.of(axes((0, 2), (1, 5)))
    assert yardstick.spread == pytest.approx(0.5)
    nla = dataclasses.replace(nla, yardstick=yardstick)
    activations_ND = axes((0, 3), (0, 3), (0, 3), (2, 1))
    rebuilt_ND = axes((0, 9), (1, 9), (0, -1), (2, 1)) + axes((0, 0), (1, 0), (0, 0), (3, 1))
    scores = nla.score_predictions(activations_ND, rebuilt_ND, ["a"] * 4)
    cosine_N = np.array([1, 0, -1, 0.5**0.5])
    np.testing.assert_allclose(scores.cosine_N, cosine_N, atol=1e-6)
    np.testing.assert_allclose(scores.mse_nrm_N, 2 * (1 - cosine_N), atol=1e-6)
    # A row is measured against the average spread of the training activations ...
    np.testing.assert_allclose(scores.fve_nrm_N, 1 - 2 * (1 - cosine_N) / 0.5, atol=1e-5)
    # ... all rows together against their own: a half each for the first three, 1 + 1/2 for the last.
    assert scores.fve_nrm == pytest.approx(1 - 2 * (1 - cosine_N).sum() / (3 * 0.5 + 1.5), rel=1e-5)
    assert scores.measured_against == "against the mean of 2 training activations"


def test_scores_are_those_of_the_reconstructions(nla, acts):
    texts = [f"{i} texts" for i in range(len(acts))]
    scores, rebuilt_ND = nla.score(acts, texts), nla.reconstruct(texts)
    np.testing.assert_allclose(scores.cosine_N, cosines(rebuilt_ND, acts.vectors_ND), atol=1e-5)
    expected = metrics.fve_nrm(rebuilt_ND, acts.vectors_ND, nla.yardstick.normalized_mean_D)
    assert scores.fve_nrm == pytest.approx(float(expected), rel=1e-5) and scores.judges == {}
    assert f"fve_nrm {scores.fve_nrm:.3f} over {len(acts)} rows (against the mean of 50" in repr(scores)


def test_a_failed_text_counts_as_the_mean(nla):
    activations_ND = random_activations(3)
    scores = nla.score(activations_ND, ["a", None, "b"])
    mean_ND = np.broadcast_to(nla.yardstick.mean_D, (1, WIDTH))
    assert scores.cosine_N[1] == pytest.approx(cosines(mean_ND, activations_ND[1:2])[0], abs=1e-5)
    # Without a mean there is nothing to count it as, and the others do not suffer.
    unknown = dataclasses.replace(nla, yardstick=None).score(activations_ND, ["a", None, "b"])
    assert np.isnan(unknown.cosine_N).tolist() == [False, True, False]
    np.testing.assert_allclose(unknown.cosine_N[[0, 2]], scores.cosine_N[[0, 2]], rtol=1e-5)
    assert (
        unknown.fve_nrm is None and unknown.fve_nrm_N is None and "with_yardstick" in unknown.measured_against
    )


def test_many_rows_are_scored_as_few_are(tiny_lm, nla):
    activations_ND, texts = random_activations(21), [f"text {i}" for i in range(21)]
    small = small_nla(tiny_lm, batch_size=8).score(activations_ND, texts)
    whole = nla.score(activations_ND, texts)
    np.testing.assert_allclose(small.cosine_N, whole.cosine_N, atol=1e-4)
    assert small.fve_nrm == pytest.approx(whole.fve_nrm, rel=1e-3)


def test_judges_read_the_same_texts_apart(nla):
    activations_ND, asked = random_activations(2), []

    def judge(texts):
        asked.append(list(texts))
        return activations_ND[::-1]

    judged = dataclasses.replace(nla, judges={"strict": judge, "kind": lambda texts: 7 * activations_ND})
    scores = judged.score(activations_ND, ["a", "b"])
    assert asked == [["a", "b"]]
    np.testing.assert_allclose(scores.judges["kind"].cosine_N, [1, 1], atol=1e-6)
    np.testing.assert_allclose(
        scores.judges["strict"].cosine_N, cosines(activations_ND, activations_ND[::-1]), atol=1e-5
    )
    np.testing.assert_array_equal(scores.cosine_N, nla.score(activations_ND, ["a", "b"]).cosine_N)
    assert judged.score(activations_ND, ["a", "b"], judges=False).judges == {} and len(asked) == 1
    assert "\nkind: cosine 1.000, fve_nrm 1.000 over 2 rows" in repr(scores)


def test_samples_of_an_activation_are_adjacent(nla, acts):
    texts = nla.explain(acts[:3], samples=2, seed=4)
    assert len(texts) == 6 and texts.samples == 2
    assert texts.texts == tuple(nla.explain(acts.vectors_ND[:3], samples=2, seed=4))
    assert texts.texts != nla.explain(acts[:3], samples=2, seed=5).texts
    scores = nla.score(acts[:3], texts)
    expected_ND = np.repeat(acts.vectors_ND[:3], 2, axis=0)
    np.testing.assert_allclose(scores.cosine_N, cosines(nla.reconstruct(texts), expected_ND), atol=1e-5)
    rows = texts.rows(scores)
    assert [(row.row, row.sample, row.position) for row in rows] == [
        (0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1), (2, 0, 2), (2, 1, 2)
    ]  # fmt: skip
    assert rows[3].text == texts[3] and rows[3].cosine == pytest.approx(float(scores.cosine_N[3]))
    assert rows[3].fve_nrm == pytest.approx(float(scores.fve_nrm_N[3]))


def test_explanations_know_their_rows(nla, acts):
    texts = nla.explain(acts[[4, 1]])
    # So the whole text's activations will do.
    chosen = nla.score(acts, texts)
    np.testing.assert_array_equal(chosen.cosine_N, nla.score(acts[[4, 1]], list(texts)).cosine_N)
    first = texts.rows()[0]
    assert (first.position, first.token, first.positions) == (4, acts.tokens[4], len(acts))
    assert TEXT[slice(*first.span)] == acts.tokens[4] and first.label == f"4 {acts.tokens[4]!r}"
    assert first.record().keys() == {"explanation", "row", "sample", "position", "token", "span", "positions"}
    assert repr(texts).splitlines()[0].startswith(f"4 {acts.tokens[4]!r}: ")
    # Explanations of vectors have no place.
    assert [row.label for row in nla.explain(acts.vectors_ND[:2]).rows()] == ["row 0", "row 1"]


def test_explanations_of_another_text_are_refused(nla, acts):
    texts = nla.explain(acts[:2])
    with pytest.raises(
        ValueError, match="the explanations are of the text 'The array has.*these activations are of 'Every"
    ):
        nla.score(nla.activations(OTHER), texts)


def test_one_sample_is_the_likeliest_and_several_differ(nla, acts):
    assert nla.explain(acts[:2]).texts == nla.explain(acts[:2], seed=9).texts
    assert len(set(nla.explain(acts[0], samples=4))) > 1
    assert len(set(nla.explain(acts[0], samples=4, temperature=0.0))) == 1
    with pytest.raises(ValueError, match="samples is 0; at least one explanation has to be written"):
        nla.explain(acts[0], samples=0)


def test_activations_of_several_texts_in_one_call(nla, acts):
    other = nla.activations(OTHER)
    texts = nla.explain([acts[:2], other[-1]])
    assert texts.texts == (*nla.explain(acts[:2]), *nla.explain(other[-1])) and texts.activations is None
    assert nla.explain(acts.vectors_ND[0]).texts == texts.texts[:1]
    scores = nla.score([acts[:2], other[-1]], texts)
    assert scores.cosine_N[2] == pytest.approx(nla.score(other[-1], texts[2]).cosine_N[0], abs=1e-5)


def test_a_yardstick_of_ones_own_texts(nla):
    positions = dataclasses.replace(nla, yardstick=None, min_position=3)
    measured = positions.with_yardstick([TEXT, OTHER])
    rows = [nla.activations(text).vectors_ND[3:] for text in (TEXT, OTHER)]
    expected = Yardstick.of(np.concatenate(rows))
    np.testing.assert_allclose(measured.yardstick.normalized_mean_D, expected.normalized_mean_D, rtol=1e-5)
    assert measured.yardstick.description == f"mean of {expected.count} activations of 2 texts"
    assert positions.yardstick is None and measured.score(rows[0], ["a"] * len(rows[0])).fve_nrm is not None
    with pytest.raises(ValueError, match="2 texts give 0 activations from position 3 on, too few for a mean"):
        positions.with_yardstick(["a", "b"])


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros((2, 31)), r"have the shape \(2, 31\); this NLA reads vectors of width 32, as \(N, 32\)"),
        (np.zeros((1, 2, 32)), r"have the shape \(1, 2, 32\)"),
        (np.zeros((0, 32)), "there are no activations to explain; choose at least one row"),
        ([], "there are no activations to explain"),
        (np.array([[0.0, np.nan, np.inf]] * 32).T, r"2 of 3 activations hold NaN or infinity \(rows \[1, 2\]\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_explained(nla, vectors, message):
    for use in (nla.explain, lambda vectors: nla.score(vectors, ["a"])):
        with pytest.raises(ValueError, match=message):
            use(vectors)


def test_activations_of_another_layer(nla, acts):
    other = dataclasses.replace(acts, layer=0)
    for wrong in (other, [acts, other]):
        with pytest.raises(
            ValueError, match=f"the activations are of layer 0, this NLA explains layer {LAYER}; read them"
        ):
            nla.explain(wrong)


def test_numbers_of_texts_that_do_not_fit(nla, acts):
    for texts in (["a"] * 3, []):
        with pytest.raises(ValueError, match=f"{len(texts)} texts for 2 activations; give one text a row"):
            nla.score(acts[:2], texts)
    with pytest.raises(ValueError, match="there are no texts to reconstruct from"):
        nla.reconstruct([])
    np.testing.assert_array_equal(nla.reconstruct("a"), nla.reconstruct(["a"]))


def test_an_av_alone(nla, acts):
    alone = dataclasses.replace(nla, ar_params=None, layer=None)
    assert alone.explain(acts[0]).texts == nla.explain(acts[0]).texts
    with pytest.raises(ValueError, match="small holds an AV alone, which can explain and not reconstruct"):
        alone.score(acts[0], "a")
    with pytest.raises(ValueError, match="small does not say which layer it explains; load it with its AR"):
        alone.activations(TEXT)


def test_in_words(nla):
    held = f"NLA small: layer {LAYER}, d 32; AV 0.00 GiB, AR 0.00 GiB"
    assert repr(dataclasses.replace(nla)) == f"<{held}; FVE against the mean of 50 training activations>"
    judged = dataclasses.replace(nla, yardstick=None, judges={"strict": nla.reconstruct})
    assert judged.description.endswith("; no training mean, judges: strict")


def test_explanations_are_a_sequence():
    texts = Explanations(("a", None, "c"))
    assert (
        list(texts) == ["a", None, "c"] and texts[1:] == (None, "c") and texts[-1] == "c" and len(texts) == 3
    )
    assert repr(texts) == "row 0: a\nrow 1: (no closed explanation)\nrow 2: c"
