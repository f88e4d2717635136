import json

import pytest

from nla_jax.files import write_atomically, write_json


def test_the_file_is_the_old_one_until_the_block_ends(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with write_atomically(path) as temporary:
        temporary.write_text("new")
        assert (path.read_text(), temporary.parent) == ("old", tmp_path)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with pytest.raises(KeyError), write_atomically(path) as temporary:
        temporary.write_text("half")
        raise KeyError("figures")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_reads_back(tmp_path):
    write_json(tmp_path / "a.json", {"steps": [1, 2], "loss": 0.5})
    assert json.loads((tmp_path / "a.json").read_text()) == {"steps": [1, 2], "loss": 0.5}
