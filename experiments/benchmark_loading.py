"""Time and memory of loading a checkpoint, against only reading its files.

Writes a random Llama of 4 GB in 8 safetensors shards into a folder, if it is not there yet, and loads it in fresh
processes, in turn with processes that read the same files from start to end: "read" frees each file at once, "keep"
ends with all files in memory, as a loader must. Delete the folder afterwards.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HIDDEN, FEED_FORWARD, VOCABULARY, SHARDS = 4096, 14336, 32768, 8
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SQUARE, NARROW, WIDE = (HIDDEN, HIDDEN), (HIDDEN // 4, HIDDEN), (FEED_FORWARD, HIDDEN)
LAYER = {
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
    "self_attn.q_proj": SQUARE,
    "self_attn.k_proj": NARROW,
    "self_attn.v_proj": NARROW,
    "self_attn.o_proj": SQUARE,
    "mlp.gate_proj": WIDE,
    "mlp.up_proj": WIDE,
    "mlp.down_proj": WIDE[::-1],
}
ENDS = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}


def write(folder: Path, layers: int) -> None:
    """Write the checkpoint, in bfloat16, with arbitrary numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {f"model.layers.{i}.{name}.weight": s for i in range(layers) for name, s in LAYER.items()} | ENDS
    noise = np.random.default_rng(0).integers(0, 2**15, VOCABULARY * HIDDEN, np.uint16)
    names, weight_map = list(shapes), {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = names[len(names) * shard // SHARDS : len(names) * (shard + 1) // SHARDS]
        values = {name: noise[: int(np.prod(shapes[name]))].reshape(shapes[name]) for name in part}
        save_file({name: value.view(ml_dtypes.bfloat16) for name, value in values.items()}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure(folder: Path, dtype: str) -> dict[str, float]:
    """Seconds and bytes of memory of reading the files ("read" or "keep"), or of loading them as `dtype`."""
    if dtype in ("read", "keep"):
        cpu, start, kept = time.process_time(), time.perf_counter(), []
        for file in sorted(folder.glob("*.safetensors")):
            data = file.read_bytes()
            kept += [data] * (dtype == "keep")
            del data
        return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    import jax

    from nla_jax.lm.files.configs import config_from_hf
    from nla_jax.lm.files.safetensors_files import open_safetensors, read_json
    from nla_jax.lm.files.weights import load_params

    config = config_from_hf(read_json(folder / "config.json"))
    jax.device_put(np.zeros(1)).block_until_ready()
    before, cpu, start = resident("VmRSS"), time.process_time(), time.perf_counter()
    params = load_params(open_safetensors(folder), config, dtype=dtype)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"seconds": seconds, "cpu": cpu, "size": size, "resident": resident("VmHWM") - before}


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at its peak."""
    return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def main() -> None:
    """Write, measure in turn, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", help="of the parameters; bfloat16 or float32")
    parser.add_argument("--layers", type=int, default=9, help="9 make 4.2 GB")
    parser.add_argument("--cold", action="store_true", help="drop the files from the cache before each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.folder, args.one)))
        return
    if not (args.folder / "model.safetensors.index.json").exists():
        write(args.folder, args.layers)
    runs = {kind: [] for kind in ("read", "keep", args.dtype)}
    for kind in [*runs] * args.repeats:
        for file in args.folder.glob("*.safetensors"):
            with file.open("rb") as opened:
                if args.cold:
                    os.fsync(opened.fileno())
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while not args.cold and opened.read(2**24):
                    pass
        command = [sys.executable, __file__, str(args.folder), "--one", kind]
        runs[kind].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    size, peak = (max(run[key] for run in runs[args.dtype]) for key in ("size", "resident"))
    print(
        f"model {size / 1e9:.2f} GB, peak resident memory {peak / 1e9:.2f} GB (+{(peak - size) / 1e9:.2f} GB)"
    )
    for clock in ("seconds", "cpu"):
        read, keep, load = (statistics.median(run[clock] for run in runs[kind]) for kind in runs)
        times = f"{load / read:.2f} and {load / keep:.2f} times"
        print(f"{clock:8} read {read:.2f}, keep {keep:.2f}, load {load:.2f}: {times}")


if __name__ == "__main__":
    main()
