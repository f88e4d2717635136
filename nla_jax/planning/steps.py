"""The compiled steps of a run, with shapes in place of arrays: nothing is allocated and no weights are read.

The steps of a round are the functions that the run itself compiles, `training.round_programs.RoundPrograms`; only the
shapes of their arguments are made here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nla_jax.autoencoder.prompts import ReconstructorPrompt, VerbalizerPrompt
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import Verbalizer
from nla_jax.config import ExperimentConfig
from nla_jax.lm.activations import residual_at
from nla_jax.lm.config import LMConfig
from nla_jax.lm.lora import FrozenBase, init_adapters, split_frozen, with_adapters
from nla_jax.lm.sampling import Samples
from nla_jax.lm.transformer import parameter_shapes, stack_blocks
from nla_jax.sharding.mesh import BATCH, AnyMesh, tree_shardings
from nla_jax.training.grpo import Rollouts
from nla_jax.training.round_programs import RoundPrograms
from nla_jax.training.state import TrainState
from nla_jax.training.supervised import (
    ReconstructorBatch,
    VerbalizerBatch,
    ar_mse_step,
    av_sft_step,
    jit_step,
)

Tree = Any
ROUND = ("copy", "prefill", "decode", "reference", "ar_update", "av_update")
"""The steps of a round of joint training, by its phases' names in metrics.jsonl; copy is part of prefill there."""
STEPS = ("extract", "av_sft", "ar_sft", *ROUND)
"""The steps of a run in order."""
UNROLLED = ("copy", "prefill", "decode")
"""The steps that read blocks one by one, never in a loop."""
TRAINED = {"av_sft": "av", "ar_sft": "ar", "ar_update": "ar", "av_update": "av"}
"""The model that a step updates."""


@dataclasses.dataclass(frozen=True)
class PromptLengths:
    """Tokens of the prompts, which stand in for those that a tokenizer would give."""

    prefix: int = 80
    """Of the AV's prompt before the marker."""
    tail: int = 20
    """After the marker."""
    reconstructor_prefix: int = 3


LENGTHS = PromptLengths()


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted function and the shapes and shardings it is called with."""

    function: Callable
    arguments: tuple[Tree, ...]


class AbstractRun:
    """What `Run` holds, without data, tokenizer and weights."""

    def __init__(
        self, config: ExperimentConfig, lm: LMConfig, mesh: AnyMesh, lengths: PromptLengths = LENGTHS
    ):
        """Describe a run.

        Args:
          config: the run's; its mesh and model path are not looked at.
          lm: the target.
          mesh: of devices that need not be there.
          lengths: of the prompts.
        """
        lm = config.model.applied(lm)
        ids = tuple(i % lm.vocab_size for i in range(max(lengths.prefix, lengths.tail)))
        av = VerbalizerPrompt(ids[: lengths.prefix], ids[0], ids[: lengths.tail], (1,), 1, "")
        ar = ReconstructorPrompt("{explanation}", ids[: lengths.reconstructor_prefix], ids[:1])
        remat, pack = config.model.remat, mesh.size == 1
        self.config, self.lm, self.mesh = config, lm, mesh
        self.verbalizer = Verbalizer(lm, av, config.injection, scale=1.0, remat=remat, pack=pack)
        self.reconstructor = Reconstructor(lm.truncated(config.model.layer), ar, remat=remat, pack=pack)
        self.programs = RoundPrograms(
            config.rl, self.verbalizer, self.reconstructor, config.max_explanation_tokens, mesh
        )

    @functools.cached_property
    def target(self) -> Tree:
        """Parameters of the target LM."""
        return self._placed(self._target)

    @functools.cached_property
    def states(self) -> dict[str, Tree]:
        """Train states in joint training; the warm starts' are of the same size."""

        def state(name: str) -> Tree:
            optimizer = getattr(self.config.rl, f"{name}_optimizer").build()
            return self._placed(lambda: TrainState.create(self._trained(name), optimizer))

        return {name: state(name) for name in ("av", "ar")}

    @functools.cached_property
    def bases(self) -> dict[str, FrozenBase]:
        """What is frozen, if anything is; the AR's shares what it has of the AV's, unless it is stacked."""
        lora, blocks = self.config.lora, self.config.model.frozen_blocks
        if blocks:
            frozen = self._placed(lambda: split_frozen(self._target(), blocks)[0])
            return dict.fromkeys(("av", "ar"), FrozenBase(frozen, 1.0))
        if not lora.rank:
            return {}
        reconstructor = self._placed(lambda: self.reconstructor.init(self._target())["lm"])
        return {"av": FrozenBase(self.target, lora.scale), "ar": FrozenBase(reconstructor, lora.scale)}

    @functools.cached_property
    def reference(self) -> Tree:
        """The frozen warm-start AV."""
        if self.config.lora.rank:
            return self._placed(self._whole)
        return self._placed(lambda: self.verbalizer.frozen(self._whole()), self._frozen_shardings)

    def _frozen_shardings(self, shapes: Tree) -> Tree:
        """Those of the AV that is frozen; a head that was the embedding is split as its transpose."""
        shardings = tree_shardings(shapes, self.mesh)
        if self.lm.tie_embeddings:
            vocabulary, width = shardings["lm"]["embed"]["embedding"].spec
            shardings["lm"]["lm_head"]["kernel"] = NamedSharding(self.mesh, P(width, vocabulary))
        return shardings

    @functools.cached_property
    def weights(self) -> Tree:
        """The AV as a round's sampling reads it."""
        gather = self.config.rl.gather_weights
        return self._placed(
            lambda: self.verbalizer.for_decoding(self._whole()),
            lambda shapes: tree_shardings(shapes, self.mesh, gathered=gather),
        )

    @functools.cached_property
    def copied(self) -> Tree:
        """The sampling weights that take memory of their own: those that are no arrays of a train state or its base."""
        copy, gather = self._copy(), self.config.rl.gather_weights
        return self._placed(
            functools.partial(copy.function, *copy.arguments),
            lambda shapes: tree_shardings(shapes, self.mesh, gathered=gather),
        )

    def _whole(self) -> Tree:
        """All parameters of the AV."""
        return with_adapters(FrozenBase(self._target(), 1.0) if self.bases else None, self._trained("av"))

    def _trained(self, name: str) -> Tree:
        params = {"av": self.verbalizer, "ar": self.reconstructor}[name].init(self._target())
        lora, blocks = self.config.lora, self.config.model.frozen_blocks
        if lora.rank:
            return init_adapters(lora, params, jax.random.key(0))
        return {**params, "lm": split_frozen(params["lm"], blocks)[1]} if blocks else params

    def _target(self) -> Tree:
        dtype = self.config.lora.base_dtype if self.config.lora.rank else "float32"
        shapes = parameter_shapes(self.lm)
        params = unflatten_dict({path: jnp.zeros(shape, dtype) for path, shape in shapes.items()}, sep="/")
        return stack_blocks(params) if self.config.model.scan_blocks else params

    def step(self, name: str) -> Step:
        """One of STEPS."""
        return getattr(self, f"_{name}")()

    def _extract(self) -> Step:
        config = self.config.extraction
        layers = config.all_layers(self.config.model.layer)
        run = functools.partial(residual_at, config=self.lm, layers=layers, top=4 * config.next_words)
        shapes = [
            (config.max_tokens,),
            (config.positions_per_document,),
            *[(config.spans, 2)] * bool(config.spans),
        ]
        rows = self._rows(lambda: [jnp.zeros((config.batch_size, *shape), jnp.int32) for shape in shapes])
        return Step(jax.jit(run), (self.target, *rows))

    def _av_sft(self) -> Step:
        config, T = self.config.av_sft, self.config.max_explanation_tokens
        B = config.batch_size
        batch = self._rows(
            lambda: VerbalizerBatch(
                activations_BD=jnp.zeros((B, self.lm.d_model)),
                responses_BT=jnp.zeros((B, T), jnp.int32),
                lengths_B=jnp.zeros(B, jnp.int32),
            )
        )
        step = jit_step(
            av_sft_step,
            verbalizer=self.verbalizer,
            optimizer=config.optimizer.build(),
            micro_batches=config.micro_batches,
        )
        return Step(step, (self.states["av"], batch, self.bases.get("av")))

    def _ar_sft(self) -> Step:
        config = self.config.ar_sft
        step = jit_step(
            ar_mse_step,
            reconstructor=self.reconstructor,
            optimizer=config.optimizer.build(),
            micro_batches=config.micro_batches,
        )
        return Step(step, (self.states["ar"], self._texts(config.batch_size), self.bases.get("ar")))

    def _copy(self) -> Step:
        return Step(self.programs.copy_weights.program, (self.bases.get("av"), self.states["av"].params))

    def _prefill(self) -> Step:
        return Step(self.programs.read, (self.weights, self._activations))

    def _decode(self) -> Step:
        past, final_ND = self._prompt
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(self.mesh, P()))
        return Step(self.programs.write, (self.weights, past, final_ND, key))

    def _reference(self) -> Step:
        return Step(self.programs.reference, (self.reference, self._activations, self._samples))

    def _ar_update(self) -> Step:
        texts = self._texts(self.config.rl.activations * self.config.rl.group)
        return Step(self.programs.update_reconstructor, (self.states["ar"], texts, self.bases.get("ar")))

    def _av_update(self) -> Step:
        arguments = self.states["av"], self._rollouts, self.reference, self.bases.get("av")
        return Step(self.programs.update_verbalizer, arguments)

    @functools.cached_property
    def _activations(self) -> Tree:
        """The activations of a round."""
        return self._rows(lambda: jnp.zeros((self.config.rl.activations, self.lm.d_model)))

    @functools.cached_property
    def _prompt(self) -> Tree:
        """The AV's read prompts, split as the partitioner leaves them.

        Keys and values are split by heads and, but for the prefix's one row, by rows; hidden states are split by rows.
        Positions are constants, which every device has whole.
        """

        def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            if jnp.issubdtype(leaf.dtype, jnp.integer):
                return NamedSharding(self.mesh, P())
            heads = ("tensor",) if leaf.ndim == 4 else ()
            rows = BATCH[0] if leaf.shape[len(heads)] > 1 else None
            return NamedSharding(self.mesh, P(*heads, rows))

        read = functools.partial(self.programs.read, self.weights, self._activations)
        return self._placed(read, lambda shapes: jax.tree.map(sharding, shapes))

    @functools.cached_property
    def _samples(self) -> Samples:
        """A round's answers."""
        write = self._decode()
        return self._rows(functools.partial(write.function, *write.arguments))

    @functools.cached_property
    def _rollouts(self) -> Rollouts:
        """A round's answers with rewards, and with the reference's log-probs where they are asked for beforehand."""
        reference = None
        if self.config.rl.policy.kl_is_sampled:
            refer = self._reference()
            reference = self._rows(functools.partial(refer.function, *refer.arguments))
        mse_B = weights_B = jax.ShapeDtypeStruct(self._samples.lengths_B.shape, jnp.float32)
        score = self.programs.score
        rollouts, _ = jax.eval_shape(score, self._activations, self._samples, mse_B, weights_B, reference)
        return self._rows(lambda: rollouts)

    def _texts(self, B: int) -> ReconstructorBatch:
        """A batch of `B` explanations for the AR."""
        T = self.config.max_reconstructor_tokens
        return self._rows(
            lambda: ReconstructorBatch(
                prompts_BT=jnp.zeros((B, T), jnp.int32),
                lengths_B=jnp.zeros(B, jnp.int32),
                activations_BD=jnp.zeros((B, self.lm.d_model)),
                weights_B=jnp.zeros(B),
            )
        )

    def _rows(self, make: Callable[[], Tree]) -> Tree:
        """A batch, its rows split as `shard_batch` splits them."""
        sharding = NamedSharding(self.mesh, BATCH)
        return self._placed(make, lambda shapes: jax.tree.map(lambda _: sharding, shapes))

    def _placed(self, make: Callable[[], Tree], shardings: Callable[[Tree], Tree] | None = None) -> Tree:
        shapes = jax.eval_shape(make)
        return jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
            shapes,
            tree_shardings(shapes, self.mesh) if shardings is None else shardings(shapes),
        )


def bytes_per_device(tree: Tree) -> float:
    """Bytes that one device holds of a tree of shapes with shardings."""
    return float(
        sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def check_divisions(config: ExperimentConfig, lm: LMConfig, mesh: AnyMesh) -> None:
    """Refuse sizes that the mesh does not divide.

    Raises:
      ValueError: names every such size, with the nearest one that the mesh divides.
    """
    tensor, ways = mesh.shape["tensor"], mesh.shape["data"] * mesh.shape["fsdp"]
    problems = []
    for name in ("num_heads", "num_kv_heads", "d_ff"):
        if (size := getattr(lm, name)) % tensor:
            nearest = max(n for n in range(1, tensor + 1) if not size % n)
            problems.append(
                f"tensor={tensor} does not divide {name}={size} (the nearest that does is {nearest})"
            )
    rows = {
        "extraction.batch_size": (config.extraction.batch_size, 1),
        "av_sft.batch_size": (config.av_sft.batch_size, config.av_sft.micro_batches),
        "ar_sft.batch_size": (config.ar_sft.batch_size, config.ar_sft.micro_batches),
        "rl.activations": (config.rl.activations, config.rl.micro_batches),
    }
    for name, (size, pieces) in rows.items():
        if size % (ways * pieces):
            step = ways * pieces
            cut = f" in {pieces} micro-batches" if pieces > 1 else ""
            problems.append(
                f"data * fsdp = {ways} devices do not divide {name}={size}{cut} "
                f"(the nearest that they do is {max(round(size / step), 1) * step})"
            )
    if problems:
        raise ValueError(f"mesh {dict(mesh.shape)}: {'; '.join(problems)}")
