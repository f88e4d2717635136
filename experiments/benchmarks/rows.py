"""The rows that compare with torch: extraction, generation, both supervised steps, a whole round."""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.measure import Comparison, agree, alternate, finished
from benchmarks.setting import OPTIMIZER, Setting
from benchmarks.torch_side import TorchReconstructor, TorchRound, TorchSide, Trainer, numpy
from benchmarks.torch_side import finished as torch_finished
from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.lm.activations import residual_at
from nla_jax.sharding.mesh import make_mesh, tree_shardings
from nla_jax.training.grpo import PolicyLossConfig
from nla_jax.training.joint import Round
from nla_jax.training.loop import LoopConfig
from nla_jax.training.round_programs import RLConfig
from nla_jax.training.state import TrainState
from nla_jax.training.supervised import ar_mse_step, av_sft_step, jit_step


def tolerance(setting: Setting, half: float, single: float = 1e-3) -> float:
    """The relative error that the two sides may have; in bfloat16 they round at different places."""
    return half if setting.dtype == "bfloat16" else single


def extraction(setting: Setting, side: TorchSide) -> Iterator[Comparison]:
    """Compare reading the residual stream after block K at some positions of documents."""
    sizes, layer = setting.sizes, setting.layer
    tokens_BT = setting.tokens(sizes.documents, sizes.document_tokens)
    rng = np.random.default_rng(2)
    # The first token's stream is huge in many models and would hide the others in a comparison.
    positions_BP = rng.integers(1, sizes.document_tokens, (sizes.documents, sizes.positions), np.int32)
    run = jax.jit(functools.partial(residual_at, config=setting.config, layers=(layer,), top=0))
    ours = finished(run, setting.lm.params, jnp.asarray(tokens_BT), jnp.asarray(positions_BP))
    model, theirs_BT, at_BP = side.backbone(master=False), side.tensor(tokens_BT), side.tensor(positions_BP)
    rows_B1 = torch.arange(sizes.documents, device=side.device)[:, None]

    @torch.inference_mode()
    def theirs():
        return model(theirs_BT, use_cache=False).last_hidden_state[rows_B1, at_BP]

    agreement = agree(
        "extraction", {"activations": (ours()[0][0], numpy(theirs()), tolerance(setting, half=0.1))}
    )
    yield Comparison(
        "extraction",
        setting.dtype,
        f"{sizes.documents} x {sizes.document_tokens} tokens, blocks 0-{layer}",
        "transformers, blocks cut",
        "tokens/s",
        tokens_BT.size,
        *alternate(ours, torch_finished(theirs), repeats=setting.repeats),
        agreement=agreement,
    )


def generation(setting: Setting, side: TorchSide) -> Iterator[Comparison]:
    """Compare sampling answers of full length at temperature 1."""
    sizes, verbalizer = setting.sizes, setting.verbalizer
    params, model = verbalizer.init(setting.lm.params), side.load(master=False)
    write = jax.jit(functools.partial(verbalizer.sample, group=sizes.group, max_tokens=sizes.new_tokens))
    agreement = _sampling_agrees(setting, side, write, params, model)
    for count in sizes.activations:
        activations_ND = setting.activations(count)
        ours = finished(write, params, jnp.asarray(activations_ND), jax.random.key(0))
        theirs_BD = side.tensor(np.repeat(activations_ND, sizes.group, axis=0))

        def theirs(cache: str | None, theirs_BD: torch.Tensor = theirs_BD) -> torch.Tensor:
            return side.generate(model, theirs_BD, sizes.new_tokens, cache)

        seconds = {}
        for cache in (None, "static"):
            if side.device.type == "cuda":
                torch_finished(functools.partial(theirs, cache))()  # compiles
            start = time.perf_counter()
            torch_finished(functools.partial(theirs, cache))()
            seconds[cache] = time.perf_counter() - start
        fastest = min(seconds, key=seconds.get)
        yield Comparison(
            "generation",
            setting.dtype,
            f"{count} x {sizes.group} answers, {verbalizer.prompt.length}+{sizes.new_tokens} tokens",
            f"generate, {fastest or 'dynamic'} cache",
            "new tokens/s",
            count * sizes.group * sizes.new_tokens,
            *alternate(ours, torch_finished(functools.partial(theirs, fastest)), repeats=setting.repeats),
            agreement=agreement,
            notes={"seconds_by_cache": {cache or "dynamic": value for cache, value in seconds.items()}},
        )


def _sampling_agrees(setting: Setting, side: TorchSide, write, params, model) -> dict[str, float]:
    """Each side scores the other's samples, and all answers have full length."""
    sizes, verbalizer = setting.sizes, setting.verbalizer
    activations_ND = setting.activations(sizes.activations[0])
    samples = write(params, jnp.asarray(activations_ND), jax.random.key(0))
    repeated_BD = side.tensor(np.repeat(activations_ND, sizes.group, axis=0))
    written_BT = side.generate(model, repeated_BD, sizes.new_tokens, None)
    with torch.inference_mode():
        scored_BT = side.log_probs(model, repeated_BD, side.tensor(samples.tokens_BT))
        own_BT = side.log_probs(model, repeated_BD, written_BT)
    score = jax.jit(verbalizer.statistics)
    lengths_B = jnp.full(len(repeated_BD), sizes.new_tokens)
    tokens_BT = jnp.asarray(written_BT.cpu().numpy(), jnp.int32)
    scored_by_us = score(params, jnp.asarray(activations_ND), tokens_BT, lengths_B).log_prob
    limit = tolerance(setting, half=0.1)
    return agree(
        "generation",
        {
            "length": (samples.lengths_B, np.full(len(repeated_BD), written_BT.shape[1]), 0.0),
            "our log-probs": (samples.log_probs_BT, numpy(scored_BT), limit),
            "their log-probs": (scored_by_us, numpy(own_BT), limit),
        },
    )


def ar_step(setting: Setting, side: TorchSide) -> Iterator[Comparison]:
    """Compare one regression update of the AR."""
    batch, reconstructor = setting.reconstructor_batch(), setting.reconstructor
    step = Step(ar_mse_step, reconstructor.init(setting.master_params), batch, reconstructor=reconstructor)
    model = TorchReconstructor(side)
    trainer = Trainer(model)
    columns = [side.tensor(x) for x in (batch.prompts_BT, batch.lengths_B, batch.activations_BD)]

    def theirs():
        return trainer.step(lambda *rows: model.direction_mse(*rows).mean(), [columns])

    shape = f"{setting.sizes.batch} x {setting.sizes.reconstructor_tokens} tokens"
    yield _compared("ar_step", setting, step, theirs, shape)


def av_step(setting: Setting, side: TorchSide) -> Iterator[Comparison]:
    """Compare one supervised update of the AV."""
    batch, verbalizer = setting.verbalizer_batch(), setting.verbalizer
    step = Step(av_sft_step, verbalizer.init(setting.master_params), batch, verbalizer=verbalizer)
    model = side.load(master=True)
    trainer = Trainer(model)
    columns = [side.tensor(x) for x in (batch.activations_BD, batch.responses_BT)]

    def loss(activations_BD, answers_BT):
        with side.autocast():
            return -side.log_probs(model, activations_BD, answers_BT).mean()

    shape = f"{setting.sizes.batch} x {verbalizer.prompt.length}+{setting.sizes.response_tokens} tokens"
    yield _compared("av_step", setting, step, lambda: trainer.step(loss, [columns]), shape)


class Step:
    """A compiled step on one batch, which holds its state."""

    def __init__(self, step, params: Any, batch: Any, **static: Any):
        optimizer = OPTIMIZER.build()
        self.state = TrainState.create(params, optimizer)
        self.run, self.batch = jit_step(step, optimizer=optimizer, **static), batch

    def __call__(self) -> tuple[float, float]:
        """Update once; loss and gradient norm."""
        self.state, metrics = jax.block_until_ready(self.run(self.state, self.batch))
        return float(metrics["loss"]), float(metrics["grad_norm"])


def _compared(row: str, setting: Setting, ours, theirs, shape: str) -> Comparison:
    """Compare two updates, then time them; the second loss tells whether the first update was the same."""
    (our_loss, our_norm), (their_loss, their_norm) = ours(), theirs()
    (our_second, _), (their_second, _) = ours(), theirs()
    agreement = agree(
        row,
        {
            "loss": (our_loss, their_loss, tolerance(setting, half=0.02)),
            "gradient norm": (our_norm, their_norm, tolerance(setting, half=0.1)),
            "second loss": (our_second, their_second, tolerance(setting, half=0.02)),
        },
    )
    times = alternate(ours, torch_finished(theirs), repeats=setting.repeats)
    against = "torch, autocast" if setting.dtype == "bfloat16" else "torch"
    return Comparison(
        row, setting.dtype, shape, against, "examples/s", setting.sizes.batch, *times, agreement=agreement
    )


@dataclasses.dataclass(frozen=True)
class EndlessCodec(Autoencoder):
    """An autoencoder that counts cut answers as closed, since none closes, and keeps the tokens sampled last."""

    seen: list = dataclasses.field(default_factory=list, compare=False)

    def decode(self, tokens_BT: np.ndarray, *_: np.ndarray) -> list[str | None]:
        """The texts of all answers, none of them failed."""
        self.seen[:] = [tokens_BT]
        return self.texts(tokens_BT)

    def texts(self, tokens_BT: np.ndarray) -> list[str]:
        """Texts of answers without their last token, which stands for the closing one."""
        return self.tokenizer.batch_decode(np.asarray(tokens_BT)[:, :-1], skip_special_tokens=False)


def round_(setting: Setting, side: TorchSide) -> Iterator[Comparison]:
    """Compare a whole round of joint training."""
    sizes, verbalizer, reconstructor = setting.sizes, setting.verbalizer, setting.reconstructor
    length = sizes.reconstructor_tokens - len(setting.prompts[1].prefix)
    codec = EndlessCodec(setting.lm.tokenizer, verbalizer, reconstructor, sizes.new_tokens, length)
    policy = PolicyLossConfig()
    config = RLConfig(
        loop=LoopConfig(steps=1, evaluate_every=1, checkpoint_every=1),
        activations=sizes.round_activations,
        group=sizes.group,
        micro_batches=sizes.micro_batches,
        policy=policy,
        av_optimizer=OPTIMIZER,
        ar_optimizer=OPTIMIZER,
    )
    masters, optimizer, mesh = setting.master_params, OPTIMIZER.build(), make_mesh()
    states = {
        "av": TrainState.create(verbalizer.init(masters), optimizer),
        "ar": TrainState.create(reconstructor.init(masters), optimizer),
    }
    # Placed as the training loop does it; states elsewhere would make the second round compile anew.
    states = jax.device_put(states, tree_shardings(states, mesh))
    reference = jax.jit(verbalizer.frozen)(verbalizer.init(masters))
    run = Round(config, codec, reference, mesh, jax.random.key(0))
    batch = {"activations_BD": setting.activations(sizes.round_activations)}
    theirs = TorchRound(side, codec.encode, codec.texts, policy.kl_coefficient)
    repeated_BD = np.repeat(batch["activations_BD"], sizes.group, axis=0)
    compared, index = {}, 0

    def ours() -> dict[str, Any]:
        nonlocal states, index
        states, metrics = run(states, batch, index)
        index += 1
        return metrics()

    limits = {"ar_loss": 0.02, "ar_grad_norm": 0.1, "av_grad_norm": 0.1}
    # In the first round the policy is the reference; only the second one has a KL. It is small after one update, and
    # in bfloat16 about as large as what torch's reference loses by its rounded residual stream.
    for number, names in enumerate((limits, {"kl": 0.6})):
        metrics = ours()
        metrics_there = theirs.update(repeated_BD, side.tensor(codec.seen[0]))
        for name in names:
            pair = float(metrics[name]), metrics_there[name]
            limit = tolerance(setting, half=names[name], single=0.02 if number else 1e-3)
            compared[name] = (*pair, limit)
    agreement = agree("round", compared)
    yield Comparison(
        "round",
        setting.dtype,
        f"{sizes.round_activations} x {sizes.group} rollouts, {verbalizer.prompt.length}+{sizes.new_tokens} "
        "tokens",
        "torch + generate",
        "rollouts/s",
        len(repeated_BD),
        *alternate(ours, torch_finished(lambda: theirs(batch["activations_BD"])), repeats=setting.repeats),
        agreement=agreement,
    )
