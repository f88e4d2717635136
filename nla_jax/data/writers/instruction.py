"""Instructions to the chat models that write warm-start texts: versioned files, or a file of the user's own."""

import dataclasses
import hashlib
from pathlib import Path

from nla_jax.files import as_path

ROW_SLOT = "{row}"
"""The part of an instruction where what is known of a row goes. One without it is the system prompt."""
_FOLDER = Path(__file__).parent / "instructions"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What a chat model is told to write."""

    name: str
    """The name of a built-in instruction, or the path of the file."""
    text: str

    @property
    def system_prompt(self) -> str:
        """The instruction, where it is a message of its own; empty where rows go into it."""
        return "" if ROW_SLOT in self.text else self.text

    def prompt(self, row: str) -> str:
        """The user's message about a row: what is known of it, inside the instruction if that has a slot for it."""
        return self.text.replace(ROW_SLOT, row) if ROW_SLOT in self.text else row

    @property
    def digest(self) -> str:
        """Identifies the instruction by its text."""
        return hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()


def built_in_instructions() -> list[str]:
    """Names of the built-in instructions. A published one never changes: a better one has another version."""
    return sorted(path.stem for path in _FOLDER.glob("*.txt"))


def load_instruction(name: str) -> Instruction:
    """A built-in instruction by its name, or the text of a file.

    Raises:
      ValueError: neither a built-in name nor a file, or the file is empty or is no text.
    """
    names = built_in_instructions()
    path = _FOLDER / f"{name}.txt" if name in names else as_path(name)
    if not path.is_file():
        raise ValueError(
            f"there is no instruction {name!r}: it is none of the built-in ones ({', '.join(names)}), and no file; "
            "name one of these, or give the path of a file with an instruction of your own (writer.chat.instruction)"
        )
    try:
        text = path.read_bytes().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 ({error}); give a text file as the instruction"
        ) from error
    if not text:
        raise ValueError(
            f"{path} is empty; write into it what the model is to write (writer.chat.instruction)"
        )
    return Instruction(name, text)
