"""Training states, the optimizer, and the update: it sums gradients over micro-batches and refuses infinite ones."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Tree = Any


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and, if `decay_steps` is given, cosine decay to a tenth."""

    learning_rate: float = 1e-4
    warmup_steps: int = 10
    """Updates until the full rate: the i-th of them has the rate `learning_rate * i / warmup_steps`."""
    decay_steps: int | None = None
    """Steps until the rate has fallen to a tenth; None keeps it constant after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled decay of the blocks' weight matrices (adapters among them). Norms, biases, embeddings, the LM head, the
    AR's head and the AV's affine map are not decayed."""
    b1: float = 0.9
    b2: float = 0.99
    max_grad_norm: float = 1.0

    def __post_init__(self):
        if self.decay_steps is not None and self.decay_steps < max(self.warmup_steps, 1):
            raise ValueError(
                f"decay_steps={self.decay_steps} ends the decay of the learning rate before its warm-up, which takes "
                f"warmup_steps={self.warmup_steps}; decay over at least as many steps (loop.steps, for instance), or "
                "warm up for fewer"
            )

    def build(self) -> optax.GradientTransformation:
        """The optax transformation."""
        # The first update counts as 0 and has a share of the rate already: a rate of zero would waste its batch.
        rise = max(self.warmup_steps, 1)
        first = self.learning_rate / rise
        if self.decay_steps is None:
            schedule = optax.linear_schedule(first, self.learning_rate, rise - 1)
        else:
            schedule = optax.warmup_cosine_decay_schedule(
                first, self.learning_rate, rise - 1, self.decay_steps, self.learning_rate / 10
            )
        return optax.chain(
            optax.clip_by_global_norm(self.max_grad_norm),
            optax.adamw(
                schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay, mask=_weight_matrices
            ),
        )


def _weight_matrices(params: Tree) -> Tree:
    """Which leaves weight decay applies to: those inside blocks that are neither norm scales nor biases."""

    def is_matrix(path: Any, _: Any) -> bool:
        *modules, leaf = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return any(name.startswith("blocks") for name in modules) and leaf not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(is_matrix, params)


# Trees are rebuilt with shapes and shardings in place of arrays, so their fields are not checked.
@typing.no_type_check
@flax.struct.dataclass
class TrainState:
    """Parameters and optimizer of one model.

    Attributes:
      params: float32 parameters.
      opt_state: optax state.
      step: updates made, refused ones included.
      bad_steps: refused updates since the last good one.
    """

    params: Tree
    opt_state: Tree
    step: Int[Array, ""]
    bad_steps: Int[Array, ""]

    @classmethod
    def create(cls, params: Tree, optimizer: optax.GradientTransformation) -> "TrainState":
        """A fresh state with a copy of `params`: steps donate their state, and must not take the caller's arrays."""
        params = jax.tree.map(jnp.copy, params)
        return cls(params, optimizer.init(params), jnp.int32(0), jnp.int32(0))


def restart(state: TrainState) -> TrainState:
    """The state at the start of another stage: the optimizer keeps its moments, its schedule and counts start anew."""

    def is_schedule(path: Any, _: Any) -> bool:
        return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"

    opt_state = optax.tree_utils.tree_set(state.opt_state, is_schedule, count=jnp.int32(0))
    return TrainState(state.params, opt_state, jnp.int32(0), jnp.int32(0))


# Trees are rebuilt with shapes and shardings in place of arrays, so their fields are not checked.
@typing.no_type_check
@flax.struct.dataclass
class LossSums:
    """The loss of a micro-batch as a sum over its tokens or rows, with further sums to report.

    Attributes:
      loss: summed loss.
      sums: further sums, which are divided by the same denominator as the loss.
      per_row: quantities with one value a row, which are not summed.
    """

    loss: Float[Array, ""]
    sums: dict[str, Array] = flax.struct.field(default_factory=dict)
    per_row: dict[str, Array] = flax.struct.field(default_factory=dict)


def update(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    loss_sums: Callable[[Tree, Tree], LossSums],
    batch: Tree,
    denominator: Float[Array, ""],
    micro_batches: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer update from the gradient of a mean loss over the whole batch.

    Micro-batches add sums, and the sum is divided once, so their number changes nothing but memory.
    An update whose gradient is not finite is refused and counted.

    Args:
      state: the state to update, which jitted callers donate.
      optimizer: as given to `TrainState.create`.
      loss_sums: (params, micro-batch) -> sums.
      batch: arrays with the row axis first; rows are a multiple of `micro_batches`.
      denominator: divisor of the loss over the whole batch.
      micro_batches: number of parts that the batch is cut into.

    Returns:
      The new state, and metrics: loss, grad_norm, the other sums divided, and the per-row quantities.

    Raises:
      ValueError: `micro_batches` does not divide the rows.
    """
    denominator = jnp.maximum(denominator, 1.0)

    def objective(params: Tree, piece: Tree) -> tuple[Array, tuple[dict[str, Array], dict[str, Array]]]:
        sums = loss_sums(params, piece)
        return sums.loss / denominator, ({"loss": sums.loss, **sums.sums}, sums.per_row)

    gradient = jax.grad(objective, has_aux=True)
    if micro_batches == 1:
        grads, (sums, per_row) = gradient(state.params, batch)
    else:
        # Cut leaf by leaf: a batch with a second leading axis would not be the structure its type declares.
        leaves, structure = jax.tree.flatten(batch)
        if len(leaves[0]) % micro_batches:
            raise ValueError(
                f"{len(leaves[0])} rows do not divide into micro_batches={micro_batches}; "
                f"use a divisor of {len(leaves[0])}"
            )
        pieces = [x.reshape(micro_batches, -1, *x.shape[1:]) for x in leaves]

        def gradient_of(piece):
            return gradient(state.params, jax.tree.unflatten(structure, piece))

        def add(total, piece):
            grads, (sums, per_row) = gradient_of(piece)
            return jax.tree.map(jnp.add, total, (grads, sums)), per_row

        grads, (sums, _) = jax.eval_shape(gradient_of, [x[0] for x in pieces])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, sums))
        (grads, sums), per_row = jax.lax.scan(add, zeros, pieces)
        per_row = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), per_row)

    grad_norm = optax.tree.norm(grads)
    good = jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new, old = (params, opt_state), (state.params, state.opt_state)
    params, opt_state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    bad_steps = jnp.where(good, 0, state.bad_steps + 1)
    metrics = {name: value / denominator for name, value in sums.items()}
    metrics |= {"grad_norm": grad_norm, "bad_steps": bad_steps, **per_row}
    return TrainState(params, opt_state, state.step + 1, bad_steps), metrics


def check_pieces(name: str, rows: int, micro_batches: int, length_buckets: int) -> None:
    """Refuse a config whose batches cannot be cut into their parts.

    Args:
      name: the config's field that holds the number of rows.
      rows: that number.
      micro_batches: parts that the rows are cut into.
      length_buckets: token budgets that an update is compiled for at most.

    Raises:
      ValueError: the parts do not divide the rows, or there is no budget.
    """
    if micro_batches < 1 or rows % micro_batches:
        raise ValueError(
            f"micro_batches={micro_batches} does not divide {name}={rows}; use a divisor of {rows}"
        )
    if length_buckets < 1:
        raise ValueError(f"length_buckets={length_buckets}; expected 1, which keeps all padding, or more")


class TooManyBadSteps(RuntimeError):
    """Too many updates in a row had to be refused."""


def check_bad_steps(metrics: dict[str, float], stage: str, limit: int) -> None:
    """Raise TooManyBadSteps if `limit` updates in a row had gradients that were not finite."""
    if metrics["bad_steps"] >= limit:
        raise TooManyBadSteps(
            f"the gradients of {int(metrics['bad_steps'])} updates in a row were not finite "
            f"(limit {limit}); lower the learning rate or raise {stage}.loop.max_bad_steps"
        )
