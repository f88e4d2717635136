import json
import re

import pytest

from nla_jax.data.corpora import self_prompts as module
from nla_jax.data.corpora.self_prompts import ChatPrompt, SelfChatConfig, self_prompts


def test_built_in_prompts_are_thousands_all_different_and_chosen_by_the_seed():
    config = SelfChatConfig(documents=1500, turns=3)
    prompts = self_prompts("self:builtin", config, seed=0)
    assert len({prompt.id for prompt in prompts}) == len(prompts) == 1500
    assert {len(prompt.turns) for prompt in prompts} == {1, 2, 3}
    assert 0.2 < sum(prompt.system != "" for prompt in prompts) / 1500 < 0.4
    assert self_prompts("self:builtin", SelfChatConfig(documents=50, turns=3), seed=0) == prompts[:50]
    others = self_prompts("self:builtin", config, seed=1)
    assert len({prompt.turns[0] for prompt in prompts} - {prompt.turns[0] for prompt in others}) > 500


def test_every_name_in_a_template_has_fillers_and_every_filler_a_place():
    for language in module.built_in_templates().values():
        templates = [template for kind in language["kinds"].values() for template in kind]
        named = {name for template in templates for name in re.findall(r"\{(\w+)\}", template)}
        assert named == set(language["fillers"])
        texts = [*templates, *(text for values in language["fillers"].values() for text in values)]
        texts += [*language["systems"], *language["follow_ups"], *language["personas"], *language["styles"]]
        assert all(isinstance(text, str) and text.strip() for text in texts)


def test_no_brace_is_left_in_a_prompt():
    for prompt in self_prompts("self:builtin", SelfChatConfig(documents=500), seed=3):
        assert "{" not in prompt.turns[0]


def test_templates_that_are_used_up_end_the_prompts(monkeypatch):
    language = {
        "share": 1,
        "kinds": {"question": ["Is it {x}?"]},
        "fillers": {"x": ["a", "b", "c"]},
        "personas": [""],
        "styles": [""],
        "systems": [""],
        "follow_ups": ["Why?"],
    }
    monkeypatch.setattr(module, "built_in_templates", lambda: {"x": language})
    prompts = self_prompts("self:builtin", SelfChatConfig(turns=1), seed=0)
    assert {prompt.turns for prompt in prompts} == {("Is it a?",), ("Is it b?",), ("Is it c?",)}


def test_prompts_of_a_text_file_are_its_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffWhat is rain?\n\n  Who are you? \nWhat is rain?\n", encoding="utf-8")
    prompts = self_prompts(f"self:{path}", SelfChatConfig(), seed=0)
    assert sorted(prompt.turns for prompt in prompts) == [("What is rain?",), ("Who are you?",)]
    (chosen,) = self_prompts(f"self:{path}", SelfChatConfig(documents=1), seed=0)
    assert chosen == prompts[0]


def test_prompts_of_json_lines_bring_system_prompts_and_turns(tmp_path):
    path = tmp_path / "prompts.jsonl"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "said by another model"},
        {"role": "user", "content": "And now?"},
    ]
    rows = ["One", {"turns": ["Two", "Three", "Four"], "system": "Sing."}, {"messages": messages}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = self_prompts(f"self:{path}", SelfChatConfig(turns=2), seed=0)
    assert set(prompts) == {
        ChatPrompt("", ("One",)),
        ChatPrompt("Sing.", ("Two", "Three")),
        ChatPrompt("Be brief.", ("Hi", "And now?")),
    }


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("p.txt", b"\n \n", "the file holds no prompts"),
        ("p.txt", b"\xff\xfe", "is not UTF-8"),
        ("p.csv", b"a", "not from .csv"),
        ("p.jsonl", b'"a"\nb\n', "p.jsonl, line 2: this is not JSON"),
        ("p.jsonl", b'{"text": "a"}\n', 'p.jsonl, line 1: expected a text, {"system"'),
        ("p.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}]}\n', "with a turn of the user"),
        ("p.jsonl", b'{"turns": ["a", " "]}\n', "texts that are not blank"),
        ("p.jsonl", b"3\n", "line 1: expected a text"),
    ],
)
def test_files_that_are_no_prompts_are_refused_with_the_line(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(told)):
        self_prompts(f"self:{tmp_path / name}", SelfChatConfig(), seed=0)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*no\.txt; give .* or self:builtin"):
        self_prompts(f"self:{tmp_path / 'no.txt'}", SelfChatConfig(), seed=0)


def test_languages_are_chosen_by_name():
    config = SelfChatConfig(documents=60, languages=("german",))
    german = module.built_in_templates()["german"]
    for prompt in self_prompts("self:builtin", config, seed=0):
        assert prompt.system in ("", *german["systems"])
        assert set(prompt.turns[1:]) <= set(german["follow_ups"])
    with pytest.raises(ValueError, match="no templates in klingon; there are some in chinese, english"):
        self_prompts("self:builtin", SelfChatConfig(languages=("klingon",)), seed=0)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"corpus\.self_chat\.max_tokens is 0; expected a positive"):
        SelfChatConfig(max_tokens=0)
    with pytest.raises(ValueError, match=r"corpus\.self_chat\.temperature is -1"):
        SelfChatConfig(temperature=-1.0)
