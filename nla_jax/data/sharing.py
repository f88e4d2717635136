"""Data sets to share: with a data card, and with their vectors, or with what tells whether vectors that somebody
computes anew are the same.

Letters: N rows, D width of the vectors, S numbers of a sketch.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jaxtyping import Float32

from nla_jax.data.dataset import load_dataset
from nla_jax.data.manifest import FILE_NAME
from nla_jax.data.shards import shards_of, sidecar_of
from nla_jax.data.sidecar import Sidecar, sidecar_path_for
from nla_jax.data.summary import datasets_at
from nla_jax.files import AnyPath, Place, as_path, local_copy, write_atomically, write_text

SKETCH = 8
"""Numbers of the sketch of a vector's direction."""
CHECKS = ("vector_norm", "vector_sketch", "vector_digest")
"""The columns that stand in place of a vector."""
TOLERANCE = 0.02
"""How far the norm (as a share) and the direction (as a distance of unit vectors) of a vector that is computed anew may
lie from the shared one. Float32 on another machine differs by about 0.00001, bfloat16 by about 0.005."""
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def sketches(vectors_ND: Float32[np.ndarray, "N D"]) -> Float32[np.ndarray, "N S"]:
    """A few numbers for each vector's direction, whose mean squared difference estimates that of unit vectors.

    They are sums of the unit vector's entries with signs that come from a hash, and so are the same everywhere.
    """
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    width = vectors_ND.shape[1]
    bits = np.frombuffer(hashlib.shake_256(b"nla_jax sketch").digest(-(-SKETCH * width // 8)), np.uint8)
    signs_SD = 2.0 * np.unpackbits(bits)[: SKETCH * width].reshape(SKETCH, width) - 1
    return (vectors_ND / np.maximum(norms_N1, 1e-30) @ signs_SD.T).astype(np.float32)


def vector_digests(vectors_ND: Float32[np.ndarray, "N D"]) -> list[str]:
    """A hash of each vector's bits in float32."""
    rows = np.ascontiguousarray(vectors_ND, "<f4")
    return [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows]


def share(place: Place, out: Place, *, with_vectors: bool, license_name: str) -> list[str]:
    """Write data sets to share: their shards with sidecars in a folder each, and a card.

    Args:
      place: a shard, a folder of them or of such folders, or a run directory.
      out: folder that is written; shards that are there already are not written again.
      with_vectors: otherwise a norm, a sketch and a digest stand in each vector's place, and the config of the run in
        the folder tells how vectors are computed anew. This needs a run directory.
      license_name: of the data, as the hub spells it, such as cc-by-4.0; `other` if there is none yet.

    Returns:
      The names of the data sets.

    Raises:
      FileNotFoundError: there are no data sets.
      ValueError: vectors that cannot be computed anew, since no run of a corpus made them.
    """
    place, out = as_path(place), as_path(out)
    found = datasets_at(place)
    if not with_vectors:
        _check_recomputable(place)
    out.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "data/texts.json"):
        if (place / file).is_file():
            write_text(out / Path(file).name, (place / file).read_text(encoding="utf-8"))
    sidecars = {}
    for name, path in found.items():
        (out / name).mkdir(exist_ok=True)
        for shard in shards_of(path):
            sidecars[name] = sidecar = sidecar_of(shard)
            target = out / name / shard.name
            if not sidecar_path_for(target).exists():
                (_copy if with_vectors else _without_vectors)(shard, target)
                sidecar.save(sidecar_path_for(target))
        if with_vectors and path.is_dir() and (path / FILE_NAME).is_file():
            write_text(out / name / FILE_NAME, (path / FILE_NAME).read_text(encoding="utf-8"))
    write_text(out / "README.md", _card(out, sidecars, with_vectors, license_name))
    return list(found)


def _check_recomputable(place: AnyPath) -> None:
    config = place / "config.json"
    if not config.is_file():
        raise ValueError(
            f"{place} is not the directory of a run: nothing tells how its vectors are computed anew; give the run's "
            "directory, or share the vectors too"
        )
    if any((json.loads(config.read_bytes()).get("data") or {}).values()):
        raise ValueError(
            f"the run at {place} took its vectors from data sets made elsewhere (data.av_sft), and cannot compute them "
            "anew; share the vectors too"
        )


def _copy(shard: AnyPath, target: AnyPath) -> None:
    with local_copy(shard) as file, write_atomically(target) as temporary:
        shutil.copyfile(file, temporary)


def _without_vectors(shard: AnyPath, target: AnyPath) -> None:
    """Write a shard with what tells its vectors in their place."""
    vectors_ND = load_dataset(shard).activations
    with local_copy(shard) as file:
        names = [name for name in pq.read_schema(file).names if name != "activation_vector"]
        table = pq.read_table(file, columns=names)
    flat = pa.array(sketches(vectors_ND).ravel())
    checks = {
        "vector_norm": pa.array(np.linalg.norm(vectors_ND, axis=1).astype(np.float32)),
        "vector_sketch": pa.FixedSizeListArray.from_arrays(flat, SKETCH),
        "vector_digest": pa.array(vector_digests(vectors_ND)),
    }
    for name, column in checks.items():
        table = table.append_column(name, column)
    with write_atomically(target) as temporary:
        pq.write_table(table, temporary)


def _card(out: AnyPath, sidecars: Mapping[str, Sidecar], with_vectors: bool, license_name: str) -> str:
    """The data card: a README with a head that the hub reads."""
    about = next(iter(sidecars.values()))
    counts = {name: _rows(out / name) for name in sidecars}
    total = sum(counts.values())
    head = {
        "license": license_name,
        "pretty_name": f"Activations of {about.extraction.base_model}, layer {about.extraction.layer_index}",
        "tags": ["interpretability", "activations", "natural-language-autoencoder"],
        "size_categories": [next((name for bound, name in _SIZES if total < bound), "n>1M")],
        "configs": [{"config_name": name, "data_files": f"{name}/*.parquet"} for name in sidecars],
    }
    report = json.loads((out / "texts.json").read_bytes()) if (out / "texts.json").is_file() else {}
    lines = [f"| {name} | {one.stage} | {counts[name]} |" for name, one in sidecars.items()]
    vectors = _WITH_VECTORS if with_vectors else _WITHOUT_VECTORS.format(tolerance=TOLERANCE)
    return _CARD.format(
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True),
        name=head["pretty_name"],
        model=about.extraction.base_model,
        layer=about.extraction.layer_index,
        width=about.extraction.d_model,
        lines="\n".join(lines),
        vectors=vectors,
        corpus=about.extraction.corpus,
        documents=about.extraction.corpus_documents or "an unknown number of",
        digest=about.extraction.corpus_digest or "not recorded",
        writer=_written_by(report or next((one.texts for one in sidecars.values() if one.texts), {})),
        commit=about.git_commit or "unknown",
        license=license_name,
    )


def _rows(folder: AnyPath) -> int:
    return sum(sidecar_of(shard).row_count for shard in shards_of(folder))


def _written_by(report: Mapping[str, Any]) -> str:
    """A sentence about the writer of the texts."""
    if not report:
        return "Nothing was recorded about the writer of the texts, if there are any."
    model = f", the chat model {report['model']}" if report.get("model") else ""
    instruction = report.get("instruction") or {}
    told = (
        f", by the instruction {instruction['name']} (digest {instruction['digest']})" if instruction else ""
    )
    counts = (
        f" Of {report['rows']} rows {report['written']} have a text; the others were left out."
        if "written" in report
        else ""
    )
    return f"The texts were written by the writer {report.get('writer', 'unknown')}{model}{told}.{counts}"


_CARD = """---
{head}---
# {name}

Rows pair an activation of a language model with the text up to that token, and where there is one with a text that
explains it. They train and measure Natural Language Autoencoders.

| | |
| --- | --- |
| model | `{model}` |
| layer | {layer}: the residual stream after this block, counted from 0 |
| width | {width} |
| corpus | `{corpus}`, {documents} documents, digest `{digest}` |
| made by | nla_jax, commit `{commit}` |
| license | {license} |

| data set | stage | rows |
| --- | --- | --- |
{lines}

Documents are divided among the splits by a hash of their ids, so that no document is in two of them. Beside each file
lies a sidecar (`.nla_meta.yaml`) that says what its columns and token ids mean.

## Texts

{writer}

## Vectors

{vectors}
"""
_WITH_VECTORS = """`activation_vector` is raw and never normalized. In files whose sidecar says
`storage: bfloat16` a vector is a binary of two little-endian bytes a number."""
_WITHOUT_VECTORS = """The vectors are not part of this data set. In their place each row has `vector_norm`,
`vector_sketch` (sums of the unit vector's entries with fixed signs) and `vector_digest` (of its bits in float32). This
computes them anew from the corpus and the model, and checks them row by row:

```sh
nla data rebuild FOLDER -o REBUILT
```

Other machines round otherwise. A row agrees if its norm and its direction lie within {tolerance} of the shared ones;
rows that do not are named."""
