"""Tiny NLA checkpoints in the reference's layout, and torch code that uses them, written from the format alone."""

import json
from pathlib import Path

import torch
import transformers
import yaml
from family_models import build
from safetensors.torch import load_file, save_file
from tiny_model import CHAT_TEMPLATE, write_tokenizer
from tokenizers import Tokenizer, processors

VOCABULARY, D, LAYER = 512, 24, 1
BOS = "<|endoftext|>"
MARKER, SCALE = "<empty_output>", 7.5
AV_TEMPLATE = (
    "Describe {{the}} vector.\n\n<concept>{injection_char}</concept>\n\nIn <explanation> tags, please."
)
AR_TEMPLATE = "Summary of the following text: <text>{explanation}</text> <summary>"


def write_tokenizer_files(directory: Path, bos: bool) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer like SmolLM2's, or with Gemma's BOS, which both plain text and the chat template get."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, VOCABULARY)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    changes = {"bos_token": None}
    if bos:
        changes = {"bos_token": BOS, "unk_token": None, "chat_template": "{{ bos_token }}" + CHAT_TEMPLATE}
        inner = Tokenizer.from_file(str(directory / "tokenizer.json"))
        inner.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, 0)])
        inner.save(str(directory / "tokenizer.json"))
    path.write_text(json.dumps(settings | changes))
    return transformers.AutoTokenizer.from_pretrained(directory)


def write_reference_pair(directory: Path, family: str, *, spelling: str = "release") -> tuple[Path, Path]:
    """An AV of three blocks and an AR of two, of a family in `family_models`."""
    av, ar = directory / "av", directory / "ar"
    shape = {"vocab_size": VOCABULARY, "max_position_embeddings": 256}
    model = build(family, **shape)
    model.save_pretrained(av)
    types = getattr(model.config, "layer_types", None)
    cut = {} if types is None else {"layer_types": types[: LAYER + 1]}
    backbone = build(family, **shape, **cut, num_hidden_layers=LAYER + 1)
    weights = {name: value for name, value in backbone.state_dict().items() if "lm_head" not in name}
    backbone.save_pretrained(ar, state_dict=weights)
    torch.manual_seed(1)
    head = torch.eye(D) + 0.3 * torch.randn(D, D)
    save_file({"weight": head}, ar / "value_head.safetensors")
    for path in (av, ar):
        tokenizer = write_tokenizer_files(path, bos=family.startswith("gemma"))
    names = {"av": "av", "ar": "ar"} if spelling == "release" else {"av": "actor", "ar": "critic"}
    for role, path in (("av", av), ("ar", ar)):
        fields = meta_fields(tokenizer, names, role)
        (path / "nla_meta.yaml").write_text(yaml.safe_dump(fields, allow_unicode=True))
    return av, ar


def meta_fields(tokenizer, names: dict[str, str], role: str) -> dict:
    """What INTEROP says is in `nla_meta.yaml`, in the spelling that `names` gives the two roles."""
    ids = prompt_ids(tokenizer)
    marker = tokenizer.convert_tokens_to_ids(MARKER)
    slot = ids.index(marker)
    suffix = tokenizer.encode(AR_TEMPLATE.partition("{explanation}")[2], add_special_tokens=False)
    return {
        "kind": "nla_model",
        "schema_version": 2,
        "role": names[role],
        "stage": "rl",
        "d_model": D,
        "extraction": {"injection_scale": SCALE if role == "av" else None, "mse_scale": D**0.5},
        "tokens": {
            "injection_char": MARKER,
            "injection_token_id": marker,
            "injection_left_neighbor_id": ids[slot - 1],
            "injection_right_neighbor_id": ids[slot + 1],
            "critic_suffix_ids": suffix[1:] if role == "ar" else None,
        },
        "prompt_templates": {names["av"]: AV_TEMPLATE, names["ar"]: AR_TEMPLATE},
        **({names["ar"]: {"extraction_layer_index": LAYER}} if role == "ar" else {}),
    }


def prompt_ids(tokenizer, template: str = AV_TEMPLATE, marker: str = MARKER) -> list[int]:
    """The AV prompt up to where an answer starts."""
    chat = [{"role": "user", "content": template.format(injection_char=marker)}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


@torch.no_grad()
def av_log_probs(directory: Path, activation: torch.Tensor, answer: list[int], forced: str) -> torch.Tensor:
    """The AV's log-probability of every answer token after the prompt and a forced beginning."""
    meta = yaml.safe_load((directory / "nla_meta.yaml").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    tokens, templates = meta["tokens"], meta["prompt_templates"]
    ids = prompt_ids(tokenizer, templates.get("av") or templates["actor"], tokens["injection_char"])
    slots = [
        i
        for i in range(1, len(ids) - 1)
        if ids[i - 1 : i + 2]
        == [tokens[f"injection_{key}_id"] for key in ("left_neighbor", "token", "right_neighbor")]
    ]
    assert len(slots) == 1
    ids = ids + tokenizer.encode(forced, add_special_tokens=False)
    # For Gemma this includes the factor sqrt(d).
    embeddings = model.get_input_embeddings()(torch.tensor([ids + answer]))
    embeddings[0, slots[0]] = meta["extraction"]["injection_scale"] * activation / activation.norm()
    logits = model(inputs_embeds=embeddings).logits[0, len(ids) - 1 : -1]
    return logits.log_softmax(-1)[range(len(answer)), answer]


@torch.no_grad()
def ar_prediction(directory: Path, explanation: str) -> torch.Tensor:
    """What the AR rebuilds from a text."""
    meta = yaml.safe_load((directory / "nla_meta.yaml").read_text())
    templates = meta["prompt_templates"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    assert model.config.num_hidden_layers == (meta.get("ar") or meta["critic"])["extraction_layer_index"] + 1
    model.model.norm = torch.nn.Identity()
    text = (templates.get("ar") or templates["critic"]).format(explanation=explanation)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.bos_token_id in (None, ids[0])
    suffix = meta["tokens"]["critic_suffix_ids"]
    assert not suffix or ids[-len(suffix) :] == suffix
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return load_file(directory / "value_head.safetensors")["weight"] @ hidden
