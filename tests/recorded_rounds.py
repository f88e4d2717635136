"""Twenty rounds of both updates from recorded rollouts on a given mesh; what tests/test_distributed.py runs.

`python recorded_rounds.py MODEL OUT DATA,FSDP,TENSOR RANK [--distributed ...]` writes losses and parameters to OUT.
"""

import sys

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from nla_jax.autoencoder.prompts import PromptTemplates, build_reconstructor_prompt, build_verbalizer_prompt
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import InjectionConfig, Verbalizer
from nla_jax.lm.files.weights import load_language_model
from nla_jax.lm.lora import FrozenBase, LoraConfig, init_adapters
from nla_jax.process import join_processes
from nla_jax.sharding.mesh import MeshConfig, make_mesh
from nla_jax.sharding.placement import place, shard_batch, to_host
from nla_jax.training.grpo import PolicyLossConfig, Rollouts, grpo_step
from nla_jax.training.state import OptimizerConfig, TrainState
from nla_jax.training.supervised import ReconstructorBatch, ar_mse_step, jit_step

ROUNDS, N, G, T = 20, 8, 2, 10


def main(model: str, out: str, sizes: str, rank: str) -> None:
    mesh = make_mesh(MeshConfig(*map(int, sizes.split(","))))
    with jax.set_mesh(mesh):
        losses, params = rounds(model, mesh, LoraConfig(rank=int(rank)))
    if jax.process_index() == 0:
        np.savez(out, losses=losses, **params)


def rounds(path: str, mesh: jax.sharding.Mesh, lora: LoraConfig) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    lm = load_language_model(path, mesh=mesh)
    templates = PromptTemplates(verbalizer="Vector: {injection_char}")
    passes = {"pack": mesh.size == 1}
    av_prompt = build_verbalizer_prompt(lm.tokenizer, templates)
    ar_prompt = build_reconstructor_prompt(lm.tokenizer, templates)
    verbalizer = Verbalizer(lm.config, av_prompt, InjectionConfig(), 3.0, **passes)
    reconstructor = Reconstructor(lm.config.truncated(0), ar_prompt, **passes)
    optimizer = OptimizerConfig(learning_rate=1e-4, warmup_steps=2).build()
    models, states, bases = {"av": verbalizer, "ar": reconstructor}, {}, {}
    for name, part in models.items():
        params = part.init(lm.params)
        if lora.rank:
            bases[name] = FrozenBase(params["lm"], lora.scale)
            params = init_adapters(lora, params, jax.random.key(1))
        states[name] = place(TrainState.create(params, optimizer), mesh)
    reference = jax.jit(verbalizer.frozen)(verbalizer.init(lm.params))
    static = {"optimizer": optimizer, "micro_batches": 1}
    av_step = jit_step(grpo_step, verbalizer=verbalizer, config=PolicyLossConfig(), **static)
    ar_step = jit_step(ar_mse_step, reconstructor=reconstructor, **static)
    rng, losses = np.random.default_rng(0), []
    d, vocabulary = lm.config.d_model, lm.config.vocab_size
    for _ in range(ROUNDS):
        recorded = Rollouts(
            rng.standard_normal((N, d), np.float32),
            rng.integers(0, vocabulary, (N, G, T), np.int32),
            rng.integers(1, T + 1, (N, G), np.int32),
            rng.normal(-6, 1, (N, G, T)).astype(np.float32),
            rng.standard_normal((N, G), np.float32),
        )
        texts = ReconstructorBatch(
            rng.integers(0, vocabulary, (N * G, T), np.int32),
            rng.integers(1, T + 1, N * G, np.int32),
            rng.standard_normal((N * G, d), np.float32),
            np.ones(N * G, np.float32),
        )
        states["av"], av = av_step(states["av"], shard_batch(recorded, mesh), reference, bases.get("av"))
        states["ar"], ar = ar_step(states["ar"], shard_batch(texts, mesh), bases.get("ar"))
        losses.append([float(av["loss"]), float(av["kl"]), float(ar["loss"])])
    params = {name: state.params for name, state in states.items()}
    return np.array(losses), flatten_dict(to_host(params), sep="/")


if __name__ == "__main__":
    main(*join_processes(sys.argv[1:]))
