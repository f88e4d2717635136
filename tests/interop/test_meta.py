import dataclasses

import pytest
import yaml

from nla_jax.autoencoder.prompts import PromptTemplates
from nla_jax.autoencoder.verbalizer import InjectionConfig
from nla_jax.data.sidecar import PromptIds, SidecarTemplates
from nla_jax.interop.meta import NLAMeta, OwnSettings

TOKENS = PromptIds("㈎", 149705, 29, 522, (1318, 29, 366, 1708, 29))
RELEASE = """\
kind: nla_model
schema_version: 2
role: ar
stage: rl
d_model: 16
extraction_layer_index: 20
extraction: {injection_scale: null, mse_scale: 4.0}
tokens:
  injection_char: ㈎
  injection_token_id: 149705
  injection_left_neighbor_id: 29
  injection_right_neighbor_id: 522
  critic_suffix_ids: [1318, 29, 366, 1708, 29]
prompt_templates:
  av: "Say what <concept>{injection_char}</concept> is in {{braces}}."
  ar: "Summary: <text>{explanation}</text> <summary>"
ar: {extraction_layer_index: 20}
created_by: someone
"""
AR = NLAMeta(
    "ar",
    16,
    TOKENS,
    SidecarTemplates(
        "Say what <concept>{injection_char}</concept> is in {braces}.",
        "Summary: <text>{explanation}</text> <summary>",
    ),
    mse_scale=4.0,
    layer=20,
)
AV = dataclasses.replace(AR, role="av", injection_scale=150.0)
OWN = OwnSettings("", "<|im_end|>", False, layer=8, mode="add", affine=True, scale=3.5)


def written(tmp_path, text):
    (tmp_path / "nla_meta.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def test_release_and_training_spellings_mean_the_same(tmp_path):
    assert NLAMeta.load(written(tmp_path, RELEASE), role="ar") == AR
    training = RELEASE.replace("role: ar", "role: critic")
    for old, new in (("  av:", "  actor:"), ("  ar:", "  critic:"), ("\nar:", "\ncritic:")):
        training = training.replace(old, new)
    assert "critic: {extraction_layer_index" in training
    assert NLAMeta.load(written(tmp_path, training), role="ar") == AR
    actor = RELEASE.replace("role: ar", "role: actor").replace(
        "injection_scale: null", "injection_scale: 150"
    )
    assert NLAMeta.load(written(tmp_path, actor), role="av") == AV


@pytest.mark.parametrize("meta", [AV, AR, dataclasses.replace(AV, injection_scale=None, own=OWN)], ids=str)
def test_round_trip(meta, tmp_path):
    meta.save(tmp_path)
    assert NLAMeta.load(tmp_path) == meta
    fields = yaml.safe_load((tmp_path / "nla_meta.yaml").read_text(encoding="utf-8"))
    # An absent scale would be taken for a default one, and templates are filled by str.format.
    assert fields["extraction"] == {"injection_scale": meta.injection_scale, "mse_scale": 4.0}
    filled = fields["prompt_templates"]["av"].format(injection_char="X")
    assert filled == "Say what <concept>X</concept> is in {braces}."
    assert fields.get("ar") == (None if meta.role == "av" else {"extraction_layer_index": 20})


def test_what_our_runs_add_is_honoured():
    assert AV.injection == InjectionConfig(scale=150.0)
    assert AV.templates == PromptTemplates(
        verbalizer=AV.prompt_templates.actor,
        reconstructor=AV.prompt_templates.critic,
        marker="㈎",
        closing="</explanation>",
    )
    own = dataclasses.replace(AV, own=OWN)
    assert own.injection == InjectionConfig(8, "add", 3.5, True)
    assert (own.templates.forced_start, own.templates.closing, own.templates.chat) == (
        "",
        "<|im_end|>",
        False,
    )


def test_sqrt_d_is_a_scale(tmp_path):
    text = RELEASE.replace("role: ar", "role: av").replace(
        "injection_scale: null", "injection_scale: sqrt_d_model"
    )
    assert NLAMeta.load(written(tmp_path, text)).injection_scale == 4.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: nla_model", "kind: nla_dataset", "kind is 'nla_dataset', expected 'nla_model'"),
        ("schema_version: 2", "schema_version: 3", "schema_version is 3, this version reads 2"),
        ("role: ar", "role: judge", "role is 'judge', expected one of av, actor, ar, critic"),
        ("role: ar", "role: av", "role is 'av': this is an AV, not an AR; give the AR's directory"),
        ("d_model: 16\n", "", "the meta data lacks d_model"),
        (
            "mse_scale: 4.0",
            "mse_scale: many",
            "extraction.mse_scale is 'many', expected a number or 'sqrt_d_model'",
        ),
        ("  injection_token_id: 149705\n", "", "tokens lacks injection_token_id"),
        ("  ar: ", "  other: ", "the meta data of an AR needs prompt_templates.ar"),
        ("{extraction_layer_index: 20}", "{extraction_layer_index: 21}", "extraction layer is not one"),
        ("kind: nla_model", "kind: [", "while parsing"),
    ],
)
def test_bad_files(tmp_path, old, new, message):
    assert old in RELEASE
    with pytest.raises(ValueError, match=message) as error:
        NLAMeta.load(written(tmp_path, RELEASE.replace(old, new)), role="ar")
    assert "nla_meta.yaml" in str(error.value)


def test_an_av_without_scale_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the meta data of an AV needs extraction.injection_scale"):
        NLAMeta.load(written(tmp_path, RELEASE.replace("role: ar", "role: av")))


def test_directory_without_meta(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a model of an NLA, or copied without this file"):
        NLAMeta.load(tmp_path)


def test_token_ids_that_disagree_are_named_with_both_values():
    live = dataclasses.replace(TOKENS, injection_token_id=7, critic_suffix_ids=(9, 29))
    with pytest.raises(
        ValueError,
        match=r"injection_token_id: meta 149705, tokenizer 7; "
        r"critic_suffix_ids: meta \(1318, 29, 366, 1708, 29\), tokenizer \(9, 29\)",
    ):
        AR.check_tokens(live, "somewhere")
    # How far back a suffix is written down differs between writers; the marker may be the AV's alone to know.
    AR.check_tokens(dataclasses.replace(TOKENS, critic_suffix_ids=(1708, 29)), "somewhere")
    AR.check_tokens(dataclasses.replace(TOKENS, critic_suffix_ids=None), "somewhere")
