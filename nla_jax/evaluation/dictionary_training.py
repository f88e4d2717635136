"""Training a small sparse dictionary on the activations of a run: the recipe, one pure step, and the loop around it.

A TopK autoencoder (Gao et al. 2024, https://arxiv.org/abs/2406.04093): inputs scaled to norm √d, a bias that is
subtracted before and added after, decoder directions of unit norm, and an auxiliary loss through which features that
have not been active for long learn what the others leave over. Shape letters: B rows of a batch, D model, F features.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from nla_jax.autoencoder import metrics
from nla_jax.autoencoder.yardstick import row_chunks
from nla_jax.evaluation.dictionaries import SparseDictionary
from nla_jax.process import progress_bar
from nla_jax.randomness import key_for

Params = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class DictionaryConfig:
    """The recipe of a small dictionary."""

    width: int = 8
    """Number of features for each coordinate of the residual stream."""
    k: int = 32
    """Number of features that are active together."""
    steps: int = 1000
    batch_size: int = 512
    """Rows of an update; at most as many as there are."""
    learning_rate: float = 1e-3
    """Of Adam, after a warm-up over a twentieth of the steps; it decays to zero over the last fifth."""
    idle_rows: int = 20_000
    """A feature that was not active in so many rows is dead, and learns by the auxiliary loss."""
    auxiliary_k: int = 64
    """Number of dead features that rebuild together what the others leave over."""
    auxiliary_weight: float = 1 / 32
    """Weight of the auxiliary loss beside the error of the reconstruction."""

    def __post_init__(self):
        for name in ("width", "k", "steps", "batch_size", "idle_rows", "auxiliary_k"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} of a dictionary is {getattr(self, name)}; expected a positive number"
                )
        if not self.learning_rate > 0:
            raise ValueError(
                f"learning_rate of a dictionary is {self.learning_rate}; expected a positive number"
            )

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with the schedule of `learning_rate`."""
        warmup, decay = max(self.steps // 20, 1), max(self.steps // 5, 1)
        rates = (
            optax.linear_schedule(0, self.learning_rate, warmup),
            optax.constant_schedule(self.learning_rate),
            optax.linear_schedule(self.learning_rate, 0, decay),
        )
        return optax.adam(optax.join_schedules(rates, (warmup, max(self.steps - decay, warmup))))


@flax.struct.dataclass
class DictionaryState:
    """A dictionary in training.

    Attributes:
      params: W_enc (D, F), b_enc (F,), W_dec (F, D), b_dec (D,).
      moments: the optimizer's.
      idle_F: rows since each feature was last active.
    """

    params: Params
    moments: optax.OptState
    idle_F: Int[Array, "F"]


def initial_state(config: DictionaryConfig, mean_D: Float[Array, "D"], key: Array) -> DictionaryState:
    """Random unit directions, an encoder that is their transpose, and the mean of normalized activations as bias."""
    D = len(mean_D)
    decode_FD = _unit_rows(jax.random.normal(key, (config.width * D, D)))
    params = {
        # A copy, since a state is donated and one buffer cannot be donated twice.
        "W_enc": jnp.array(decode_FD.T),
        "b_enc": jnp.zeros(len(decode_FD)),
        "W_dec": decode_FD,
        "b_dec": jnp.asarray(mean_D),
    }
    moments = config.optimizer().init(params)
    return DictionaryState(params, moments, jnp.zeros(len(decode_FD), jnp.int32))


def dictionary_step(
    state: DictionaryState, activations_BD: Float[Array, "B D"], *, config: DictionaryConfig
) -> tuple[DictionaryState, dict[str, Array]]:
    """One update on raw activations.

    Returns:
      The new state, and metrics: `loss` (the mean square error a coordinate, where inputs have mean square 1),
      `auxiliary` (the same of the dead features, for what is left over) and `dead`, the share of dead features.
    """
    inputs_BD = metrics.normalize(activations_BD)
    is_dead_F = state.idle_F >= config.idle_rows

    def loss(params: Params) -> tuple[Array, tuple[Array, Array, Array]]:
        before_BF = (inputs_BD - params["b_dec"]) @ params["W_enc"] + params["b_enc"]
        code_BF = _top(before_BF, config.k)
        residual_BD = inputs_BD - code_BF @ params["W_dec"] - params["b_dec"]
        error = jnp.mean(residual_BD**2)
        left_BD = jax.lax.stop_gradient(residual_BD)

        def of_dead_features() -> Array:
            dead_BF = _top(jnp.where(is_dead_F, before_BF, 0), config.auxiliary_k)
            return jnp.mean((left_BD - dead_BF @ params["W_dec"]) ** 2)

        # Most steps have no dead feature, and then none of this is computed.
        auxiliary = jax.lax.cond(is_dead_F.any(), of_dead_features, lambda: jnp.zeros(()))
        return error + config.auxiliary_weight * auxiliary, (error, auxiliary, (code_BF > 0).any(axis=0))

    (_, (error, auxiliary, is_active_F)), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, moments = config.optimizer().update(gradient, state.moments)
    params = optax.apply_updates(state.params, updates)
    params["W_dec"] = _unit_rows(params["W_dec"])
    idle_F = jnp.where(is_active_F, 0, state.idle_F + len(activations_BD))
    measured = {"loss": error, "auxiliary": auxiliary, "dead": is_dead_F.mean()}
    return DictionaryState(params, moments, idle_F), measured


def _top(before_BF: Array, k: int) -> Array:
    """The k greatest of each row where they are positive, 0 elsewhere."""
    k = min(k, before_BF.shape[1])
    least_B1 = jax.lax.top_k(jax.lax.stop_gradient(before_BF), k)[0][:, -1:]
    return jnp.where((before_BF >= least_B1) & (before_BF > 0), before_BF, 0)


def _unit_rows(rows_FD: Array) -> Array:
    return rows_FD / jnp.linalg.norm(rows_FD, axis=1, keepdims=True)


def train_dictionary(
    activations_ND: Float[np.ndarray, "N D"], config: DictionaryConfig, *, seed: int, source: str
) -> tuple[SparseDictionary, dict[str, float]]:
    """Train a dictionary on raw activations.

    Args:
      activations_ND: the training rows.
      config: the recipe.
      seed: decides the first directions and the order of the rows.
      source: where the rows come from, for reports.

    Returns:
      The dictionary, and the metrics of the last step.

    Raises:
      ValueError: fewer rows than features are active together, more active features than there are, or a loss that is
        not finite.
    """
    N, D = activations_ND.shape
    if config.k > config.width * D:
        raise ValueError(f"k={config.k} features of {config.width * D} cannot be active together; lower k")
    if config.k >= N:
        raise ValueError(
            f"there are {N} training rows for a dictionary of k={config.k} active features; extract more rows"
        )
    sums_D = sum(
        metrics.normalize(rows_BD).sum(axis=0, dtype=np.float64) for rows_BD in row_chunks(activations_ND)
    )
    state = initial_state(config, jnp.asarray(sums_D / N, jnp.float32), key_for(seed, "dictionary"))
    step = jax.jit(functools.partial(dictionary_step, config=config), donate_argnums=0)
    rng, batch_size, measured = np.random.default_rng(seed), min(config.batch_size, N), {}
    order = np.empty(0, int)
    with progress_bar("dictionary", config.steps, "step") as bar:
        for _ in range(config.steps):
            if len(order) < batch_size:
                order = rng.permutation(N)
            chosen, order = order[:batch_size], order[batch_size:]
            state, measured = step(state, activations_ND[chosen])
            bar.update(1)
    last = {name: float(value) for name, value in measured.items()}
    if not np.isfinite(last["loss"]):
        raise ValueError(
            f"the loss of the dictionary is {last['loss']}; lower learning_rate={config.learning_rate}"
        )
    arrays = {name: np.asarray(value) for name, value in state.params.items()}
    dictionary = SparseDictionary(
        encode_DF=arrays["W_enc"],
        encode_bias_F=arrays["b_enc"],
        decode_FD=arrays["W_dec"],
        decode_bias_D=arrays["b_dec"],
        source=source,
        k=config.k,
        normalization="constant_norm_rescale",
    )
    return dictionary, last
