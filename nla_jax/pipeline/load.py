"""From whatever holds a trained NLA to an `NLA`: a run, an export, adapters, directories, hub ids, or the demo."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.nla import NLA
from nla_jax.autoencoder.round_trip import RoundTrip
from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.files import AnyPath, Place, as_path
from nla_jax.interop.meta import FILE_NAME as META_FILE
from nla_jax.interop.meta import NLAMeta, OwnSettings
from nla_jax.interop.model_directories import load_reconstructor, load_verbalizer
from nla_jax.lm.files.peft import ADAPTER_CONFIG, peft_base
from nla_jax.lm.files.sources import resolve
from nla_jax.lm.files.weights import StorageDtype, load_language_model
from nla_jax.lm.language_model import LanguageModel
from nla_jax.lm.transformer import stack_blocks
from nla_jax.sharding.aliasing import jit_aliasing
from nla_jax.sharding.mesh import MeshConfig, make_mesh
from nla_jax.shipped import demo_directory

Source = Place
LONGEST_EXPLANATION, LONGEST_RECONSTRUCTOR_PROMPT = 200, 256
"""Tokens of an answer and of an AR prompt, for models that do not say what they were trained with."""


def load(
    source: Source,
    *,
    ar: Source | None = None,
    target: Source | None = None,
    judge: Source | None = None,
    dtype: StorageDtype = "float32",
    mesh: Mesh | None = None,
    stage: Literal["rl", "warm_start"] | None = None,
    step: int | None = None,
    scan_blocks: bool | None = None,
    quiet: bool = False,
) -> NLA:
    """Load a trained NLA.

    Args:
      source: a run directory; a directory with av/ and ar/ in it, as `nla convert` writes; the directory or hub id of
        an AV alone, or with `ar`; or "demo", the adapters that come with the library.
      ar: directory or hub id of the AR that belongs to the AV.
      target: the LM that is explained, where neither a run nor adapters name it; needed for `activations` alone.
      judge: directory or hub id of a further AR, which judges beside the NLA's own; runs bring their own.
      dtype: what weights are kept in. bfloat16 computes in bfloat16 as well; float32 computes as the NLA was trained.
      mesh: where weights go, by the partition rules; one device if None.
      stage: of a run, joint training or the two warm starts; what there is if None.
      step: of a run's joint training; the best round by the judge if None.
      scan_blocks: whether programs loop over stacked blocks, which compiles several times faster and runs slower; on
        CPU alone if None.
      quiet: whether nothing is told on stderr of what was loaded.

    Raises:
      FileNotFoundError: nothing of the kind at `source`, or a run that has trained nothing yet.
      ValueError: an AV and an AR of different models or layers, arguments that do not go together, or files that cannot
        be read.
    """
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    where = _Where(mesh, dtype, scan_blocks)
    path = demo_directory() if str(source) == "demo" else as_path(source)
    if _is_run(path):
        if given := [name for name, value in (("ar", ar), ("target", target)) if value is not None]:
            raise ValueError(f"{path} is a run, which has its own models; leave {' and '.join(given)} out")
        nla = _from_run(path, where, stage, step)
    else:
        if stage is not None or step is not None:
            raise ValueError(f"{source} is not a run, so it has no stage and no step; leave them out")
        if (path / "av" / META_FILE).is_file():
            pair = path / "av", ar or path / "ar"
        elif path.is_dir() and not (path / META_FILE).is_file():
            raise FileNotFoundError(
                f"{path} holds no NLA: it is no run (no config.json with a checkpoints/ folder), no export (no "
                f"av/{META_FILE}) and no model of an NLA (no {META_FILE}); give one of these, or a hub id"
            )
        else:
            pair = source, ar
        nla = _from_directories(pair[0], pair[1], target, where)
        nla = dataclasses.replace(nla, name=str(source))
    if judge is not None:
        nla = dataclasses.replace(nla, judges={**nla.judges, "judge": _judge(judge, nla, where)})
    if not quiet:
        print(nla.description, file=sys.stderr)
    return nla


@dataclasses.dataclass(frozen=True)
class _Where:
    """Where weights go and in which form."""

    mesh: Mesh
    dtype: StorageDtype
    scan_asked: bool | None

    @property
    def scan(self) -> bool:
        """Whether blocks are stacked: as asked, else on CPU, where compiling takes longer than explaining."""
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return on_cpu if self.scan_asked is None else self.scan_asked

    def compute_dtype(self, trained: str | None) -> str:
        """What products are computed in, given what they were computed in during training."""
        return "bfloat16" if self.dtype == "bfloat16" else trained or "float32"

    def formed(self, params: Any) -> Any:
        """Parameters in the dtype and with the blocks stacked that are asked for."""
        if self.dtype == "bfloat16":
            params = _halved(params)
        if not self.scan:
            return params
        try:
            shapes = jax.eval_shape(stack_blocks, params)
        except ValueError:  # blocks that differ in more than their numbers cannot be stacked
            if self.scan_asked:
                raise
            return params
        if jax.tree.structure(shapes) == jax.tree.structure(params):
            return params
        return jit_aliasing(stack_blocks)(params)

    def language_model(
        self, spec: Source, trained: str | None, last_layer: int | None = None
    ) -> LanguageModel:
        """A language model up to a layer, or all of it, that computes as the NLA was trained."""
        lm = load_language_model(spec, mesh=self.mesh, dtype=self.dtype, last_layer=last_layer)
        config = dataclasses.replace(lm.config, dtype=self.compute_dtype(trained))
        return dataclasses.replace(lm, config=config, params=self.formed(lm.params))


@jit_aliasing
def _halved(params: Any) -> Any:
    """Weights in bfloat16, those that are so already as the same arrays: adapters share them with the target.

    An AR's head and an AV's affine map stay float32, where small updates live.
    """
    kept = {name: part for name, part in params.items() if name in ("head", "affine")}
    return jax.tree.map(lambda x: x.astype("bfloat16"), params) | kept


def _is_run(path: AnyPath) -> bool:
    return (path / "config.json").is_file() and (
        (path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file()
    )


def _from_run(path: AnyPath, where: _Where, stage: str | None, step: int | None) -> NLA:
    # Whatever trains takes a second to import, which models in directories need not wait for.
    from nla_jax.config import read_config
    from nla_jax.pipeline.export import trained_step
    from nla_jax.pipeline.run import Run

    config = read_config(path / "config.json")
    run = Run(config, path, mesh=where.mesh)
    models, layer = run.models, config.model.layer
    if stage is None:
        warm_started = all(run.checkpoints(f"{model}_sft").latest() for model in ("av", "ar"))
        stage = "warm_start" if warm_started and run.best_step() is None else "rl"
    step = trained_step(run, stage, step)
    stages = {model: "rl" if stage == "rl" else models.warm_start_stage(model) for model in ("av", "ar")}

    def params(model: str) -> Any:
        return where.formed(models.model_params(stages[model], model, step))

    autoencoder = _computing_in(models.autoencoder, where.compute_dtype(config.model.dtype))
    nla = NLA(
        name=str(path),
        autoencoder=autoencoder,
        av_params=params("av"),
        ar_params=params("ar"),
        layer=layer,
        mesh=where.mesh,
        load_target=_target_of_run(models, where),
        yardstick=run.yardstick,
        min_position=config.extraction.min_position,
        batch_size=config.evaluation.batch_size,
        scan_blocks=where.scan,
    )
    if stage == "warm_start":
        return nla
    judge_params = functools.cache(lambda: where.formed(models.warm_start_params("ar")))
    return dataclasses.replace(
        nla, judges={"judge": lambda texts: nla.round_trip.reconstruct(judge_params(), texts)}
    )


def _from_directories(av: Source, ar: Source | None, target: Source | None, where: _Where) -> NLA:
    av_path, ar_path = resolve(av), None if ar is None else resolve(ar)
    adapted = {path: (path / ADAPTER_CONFIG).is_file() for path in (av_path, ar_path) if path is not None}
    if target is None and adapted[av_path]:
        target = peft_base(av_path)
    own = NLAMeta.load(av_path, role="av").own or _NOTHING_RECORDED
    base = None
    if any(adapted.values()):
        base = where.language_model(target or peft_base(ar_path), own.dtype)
    loading = {
        "mesh": where.mesh,
        "dtype": where.compute_dtype(own.dtype),
        "params_dtype": where.dtype,
    }
    verbalizer = load_verbalizer(av_path, base=base if adapted[av_path] else None, **loading)
    reconstructor = None
    if ar_path is not None:
        reconstructor = load_reconstructor(ar_path, base=base if adapted[ar_path] else None, **loading)
        _check_pair(av_path, verbalizer.meta, ar_path, reconstructor.meta)
    layer = verbalizer.meta.layer if reconstructor is None else reconstructor.meta.layer
    autoencoder = Autoencoder(
        verbalizer.tokenizer,
        verbalizer.verbalizer,
        None if reconstructor is None else reconstructor.reconstructor,
        own.max_explanation_tokens or LONGEST_EXPLANATION,
        own.max_reconstructor_tokens or LONGEST_RECONSTRUCTOR_PROMPT,
    )
    if base is not None:
        load_target: Callable[[bool], LanguageModel] = _checked(lambda whole: base, verbalizer.meta)
    elif target is not None:
        read = functools.cache(
            lambda whole: where.language_model(target, own.dtype, None if whole else layer)
        )
        load_target = _checked(read, verbalizer.meta)
    else:
        load_target = _no_target(av)
    return NLA(
        name=str(av),
        autoencoder=autoencoder,
        av_params=where.formed(verbalizer.params),
        ar_params=None if reconstructor is None else where.formed(reconstructor.params),
        layer=layer,
        mesh=where.mesh,
        load_target=load_target,
        yardstick=None if ar_path is None else Yardstick.load(ar_path),
        min_position=own.min_position,
        scan_blocks=where.scan,
    )


_NOTHING_RECORDED = OwnSettings("", "", True, -1, "replace", False, 1.0)
"""Stands for the settings of models that others have trained, as far as lengths and positions go."""


def _check_pair(av: Path, av_meta: NLAMeta, ar: Path, ar_meta: NLAMeta) -> None:
    """Refuse an AV and an AR of different models or layers."""
    pairs = {"d_model": (av_meta.d_model, ar_meta.d_model)}
    if av_meta.layer is not None:
        pairs["layer"] = (av_meta.layer, ar_meta.layer)
    if wrong := [f"{name}: AV {a}, AR {b}" for name, (a, b) in pairs.items() if a != b]:
        raise ValueError(f"{av} and {ar} do not belong together: {'; '.join(wrong)}; give the AR of this AV")


def _target_of_run(models: Any, where: _Where) -> Callable[[bool], LanguageModel]:
    """What reads the LM that a run explains, given the run's `Models`; adapters hold it already, and share it."""
    model = models.config.model

    @functools.cache
    def read(whole: bool) -> LanguageModel:
        if models.config.lora.rank:
            lm = models.target
        else:
            lm = where.language_model(model.path, model.dtype, None if whole else model.layer)
        config = dataclasses.replace(model.applied(lm.config), dtype=where.compute_dtype(model.dtype))
        return dataclasses.replace(lm, config=config)

    return read


def _checked(load_target: Callable[[bool], LanguageModel], meta: NLAMeta) -> Callable[[bool], LanguageModel]:
    """What reads the explained LM, refusing a model of another width than the NLA's."""

    def read(whole: bool) -> LanguageModel:
        lm = load_target(whole)
        if lm.config.d_model != meta.d_model:
            raise ValueError(
                f"the target {lm.name} has d_model {lm.config.d_model}, the AV reads {meta.d_model}; name the model "
                "that AV and AR were trained from"
            )
        return lm

    return read


def _no_target(av: Source) -> Callable[[bool], LanguageModel]:
    def read(whole: bool) -> LanguageModel:
        raise ValueError(
            f"{av} does not say which language model it explains; name it: nla_jax.load(..., target=...), or --target "
            "on the command line. Vectors of your own are explained without it"
        )

    return read


def _computing_in(autoencoder: Autoencoder, dtype: str) -> Autoencoder:
    """An autoencoder whose models multiply in another dtype."""

    def changed(model: Any) -> Any:
        return dataclasses.replace(model, config=dataclasses.replace(model.config, dtype=dtype))

    return dataclasses.replace(
        autoencoder,
        verbalizer=changed(autoencoder.verbalizer),
        reconstructor=changed(autoencoder.reconstructor),
    )


def _judge(judge: Source, nla: NLA, where: _Where) -> Callable:
    """A further AR in a directory of its own, as a function from texts to vectors."""
    path = resolve(judge)
    base = nla.load_target(True) if (path / ADAPTER_CONFIG).is_file() else None
    dtype = nla.autoencoder.verbalizer.config.dtype
    loaded = load_reconstructor(path, base=base, mesh=where.mesh, dtype=dtype, params_dtype=where.dtype)
    autoencoder = dataclasses.replace(
        nla.autoencoder, tokenizer=loaded.tokenizer, reconstructor=loaded.reconstructor
    )
    round_trip = RoundTrip(autoencoder, where.mesh, nla.batch_size, scan=where.scan)
    params = where.formed(loaded.params)
    return lambda texts: round_trip.reconstruct(params, texts)
