"""A random Llama model in a Hugging Face directory, small enough for every test.

`python tests/tiny_model.py DIR` writes one, without torch. The weights are scaled so that every block changes
the residual stream noticeably.
"""

import argparse
import ast
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's."""
MAX_POSITIONS = 512


def write_tiny_model(
    directory: str | Path,
    *,
    seed: int = 0,
    d_model: int = 32,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    vocab_size: int = 512,
    d_ff: int = 64,
    tie: bool = True,
) -> Path:
    """Write config.json, model.safetensors and a tokenizer trained on standard-library docstrings."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    head_dim = d_model // num_heads
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": d_model,
        "intermediate_size": d_ff,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": tie,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))

    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def scale() -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(d_model)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((vocab_size, d_model)).astype(np.float32),
        "model.norm.weight": scale(),
    }
    for i in range(num_layers):
        block = f"model.layers.{i}"
        tensors |= {
            f"{block}.input_layernorm.weight": scale(),
            f"{block}.self_attn.q_proj.weight": matrix(num_heads * head_dim, d_model),
            f"{block}.self_attn.k_proj.weight": matrix(num_kv_heads * head_dim, d_model),
            f"{block}.self_attn.v_proj.weight": matrix(num_kv_heads * head_dim, d_model),
            f"{block}.self_attn.o_proj.weight": matrix(d_model, num_heads * head_dim),
            f"{block}.post_attention_layernorm.weight": scale(),
            f"{block}.mlp.gate_proj.weight": matrix(d_ff, d_model),
            f"{block}.mlp.up_proj.weight": matrix(d_ff, d_model),
            f"{block}.mlp.down_proj.weight": matrix(d_model, d_ff),
        }
    if not tie:
        tensors["lm_head.weight"] = matrix(vocab_size, d_model)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(directory, vocab_size)
    return directory


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Train a byte-level BPE of exactly `vocab_size` tokens, split as SmolLM2's, and write its two files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stdlib_docstrings(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: the docstrings give only {tokenizer.get_vocab_size()} tokens"
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "additional_special_tokens": ["<empty_output>"],
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def stdlib_docstrings() -> list[str]:
    """Docstrings of a few long-lived standard-library modules: English text that every Python ships."""
    library = Path(ast.__file__).parent
    texts = []
    for name in [
        "argparse",
        "ast",
        "collections/__init__",
        "functools",
        "heapq",
        "json/__init__",
        "textwrap",
    ]:
        for node in ast.walk(ast.parse((library / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.append(ast.get_docstring(node) or "")
    return texts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    print(write_tiny_model(parser.parse_args().directory))
