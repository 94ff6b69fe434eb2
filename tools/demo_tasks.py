"""Makes tasks for lm-eval from the demo model's held-out text: one for each kind of request."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpt_trt.system.replace import replace_file

END_OF_TEXT = "<|endoftext|>"
SHORT = 2100
"""Largest number of characters of a document of the rolling task."""
NUM_CHOICES, NUM_QUESTIONS, NUM_WORDS, CONTEXT_LINES = 4, 32, 24, 6


def write_tasks(heldout: str, folder: Path) -> None:
    """Writes the data of the tasks into the folder, which has their YAML files."""
    documents = [document.strip("\n") for document in heldout.split(END_OF_TEXT)]
    short = [{"text": document} for document in documents if len(document) <= SHORT]
    _write(folder / "mpt_demo_text.jsonl", short)
    _write(folder / "mpt_demo_choice.jsonl", _questions(documents))
    _write(folder / "mpt_demo_word.jsonl", _words(documents))


def _questions(documents: list[str]) -> Iterable[dict[str, Any]]:
    """Lines of documents, and four possible next lines, of which one is the real one."""
    generator = random.Random(0)
    for _ in range(NUM_QUESTIONS):
        context, answer = _place(documents, generator)
        others = [_place(documents, generator)[1] for _ in range(NUM_CHOICES - 1)]
        choices = [answer, *others]
        generator.shuffle(choices)
        yield {"context": context, "choices": choices, "answer": choices.index(answer)}


def _words(documents: list[str]) -> Iterable[dict[str, Any]]:
    """Lines of documents, the last one cut after a word, and the next word."""
    generator, found = random.Random(1), 0
    while found < NUM_WORDS:
        context, line = _place(documents, generator)
        words = line.split(" ")
        at = generator.randrange(len(words))
        if at and words[at] and words[at - 1]:
            found += 1
            yield {"context": context + " ".join(words[:at]), "word": words[at]}


def _place(documents: list[str], generator: random.Random) -> tuple[str, str]:
    """Some lines of a document, and the line after them, which is not empty."""
    while True:
        lines = generator.choice(documents).split("\n")
        at = generator.randrange(CONTEXT_LINES, len(lines))
        context = "\n".join(lines[at - CONTEXT_LINES : at]) + "\n"
        if lines[at].strip() and context.strip():
            return context, lines[at]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
