import numpy as np
import pytest

from nla_jax.evaluation import rewrites
from nla_jax.text_analysis import words

TEXT = 'It ends with "the red fox". Likely next: jumps, runs, sits. About a story of animals.'


@pytest.mark.parametrize("name", list(rewrites.RULES))
def test_quotes_are_kept_or_taken_out_whole(name):
    edit = rewrites.RULES[name]
    (kept,) = rewrites.edited([TEXT], edit, quotes=True, seed=0)
    assert '"the red fox"' in kept and kept.count('"') == 2
    if name == "unchanged":
        assert kept == TEXT
    (bare,) = rewrites.edited([TEXT], edit, quotes=False, seed=0)
    assert "fox" not in bare and '"' not in bare


def test_each_quote_stays_in_its_sentence():
    text = '"First" is one. Two is "second". Three is "third".'
    for seed in range(4):
        (found,) = rewrites.edited([text], rewrites.shuffled_sentences, quotes=True, seed=seed)
        assert all(part in found for part in ('"First" is one.', 'Two is "second".', 'Three is "third".'))
        (found,) = rewrites.edited([text], rewrites.synonyms, quotes=True, seed=seed)
        assert found.startswith('"First" is one')


def test_rules_do_what_they_say():
    rng = np.random.default_rng(0)
    plain = "One is here. Two is there. Three is gone."
    assert sorted(words(rewrites.shuffled_sentences(plain, rng))) == sorted(words(plain))
    shuffled = rewrites.shuffled_lists("Likely next: a1, b2, c3, d4. About x.", np.random.default_rng(0))
    assert shuffled != "Likely next: a1, b2, c3, d4. About x."
    assert sorted(words(shuffled)) == sorted(words("Likely next: a1, b2, c3, d4. About x."))
    changed = rewrites.synonyms("The next word is a number.", rng)
    assert not {"the", "next", "word", "number"} & set(words(changed)) and "is" in words(changed)
    assert set(words(rewrites.keywords("It is about the old castle.", rng))) == {"old", "castle"}


def test_edits_depend_on_seed_and_place_alone():
    texts = [TEXT, None, TEXT]
    first = rewrites.edited(texts, rewrites.keywords, quotes=True, seed=1)
    assert first == rewrites.edited(texts, rewrites.keywords, quotes=True, seed=1)
    assert first[1] is None and first[0] != first[2]
    assert first != rewrites.edited(texts, rewrites.keywords, quotes=True, seed=2)


def test_a_model_is_asked_in_turn_and_never_about_nothing():
    seen = []

    def write(prompts):
        seen.append(list(prompts))
        return [f"<{len(prompt)}>" for prompt in prompts]

    texts = ['A "b" c.', None, '"only a quote"']
    found = rewrites.asked(texts, ("First: {text}", "Second: {text}"), write, quotes=True)
    assert seen == [["First: A c.", "First: ", "First: "], ["Second: <11>", "Second: ", "Second: "]]
    assert found == ['<12> "b"', None, '"only a quote"']
