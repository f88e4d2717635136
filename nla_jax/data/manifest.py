"""The manifest of a data set: the file of a folder of shards that says that they are all there, and which they are.

It is written after the last shard. With it a data set of thousands of shards opens without its sidecars being read one
by one, and a shard that is missing is noticed.
"""

import dataclasses
import json
from collections.abc import Sequence

from nla_jax.data.shards import Shard, sha256_of, shards_of, sidecar_of
from nla_jax.data.sidecar import sidecar_path_for
from nla_jax.files import AnyPath, Place, as_path, local_copy, write_text

FILE_NAME = "manifest.json"
KIND = "nla_manifest"


@dataclasses.dataclass(frozen=True)
class ListedShard:
    """What a manifest says of a shard."""

    name: str
    """Its file in the folder."""
    group_rows: tuple[int, ...]
    """The number of rows of each row group."""
    bytes: int | None
    """Size of the file; None where its sidecar does not tell, like the digest."""
    sha256: str | None
    """SHA-256 of the file, as hexadecimal digits."""

    @property
    def rows(self) -> int:
        """The number of its rows."""
        return sum(self.group_rows)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The shards of a complete data set, in their order."""

    dataset_id: str
    """The digest of the config that the data set was made with, as in the shards' sidecars."""
    rows: int
    shards: tuple[ListedShard, ...]

    @classmethod
    def load(cls, folder: Place) -> "Manifest | None":
        """Read the manifest of a folder; None where it has none, as a data set in the making, or of other writers.

        Raises:
          ValueError: the file is not a manifest.
        """
        path = as_path(folder) / FILE_NAME
        if not path.is_file():
            return None
        try:
            fields = json.loads(path.read_bytes())
            if fields["kind"] != KIND:
                raise ValueError(f"kind is {fields['kind']!r}, expected {KIND!r}")
            shards = tuple(
                ListedShard(s["name"], tuple(s["group_rows"]), s.get("bytes"), s.get("sha256"))
                for s in fields["shards"]
            )
            return cls(fields["dataset_id"], fields["rows"], shards)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not the manifest of a data set ({error!r}); copy it again, or delete it to have the "
                "folder read shard by shard"
            ) from error

    @classmethod
    def of(cls, folder: Place) -> "Manifest":
        """List the shards of a folder, of which the sidecars and footers are read.

        Raises:
          FileNotFoundError, ValueError: as `shards_of`, `sidecar_of` and `Shard`; or the shards are of several
            data sets.
        """
        listed, ids = [], set()
        for path in shards_of(folder):
            sidecar = sidecar_of(path)
            ids.add(sidecar.dataset_id)
            groups = tuple(Shard(path, sidecar).group_rows)
            listed.append(ListedShard(path.name, groups, sidecar.file_bytes, sidecar.file_sha256))
        if len(ids) > 1:
            raise ValueError(
                f"the shards in {folder} were written with several configs (digests {', '.join(sorted(ids))}); "
                "delete those of the other configs"
            )
        return cls(ids.pop(), sum(shard.rows for shard in listed), tuple(listed))

    def save(self, folder: Place) -> None:
        """Write `manifest.json` into a folder, atomically."""
        shards = [
            {
                "name": s.name,
                "rows": s.rows,
                "group_rows": s.group_rows,
                "bytes": s.bytes,
                "sha256": s.sha256,
            }
            for s in self.shards
        ]
        fields = {"kind": KIND, "dataset_id": self.dataset_id, "rows": self.rows, "shards": shards}
        write_text(as_path(folder) / FILE_NAME, json.dumps(fields, indent=1))


def check_complete(folder: AnyPath, manifest: Manifest, names: Sequence[str]) -> None:
    """Compare the shards that are in a folder with those of its manifest.

    Raises:
      ValueError: shards are missing, or there are others.
    """
    listed = {shard.name for shard in manifest.shards}
    missing, others = sorted(listed - set(names)), sorted(set(names) - listed)
    problems = [
        f"{len(some)} {what}, the first is {some[0]}"
        for some, what in ((missing, "are missing"), (others, "are not in the manifest"))
        if some
    ]
    if problems:
        raise ValueError(
            f"of the {len(listed)} shards of {folder}, {' and '.join(problems)}; copy the data set again, or make it "
            "again from its config"
        )


def verify_dataset(path: Place) -> int:
    """Read all bytes of a data set and compare them with the digests in its manifest and sidecars.

    Args:
      path: a shard, or a folder of them.

    Returns:
      The number of shards that have a digest and were compared.

    Raises:
      FileNotFoundError: no such path, or a shard without its sidecar.
      ValueError: every shard that disagrees is named, with what to do.
    """
    folder, compared, damaged = as_path(path), 0, []
    paths = shards_of(folder)
    manifest = Manifest.load(folder) if folder.is_dir() else None
    if manifest is not None:
        check_complete(folder, manifest, [shard.name for shard in paths])
    listed = {shard.name: shard.sha256 for shard in manifest.shards} if manifest is not None else {}
    for shard in paths:
        digests = {sidecar_of(shard).file_sha256, listed.get(shard.name)} - {None}
        if not digests:
            continue
        compared += 1
        with local_copy(shard) as file:
            if digests != {sha256_of(file)}:
                damaged.append(shard)
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {compared} shards do not have the digest that they were written with: "
            f"{', '.join(map(str, damaged))}; copy them again, or delete each with its sidecar "
            f"({sidecar_path_for(damaged[0]).name}) and run the command that wrote it again"
        )
    return compared
