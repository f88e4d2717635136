import json

import pytest

from nla_jax.commands import explain
from nla_jax.files import as_path, write_text

TEXT = "The array has a shape and a type."


@pytest.fixture
def run_explain(untrained_export, tiny_model_dir, capsys):
    """Run the command on the untrained NLA; gives what it printed."""

    def run(*arguments: str):
        explain.main([str(untrained_export), "--target", str(tiny_model_dir), *arguments])
        return capsys.readouterr()

    return run


def test_json_holds_a_record_an_explanation(run_explain):
    found = json.loads(run_explain(TEXT, "--json").out)
    assert "".join(row["token"] for row in found) == TEXT
    assert [row["position"] for row in found] == list(range(len(found)))
    for row in found:
        assert -1 <= row["cosine"] <= 1 and row["fve_nrm"] <= 1 and "explanation" in row
        start, end = row["span"]
        assert TEXT[start:end] == row["token"]
    last = json.loads(run_explain(TEXT, "--json", "--position", "-2:", "--samples", "3").out)
    assert [row["position"] for row in last] == [len(found) - 2] * 3 + [len(found) - 1] * 3
    assert [row["sample"] for row in last] == [0, 1, 2] * 2


def test_printed_lines_say_what_is_measured_and_what_is_early(run_explain):
    printed = run_explain(TEXT, "--match", "array")
    lines = printed.out.splitlines()
    assert len(lines) % 2 == 0 and all("cosine" in line and "fve" in line for line in lines[::2])
    assert "fve is measured against the mean of 12 training activations" in printed.err
    count = len(lines) // 2
    assert f"{count} of {count} explanations are of tokens before position 50" in printed.err


def test_chats_are_read_through_the_template(run_explain):
    found = json.loads(run_explain("Hello there.", "--chat", "--role", "user", "--json").out)
    assert "".join(row["token"] for row in found) == "Hello there."
    assert {row["role"] for row in found} == {"user"}


def test_a_file_goes_on_where_it_was_stopped(run_explain, tmp_path):
    texts, out, page = tmp_path / "texts.jsonl", tmp_path / "out.jsonl", tmp_path / "page.html"
    rows = [{"id": name, "text": f"{name} {TEXT}"} for name in ("one", "two", "three")]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = "--file", str(texts), "--out", str(out), "--position", "-1"
    run_explain(*arguments)
    lines = out.read_text().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == ["one", "two", "three"]
    # Killed while the third line was being written.
    out.write_text("".join(lines[:2]) + lines[2][:20])
    printed = run_explain(*arguments, "--html", str(page))
    assert "2 of 3 texts were explained before" in printed.err
    assert out.read_text().splitlines(keepends=True) == lines
    assert "three" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mine.parquet",), "'mine.parquet' looks like the name of a file; give --file mine.parquet"),
        ((TEXT, "--position", "99"), "position 99 is outside the text: it has tokens 0 to"),
        ((TEXT, "--role", "assistant"), "no token has the role 'assistant'; the roles of this text are none"),
        ((TEXT, "--match", "("), "'\\(' is not a regular expression"),
        ((TEXT, "--samples", "0"), "samples is 0; at least one"),
    ],
)
def test_wrong_input_is_answered_in_a_line(run_explain, arguments, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run_explain(*arguments)


@pytest.mark.parametrize("arguments", [(), (TEXT, "--file", "x.jsonl"), (TEXT, "--out", "x.jsonl")])
def test_what_does_not_go_together_is_refused(run_explain, arguments):
    with pytest.raises(SystemExit) as stop:
        run_explain(*arguments)
    assert stop.value.code == 2


def test_texts_and_results_in_a_bucket(run_explain, bucket):
    rows = [{"id": name, "text": f"{name} {TEXT}"} for name in ("one", "two")]
    write_text(f"{bucket}/texts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    arguments = "--file", f"{bucket}/texts.jsonl", "--out", f"{bucket}/out.jsonl", "--position", "-1"
    run_explain(*arguments)
    lines = as_path(f"{bucket}/out.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == ["one", "two"]
    write_text(f"{bucket}/out.jsonl", lines[0])
    printed = run_explain(*arguments, "--html", f"{bucket}/pages/page.html")
    assert (
        "1 of 2 texts were explained before" in printed.err
        and "open gs://bucket/pages/page.html" in printed.err
    )
    assert as_path(f"{bucket}/out.jsonl").read_text() == "".join(lines)
    assert "two" in as_path(f"{bucket}/pages/page.html").read_text()
