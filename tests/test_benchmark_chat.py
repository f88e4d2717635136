import sys
from pathlib import Path

from chat_server import ChatServer

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import benchmark_chat


def table(capsys, monkeypatch, *arguments: str) -> dict[str, list[str]]:
    """Name of a figure -> its values, as the script prints them."""
    monkeypatch.setattr(sys, "argv", ["benchmark_chat.py", "--requests", "30", *arguments])
    benchmark_chat.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {name: values for name, *values in rows}


def test_every_prompt_is_answered_or_reported_and_none_twice(capsys, monkeypatch):
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        monkeypatch.setenv(name, "set by the script")
    found = table(capsys, monkeypatch, "--slots", "8", "--seconds", "0.01")
    assert found["prompts"] == ["30", "30"] and found["answered twice"] == ["0", "0"]
    answered, reported = (list(map(int, found[name])) for name in ("answered", "reported"))
    assert answered[0] == 30 and answered[1] + reported[1] == 30 and int(found["faults"][1]) > 0
    assert float(found["plain client, requests/s"][0]) > 0


def test_a_server_of_openais_protocol_is_asked_by_both_clients(capsys, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "set by the script")
    server = ChatServer()
    found = table(capsys, monkeypatch, "--base-url", f"{server.url}/v1")
    server.close()
    assert found["answered"] == ["30"] and len(server.asked) == 30 + 30 // 4
    assert {body["max_tokens"] for body in server.requests} == {8}
