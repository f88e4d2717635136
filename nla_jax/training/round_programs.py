"""What a round of joint training is made of: its config, its optimizers, and the compiled functions of its phases.

`RoundPrograms` is made from static descriptions alone, so that planning lowers what runs compile.
Shape letters: N activations, G group, B = N * G rollouts, T time, D model.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from nla_jax.autoencoder.metrics import reward
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import Verbalizer
from nla_jax.data.batches import check_cut
from nla_jax.lm.lora import FrozenBase, with_adapters
from nla_jax.lm.sampling import Samples
from nla_jax.lm.transformer import Params, Past
from nla_jax.sharding.aliasing import jit_aliasing
from nla_jax.sharding.mesh import BATCH, AnyMesh, tree_shardings
from nla_jax.training.grpo import PolicyLossConfig, Rollouts, grpo_step, reference_log_probs
from nla_jax.training.guards import GuardConfig
from nla_jax.training.loop import LoopConfig
from nla_jax.training.state import OptimizerConfig, check_pieces
from nla_jax.training.supervised import ar_mse_step, jit_step


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Joint training of AV and AR."""

    loop: LoopConfig = LoopConfig(steps=100, evaluate_every=10, checkpoint_every=10)
    """A step is a round: one batch of rollouts, one AV update and `ar_updates` of the AR."""
    activations: int = 8
    """Activations a round."""
    group: int = 4
    """Explanations an activation."""
    micro_batches: int = 1
    """Pieces each update is cut into; divides `activations`."""
    policy: PolicyLossConfig = PolicyLossConfig()
    av_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-5)
    ar_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-5)
    """Its warm-up and decay are counted in rounds, however many updates a round makes."""
    ar_updates: int = 1
    """AR updates a round. The first learns from the round's own texts and gives the rewards; each further one learns
    from as many texts of the replay."""
    replay_rounds: int = 4
    """Newest rounds whose texts the replay holds, this one among them. Nothing reads it while `ar_updates` is 1."""
    writer_share: float = 0.0
    """Share of the rows of each further AR update that have the writer's texts, from the AR's warm start, so that the
    AR does not forget how to read those."""
    balance_places: bool = False
    """Weigh the AR's errors by place, as `ar_sft.balance_places` does. Rewards stay as they are."""
    cut: tuple[int, int] | None = None
    """Fewest and most tokens of each explanation that the AR reads, None for all of them. How many is drawn anew for
    each activation of a round and shared by its group, so that what matters most has to be said first, and a word said
    twice in the beginning takes the place of another one."""
    reward: Literal["neg_mse", "neg_log_mse"] = "neg_mse"
    length_hinge_start: int | None = None
    """Tokens from which on each further one costs `length_hinge_slope` reward; start it before the cut."""
    length_hinge_slope: float = 0.02
    length_buckets: int = 8
    """Programs that an update is compiled to at most, for batches with more or fewer tokens, so that padding costs
    little; 1 compiles one, for full length. On one device only."""
    gather_weights: bool = True
    """Whether the AV that samples is whole along the mesh's fsdp axis: a copy, gathered once a round and not in every
    token step. The embedding, which is looked up, stays split. False saves the copy's memory; what is in compute dtype,
    as a base of adapters may be, is not copied then."""
    guards: GuardConfig = GuardConfig()

    def __post_init__(self):
        if self.group < 2:
            raise ValueError(
                f"rl.group={self.group}: advantages compare the explanations of one activation, so a group needs two "
                "at least; set --rl.group 4, for instance"
            )
        check_pieces("activations", self.activations, self.micro_batches, self.length_buckets)
        check_cut("rl.cut", self.cut)
        for name in ("ar_updates", "replay_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"rl.{name} is {getattr(self, name)}; expected 1 at least")
        if not 0 <= self.writer_share <= 1:
            raise ValueError(f"rl.writer_share is {self.writer_share}; expected a share between 0 and 1")
        if self.writer_share and self.ar_updates == 1:
            raise ValueError(
                f"rl.writer_share={self.writer_share} is a share of the AR updates after a round's first, and "
                "rl.ar_updates=1 makes none; set --rl.ar-updates 2, for instance"
            )

    @property
    def writer_rows(self) -> int:
        """Rows of each further AR update that have the writer's texts."""
        return round(self.writer_share * self.activations * self.group)


def optimizers(config: RLConfig) -> dict[str, optax.GradientTransformation]:
    """The optimizer of each trained model, by its name in the states; schedules are counted in rounds."""
    ar, updates = config.ar_optimizer, config.ar_updates
    decay = ar.decay_steps and ar.decay_steps * updates
    ar = dataclasses.replace(ar, warmup_steps=ar.warmup_steps * updates, decay_steps=decay)
    return {"av": config.av_optimizer.build(), "ar": ar.build()}


def sampling_weights(verbalizer: Verbalizer, params: Params, mesh: AnyMesh, *, gather: bool) -> Params:
    """The AV's weights for sampling: cast to compute dtype and, with `gather`, whole along the mesh's fsdp axis.

    Leaves that need neither are returned as they are.
    """
    weights = verbalizer.for_decoding(params)
    if mesh.size == 1:
        return weights
    given, one = {id(x) for x in jax.tree.leaves(params)}, jax.lax.optimization_barrier(jnp.float32(1))

    def moved(x: jax.Array, split: NamedSharding, wanted: NamedSharding) -> jax.Array:
        if id(x) in given and split == wanted:
            return x
        # Split as it came first: it moves in compute dtype then.
        x = jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, split), wanted)
        # What is gathered cannot be a program's result on TPU. XLA would copy it, everything at the very end, when all
        # of it is there twice; a product is made at once.
        return x if split == wanted else x * one.astype(x.dtype)

    gathered = gather and mesh.shape["fsdp"] > 1
    shardings = (tree_shardings(weights, mesh, gathered=moves) for moves in (False, gathered))
    return jax.tree.map(moved, weights, *shardings)


class RoundPrograms:
    """The compiled functions of a round, one a phase, from static descriptions alone: no weights, no devices' time.

    Attributes:
      copy_weights: (base, trained) -> the AV's weights for sampling, see `sampling_weights`.
      read: (weights, activations_ND) -> (past, final_ND), see `Verbalizer.read`.
      write: (weights, past, final_ND, key) -> Samples of G answers an activation, rows split over data and fsdp.
      reference: (reference_params, activations_ND, samples, token_budget) -> the reference's log-probs (N, G, T).
      update_reconstructor: (state, ReconstructorBatch, base, token_budget) -> (state, metrics), see `ar_mse_step`.
      score: (activations_ND, samples, mse_B, weights_B, reference_NGT) -> (Rollouts, metrics of the rewards).
      update_verbalizer: (state, rollouts, reference_params, base, token_budget) -> (state, metrics), see `grpo_step`.
    """

    def __init__(
        self,
        config: RLConfig,
        verbalizer: Verbalizer,
        reconstructor: Reconstructor,
        max_explanation_tokens: int,
        mesh: AnyMesh,
    ):
        """Wrap the phases for compilation, which their first calls begin.

        Args:
          config: of joint training.
          verbalizer: the AV's description.
          reconstructor: the AR's description.
          max_explanation_tokens: tokens after which an answer is cut.
          mesh: rollouts are split over its data and fsdp axes; its devices need not be there.
        """
        self._config, self._verbalizer, self._mesh = config, verbalizer, mesh
        self._max_tokens = max_explanation_tokens
        optimizer, rows = optimizers(config), NamedSharding(mesh, BATCH)
        self.copy_weights = jit_aliasing(self._copy_weights)
        self.read = jax.jit(verbalizer.read)
        self.write = jax.jit(self._write, out_shardings=rows)
        # A loop over micro-batches would leave its results whole on every device.
        self.reference = jax.jit(self._reference, out_shardings=rows, static_argnames="token_budget")
        self.update_reconstructor = jit_step(
            ar_mse_step,
            reconstructor=reconstructor,
            optimizer=optimizer["ar"],
            micro_batches=config.micro_batches,
        )
        self.score = jax.jit(self._score)
        self.update_verbalizer = jit_step(
            grpo_step,
            verbalizer=verbalizer,
            optimizer=optimizer["av"],
            config=config.policy,
            micro_batches=config.micro_batches,
        )

    def _copy_weights(self, base: FrozenBase | None, trained: Params) -> Params:
        whole, gather = with_adapters(base, trained), self._config.gather_weights
        return sampling_weights(self._verbalizer, whole, self._mesh, gather=gather)

    def _write(self, weights: Params, past: Past, final_ND: Float[Array, "N D"], key: Array) -> Samples:
        return self._verbalizer.write(
            weights,
            past,
            final_ND,
            key,
            group=self._config.group,
            max_tokens=self._max_tokens,
            temperature=self._config.policy.temperature,
        )

    def _by_group(self, samples: Samples) -> tuple[Array, Array, Array]:
        """Tokens and the sampler's log-probs as (N, G, T), lengths as (N, G)."""
        G, T = self._config.group, self._max_tokens
        lengths_NG = samples.lengths_B.reshape(-1, G)
        return samples.tokens_BT.reshape(-1, G, T), lengths_NG, samples.log_probs_BT.reshape(-1, G, T)

    def _reference(
        self,
        params: Params,
        activations_ND: Float[Array, "N D"],
        samples: Samples,
        token_budget: int | None = None,
    ) -> Float[Array, "N G T"]:
        tokens_NGT, lengths_NG, _ = self._by_group(samples)
        return reference_log_probs(
            params,
            activations_ND,
            tokens_NGT,
            lengths_NG,
            verbalizer=self._verbalizer,
            temperature=self._config.policy.temperature,
            micro_batches=self._config.micro_batches,
            token_budget=token_budget,
        )

    def _score(
        self,
        activations_ND: Float[Array, "N D"],
        samples: Samples,
        mse_B: Float[Array, "B"],
        weights_B: Float[Array, "B"],
        reference_NGT: Float[Array, "N G T"] | None,
    ) -> tuple[Rollouts, dict[str, Array]]:
        config, failed_B = self._config, weights_B == 0
        rewards_NG = reward(
            mse_B,
            failed_B,
            kind=config.reward,
            lengths=samples.lengths_B,
            length_hinge_start=config.length_hinge_start,
            length_hinge_slope=config.length_hinge_slope,
        ).reshape(-1, config.group)
        tokens_NGT, lengths_NG, log_probs_NGT = self._by_group(samples)
        rollouts = Rollouts(
            activations_ND=activations_ND,
            tokens_NGT=tokens_NGT,
            lengths_NG=lengths_NG,
            log_probs_NGT=log_probs_NGT,
            rewards_NG=rewards_NG,
            reference_log_probs_NGT=reference_NGT,
        )
        metrics = {
            "reward_mean": rewards_NG.mean(),
            "reward_std": rewards_NG.std(axis=1).mean(),
            "failed_fraction": failed_B.mean(),
            "length_mean": samples.lengths_B.mean(),
        }
        return rollouts, metrics
