import json
import shutil

import pytest

from nla_jax.commands.inspect import main


def test_texts_of_joint_training_are_printed_in_order(untrained_run, tmp_path, capsys):
    run = shutil.copytree(untrained_run.directory, tmp_path / "run")
    row = {"id": "doc@60", "place": "inside", "context_tail": "end", "writer_text": None, "cosine": 0.5}
    lines = [
        {"stage": "rl", "step": step, "rows": [row | {"text": text}]}
        for step, text in ((0, "a b"), (4, "a c"))
    ]
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    main([str(run), "--texts"])
    printed = capsys.readouterr().out
    assert printed.endswith("doc@60, inside: ...'end'\n  0 (cosine 0.50): a b\n  4 (cosine 0.50): a [c]\n")


def test_a_run_that_kept_no_texts_says_so(untrained_run):
    with pytest.raises(SystemExit, match=r"error: .* holds no texts of joint training \(history\.jsonl\)"):
        main([str(untrained_run.directory), "--texts"])
