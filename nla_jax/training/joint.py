"""Joint training: GRPO for the AV on the AR's reconstruction, regression for the AR, no gradient between them.

`Round` is the algorithm: the AV samples groups of explanations, the host turns them into texts while the device asks
the reference for their log-probs, one AR update scores and learns from them at once (its errors before the update are
the rewards), and one policy update of the AV follows. Further AR updates learn from a replay (`replay.py`). Nothing but
the texts waits for the device. What it compiles, and its config, are in `round_programs.py`. `RoundMetrics` times the
phases and names what is measured.
Shape letters: N activations, G group, B = N * G rollouts, T time, D model.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import Verbalizer
from nla_jax.data.batches import cut_texts, reconstructor_rows
from nla_jax.lm.lora import FrozenBase
from nla_jax.lm.packing import budget_for_lengths
from nla_jax.lm.sampling import Samples
from nla_jax.lm.transformer import Params
from nla_jax.sharding.placement import (
    block_on_simulated_devices,
    place_process_rows,
    process_row_indices,
    process_rows,
    shard_batch,
    to_host,
)
from nla_jax.training.loop import Metrics, States, scalars
from nla_jax.training.replay import Replay
from nla_jax.training.round_programs import RLConfig, RoundPrograms
from nla_jax.training.state import TrainState
from nla_jax.training.stopwatch import Lap, Stopwatch
from nla_jax.training.supervised import ReconstructorBatch


class RoundMetrics:
    """Times the phases of rounds, counts their model FLOPs, and names a round's metrics."""

    def __init__(self, config: RLConfig, verbalizer: Verbalizer, reconstructor: Reconstructor):
        """Measure what the device reaches in matrix products, and start a thread that waits for the phases."""
        self._config, self._verbalizer, self._reconstructor = config, verbalizer, reconstructor
        self._stopwatch = Stopwatch(verbalizer.config.dtype)

    def lap(self) -> Lap:
        """The clock of one round, which begins now."""
        return self._stopwatch.lap()

    def flops(self, answer_length: float, prompt_length: float) -> dict[str, float]:
        """Model FLOPs of each phase.

        Args:
          answer_length: mean tokens of an answer.
          prompt_length: mean tokens of an AR prompt after its prefix.
        """
        N, B = self._config.activations, self._config.activations * self._config.group
        answers = self._verbalizer.forward_flops(N, B, answer_length)
        flops = {
            "prefill": self._verbalizer.forward_flops(N, N, 0),
            "decode": self._verbalizer.decode_flops(B, answer_length),
            "reference": answers,
            "ar_update": 3 * self._reconstructor.forward_flops(B, prompt_length),
            "av_update": 3 * answers,
        }
        if self._config.ar_updates > 1:
            flops["replay"] = (self._config.ar_updates - 1) * flops["ar_update"]
        if not self._config.policy.kl_is_sampled:
            # The update itself runs the reference, whose hidden states it needs.
            flops["av_update"] += flops.pop("reference")
        return flops

    def row(
        self,
        lap: Lap,
        *,
        av: Mapping[str, Array],
        ar: Mapping[str, Array],
        scores: Mapping[str, Array],
        prompt_length: float,
        replayed: Mapping[str, Array] | None = None,
    ) -> dict[str, float]:
        """Wait for a round and name its metrics.

        Args:
          lap: the round's clock.
          av: metrics of the AV's update.
          ar: metrics of the AR's update.
          scores: metrics of the rewards.
          prompt_length: mean tokens of an AR prompt after its prefix.
          replayed: metrics of the AR's last update from the replay, if there are any.
        """
        shared = ("loss", "grad_norm")
        named = {f"av_{name}": av[name] for name in shared}
        named |= {f"ar_{name}": ar[name] for name in shared}
        named |= {name: x for name, x in av.items() if name not in shared}
        if replayed is not None:
            named["ar_replay_loss"], ar = replayed["loss"], replayed
        bad_steps = max(int(metrics["bad_steps"]) for metrics in (av, ar))
        row = scalars(named | dict(scores) | {"bad_steps": bad_steps})
        row |= lap.metrics(self.flops(row["length_mean"], prompt_length))
        B = self._config.activations * self._config.group
        row["speed/decode_tokens_per_second"] = row["length_mean"] * B / row["speed/decode_seconds"]
        row["speed/rollouts_per_second"] = B / row["speed/seconds"]
        return row


class Round:
    """One round of joint training, compiled, as a step for `run_stage`.

    A call takes states {"av", "ar"}, which it donates, a batch of `StoredActivations` and the round's index, which
    decides the random key of its samples and all else that is drawn. It returns the new states and metrics to come:
    those of the updates, reward_mean and reward_std (within groups; both before any KL is taken off), failed_fraction,
    length_mean, and the speed of the phases: prefill, decode, reference (unless the KL is exact), ar_update (which
    gives the rewards), av_update and replay (all further AR updates) on the device, texts on the host.
    """

    def __init__(
        self,
        config: RLConfig,
        autoencoder: Autoencoder,
        reference_params: Params,
        mesh: Mesh,
        key: Array,
        bases: Mapping[str, FrozenBase] | None = None,
        replay: Replay | None = None,
    ):
        """Prepare rounds; see `RoundMetrics` for what that measures on the device.

        Args:
          config: of joint training.
          autoencoder: both models' descriptions, and what turns answers into texts and texts into prompts.
          reference_params: the warm-start AV, best as `Verbalizer.frozen` gives it.
          mesh: rollouts are split over its data and fsdp axes.
          key: round i samples with fold_in(key, i).
          bases: the frozen weights of "av" and "ar" where what is trained are adapters.
          replay: what further AR updates learn from; needed where `config.ar_updates` is above 1.
        """
        self.config, self.autoencoder, self.mesh, self.key = config, autoencoder, mesh, key
        self.replay, self._seed = replay, tuple(jax.random.key_data(key).tolist())
        self.reference_params, bases = reference_params, bases or {}
        self.av_base, self.ar_base = bases.get("av"), bases.get("ar")
        verbalizer, reconstructor = autoencoder.verbalizer, autoencoder.reconstructor
        self.programs = RoundPrograms(
            config, verbalizer, reconstructor, autoencoder.max_explanation_tokens, mesh
        )
        self.metrics = RoundMetrics(config, verbalizer, reconstructor)

    def __call__(self, states: States, batch: dict[str, np.ndarray], index: int) -> tuple[States, Metrics]:
        """Run round `index`; see the class."""
        lap, programs, reference_NGT = self.metrics.lap(), self.programs, None
        activations_ND = place_process_rows(batch["activations_BD"], self.config.activations, self.mesh)
        # The AV explains each activation in a group of answers.
        samples = self._sample(states["av"].params, activations_ND, jax.random.fold_in(self.key, index), lap)
        answer_budget = self._token_budget(samples.lengths_B, self.autoencoder.max_explanation_tokens)
        # The device asks the reference for their log-probs while the host turns them into texts.
        if self.config.policy.kl_is_sampled:
            reference_NGT = programs.reference(
                self.reference_params, activations_ND, samples, token_budget=answer_budget
            )
            lap.until("reference", reference_NGT)
        texts, prompt_lengths_B = self._texts(batch, samples, index, lap)
        # The AR learns to rebuild the activations; its errors before it does are the rewards.
        ar, ar_metrics = self._update_reconstructor(states["ar"], texts, prompt_lengths_B)
        lap.until("ar_update", ar_metrics["loss"])
        rollouts, scores = block_on_simulated_devices(
            programs.score(activations_ND, samples, ar_metrics["mse_nrm_B"], texts.weights_B, reference_NGT)
        )
        # The AV learns to write what is rewarded, and to stay near the reference.
        av, av_metrics = programs.update_verbalizer(
            states["av"], rollouts, self.reference_params, self.av_base, token_budget=answer_budget
        )
        lap.until("av_update", av_metrics["loss"])
        # The AR learns on, from what this round and those before it wrote.
        ar, replayed = self._replayed(ar, index, lap)
        length = prompt_lengths_B.mean()
        return {"av": av, "ar": ar}, lambda: self.metrics.row(
            lap, av=av_metrics, ar=ar_metrics, scores=scores, prompt_length=length, replayed=replayed
        )

    def _update_reconstructor(
        self, state: TrainState, texts: ReconstructorBatch, lengths_B: np.ndarray
    ) -> tuple[TrainState, dict[str, Array]]:
        """An AR update from texts, of which this process knows the lengths of its own."""
        budget = self._token_budget(lengths_B, self.autoencoder.max_reconstructor_tokens)
        return self.programs.update_reconstructor(state, texts, self.ar_base, token_budget=budget)

    def _replayed(
        self, state: TrainState, index: int, lap: Lap
    ) -> tuple[TrainState, dict[str, Array] | None]:
        """The AR after the round's further updates, and the metrics of the last of them."""
        metrics = None
        for update in range(1, self.config.ar_updates):
            rows = self.replay.batch(*self._seed, index, update)
            texts = ReconstructorBatch(**shard_batch(rows, self.mesh))
            state, metrics = self._update_reconstructor(state, texts, rows["lengths_B"])
            block_on_simulated_devices(metrics["loss"])
        if metrics is not None:
            lap.until("replay", metrics["loss"])
        return state, metrics

    def _sample(self, params: Params, activations_ND: jax.Array, key: jax.Array, lap: Lap) -> Samples:
        """Read the activations and write answers. The weights that are copies live as long as this call."""
        weights = block_on_simulated_devices(self.programs.copy_weights(self.av_base, params))
        past, final_ND = self.programs.read(weights, activations_ND)
        lap.until("prefill", final_ND)
        samples = self.programs.write(weights, past, final_ND, key)
        lap.until("decode", samples.lengths_B)
        return samples

    def _texts(
        self, batch: Mapping[str, np.ndarray], samples: Samples, index: int, lap: Lap
    ) -> tuple[ReconstructorBatch, np.ndarray]:
        """The AR's batch from sampled answers, and the lengths of its prompts on this process's devices."""
        jax.block_until_ready(samples)
        with lap.on_host("texts"):
            own_N = process_row_indices(self.config.activations, self.mesh)
            texts = self._read(process_rows(samples.answers), own_N, index)
            source = {name: np.repeat(rows, self.config.group, axis=0) for name, rows in batch.items()}
            rows = reconstructor_rows(
                self.autoencoder, source["activations_BD"], texts, source.get("weights_B")
            )
            placed = ReconstructorBatch(**place_process_rows(rows, len(samples.lengths_B), self.mesh))
            if self.replay is not None:
                self._remember(batch["rows_B"], samples, index)
        return placed, rows["lengths_B"]

    def _read(self, answers: tuple[np.ndarray, ...], numbers_N: np.ndarray, index: int) -> list[str | None]:
        """What the AR reads of the answers about some of the round's activations, by their numbers in the round.

        An answer that never closes has failed wherever it is cut. So what stands behind the cut is learned from, too:
        the policy's loss leaves no token out.
        """
        texts = self.autoencoder.decode(*answers)
        if self.config.cut is None:
            return texts
        fewest, most = self.config.cut
        draw = np.random.default_rng((*self._seed, index))
        tokens_N = draw.integers(fewest, most + 1, self.config.activations)[numbers_N]
        return cut_texts(self.autoencoder.tokenizer, texts, np.repeat(tokens_N, self.config.group))

    def _remember(self, rows_N: np.ndarray, samples: Samples, index: int) -> None:
        """Put the round's texts into the replay, those of other processes as well."""
        every_N = to_host(place_process_rows(rows_N, self.config.activations, self.mesh))
        texts = self._read(to_host(samples.answers), np.arange(self.config.activations), index)
        self.replay.add(every_N, texts)

    def _token_budget(self, lengths_B: jax.Array | np.ndarray, max_length: int) -> int | None:
        """The budget of a pass over texts, for which it is compiled.

        Where rows are split over devices they are not packed, and padding stays: None, and nothing waits for lengths.
        """
        if self.mesh.size > 1 or self.config.length_buckets == 1:
            return None
        return budget_for_lengths(
            np.asarray(lengths_B),
            max_length,
            micro_batches=self.config.micro_batches,
            buckets=self.config.length_buckets,
        )
