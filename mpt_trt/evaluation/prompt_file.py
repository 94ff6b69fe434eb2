"""A prompt and its tokens, as a JSON file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json, write_json
from mpt_trt.system.typed_json import from_json


@dataclass(frozen=True)
class Prompt:
    """A prompt and its token ids."""

    prompt: str
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 0:
            raise ValueError("tokens: at least one token id is expected, none below 0")


def write_prompt(prompt: Prompt, target: Path, inputs: list[Path]) -> None:
    """Writes the prompt as JSON. inputs: see `replace_file`."""
    write_json(target, asdict(prompt), inputs)


def read_prompt(path: Path) -> Prompt:
    """Reads a prompt; raises MptTrtError when `write_prompt` did not write the file."""
    try:
        return from_json(Prompt, read_json(path))
    except ValueError as error:
        raise MptTrtError(
            f"{path}: not a prompt of encode_prompt.py, or damaged ({error}); make it again"
        ) from None
