from distributions import installed

from nla_jax.data.corpora import passages as module
from nla_jax.data.corpora.passages import LEAST_BYTES, MOST_CHARACTERS, files_of, is_clean, is_notice, joined


def test_parts_are_joined_until_a_text_is_long_enough():
    part = "x" * (LEAST_BYTES // 2)
    assert list(joined([part, part, part, part])) == [f"{part}\n\n{part}"] * 2
    assert list(joined([part, part, part], " ")) == [f"{part} {part}"]  # the third alone is too short
    assert list(joined(["é" * (LEAST_BYTES // 2)])) == ["é" * (LEAST_BYTES // 2)]  # two bytes each
    assert list(joined(["ab", "cd", "ef"], "-", least=5)) == ["ab-cd"]


def test_parts_that_are_too_long_are_left_out_and_none_makes_a_text_too_long():
    short, long = "s" * (LEAST_BYTES - 1), "l" * (MOST_CHARACTERS - 10)
    assert list(joined(["y" * (MOST_CHARACTERS + 1), " ", ""])) == []
    assert list(joined([short, long])) == [long]


def test_notices_placeholders_and_html_are_not_clean():
    assert is_notice("# Copyright 2020 Somebody") and is_notice("Licensed under the terms of a license")
    assert not is_notice("The right to read.")
    for text in ("Hello %(name)s", "%d items", "Dear ${user}", "{count} files", "<b>bold</b>", "a &amp; b"):
        assert not is_clean(text), text
    for text in ("50% of all people", "a < b and c > d", "{a, b} is a set", "It costs $5."):
        assert is_clean(text), text


def test_files_of_a_distribution_are_found_by_their_names(tmp_path):
    files = {"p/b/two.txt": "2", "p/b/one.txt": "a\tb\r\n", "p/one.py": "", "../outside.txt": "o"}
    package = installed(tmp_path / "site", "p", files)
    (tmp_path / "site" / "p" / "b" / "two.txt").unlink()
    ((name, path),) = files_of(package, r"/b/\w+\.txt$")
    assert name == "p/b/one.txt" and module.read_text(path) == "a   b\n"
    path.write_bytes(b"\xff")
    assert module.read_text(path) == ""
