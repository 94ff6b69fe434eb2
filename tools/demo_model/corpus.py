"""The corpus: sources and pydoc topics of a Python standard library, split into parts."""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mpt_trt.errors import MptTrtError

END_OF_TEXT = "<|endoftext|>"
TOPICS_FILE = "pydoc_data/topics.py"
# Generated files, tables of data, and fixtures that are broken on purpose. Paths in the library.
EXCLUDED_PATTERNS = (
    "site-packages/*", "dist-packages/*", "lib-dynload/*", "config-*", "*/__pycache__/*",
    "_sysconfigdata*", "__phello__*", "keyword.py", "token.py", "stringprep.py", "re/_casefix.py",
    "html/entities.py", TOPICS_FILE, "test/test_stable_abi_ctypes.py",
    "encodings/cp*.py", "encodings/iso8859_*.py", "encodings/mac_*.py", "encodings/koi8_*.py",
    "encodings/kz1048.py", "encodings/ptcp154.py", "encodings/tis_620.py",
    "encodings/hp_roman8.py", "encodings/palmos.py", "encodings/aliases.py",
    "lib2to3/tests/data/*", "test/bad*", "test/*/bad*", "test/encoded_modules/*",
)  # fmt: skip
# Minimum share of a file's non-blank characters in words: code is above, number tables below.
LEAST_WORD_SHARE = 0.45
HELD_BACK_BYTES = (1_000, 16_000)
HELDOUT_BYTES, VALIDATION_BYTES = 100_000, 150_000
HELD_BACK_TOPICS_SHARE = 0.3
MOST_SHARED_LINES = 0.2
SHORTEST_COUNTED_LINE = 30


@dataclass(frozen=True)
class Document:
    """A source file or pydoc topic. name: path in the library, or `topics/NAME`."""

    name: str
    text: str

    @property
    def kind(self) -> str:
        """`topic`, `test` or `library`."""
        folders, file = Path(self.name).parts[:-1], Path(self.name).name
        if folders[:1] == ("topics",):
            return "topic"
        is_test = file.startswith("test_") or {"test", "tests", "idle_test"} & set(folders)
        return "test" if is_test else "library"

    @property
    def size(self) -> int:
        return len(self.text.encode())


Split = dict[str, list[Document]]


def read_corpus(stdlib: Path) -> list[Document]:
    """Reads all usable documents below `stdlib`, sorted by name, without exact duplicates."""
    documents = read_topics(stdlib / TOPICS_FILE)
    for path in stdlib.rglob("*.py"):
        name = path.relative_to(stdlib).as_posix()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in EXCLUDED_PATTERNS):
            text = read_source(path)
            documents += [Document(name, text)] if text else []
    by_name = sorted(documents, key=lambda document: document.name, reverse=True)
    return list({document.text: document for document in by_name}.values())[::-1]


def read_source(path: Path) -> str | None:
    """Reads a file's text; None if it is not UTF-8, not Python, empty, or a table of data."""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        with warnings.catch_warnings(action="ignore"):
            ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return None
    characters = len(re.sub(r"\s", "", text))
    in_words = sum(map(len, re.findall(r"[A-Za-z_]{2,}", text)))
    return text if characters and in_words / characters >= LEAST_WORD_SHARE else None


def read_topics(path: Path) -> list[Document]:
    """Reads the dictionary `topics` of pydoc's data file as a literal, without executing it."""
    if not path.is_file():
        return []
    assignments = [n for n in ast.parse(path.read_bytes()).body if isinstance(n, ast.Assign)]
    topics = ast.literal_eval(assignments[-1].value)
    return [Document(f"topics/{name}", text) for name, text in topics.items()]


def split_corpus(documents: list[Document], heldout_bytes: int, validation_bytes: int) -> Split:
    """Splits documents into `training`, `validation` (to watch) and `heldout` (to report).

    Validation and held-out documents are taken in the order of a hash of their names. They are
    documents of moderate size, few of whose longer lines occur in others. Tests are excluded,
    because they resemble each other.
    """
    shares = shared_line_shares(documents)
    small, large = HELD_BACK_BYTES
    fit = [
        document
        for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
        if small <= document.size <= large
        and document.kind != "test"
        and shares[document.name] <= MOST_SHARED_LINES
    ]
    heldout = take(fit, heldout_bytes)
    validation = take([d for d in fit if d not in heldout], validation_bytes)
    if not heldout or not validation:
        raise MptTrtError(f"too few of {len(documents)} documents are fit: give a larger --stdlib")
    held_back = {document.name for document in heldout + validation}
    training = [document for document in documents if document.name not in held_back]
    return {"training": training, "validation": validation, "heldout": heldout}


def shared_line_shares(documents: list[Document]) -> dict[str, float]:
    """Computes, per document name, the share of its distinct long lines that occur in others."""
    lines = {
        d.name: {line for line in d.text.splitlines() if len(line.strip()) >= SHORTEST_COUNTED_LINE}
        for d in documents
    }
    holders = Counter(line for own in lines.values() for line in own)
    return {
        name: sum(holders[line] > 1 for line in own) / max(1, len(own))
        for name, own in lines.items()
    }


def take(documents: list[Document], total_bytes: int) -> list[Document]:
    """Takes the first documents of both kinds: sources up to their share of bytes, then topics."""
    topics_bytes = round(total_bytes * HELD_BACK_TOPICS_SHARE)
    taken: list[Document] = []
    for kind, enough in (("library", total_bytes - topics_bytes), ("topic", topics_bytes)):
        sizes = 0
        for document in documents:
            if document.kind == kind and sizes < enough:
                taken.append(document)
                sizes += document.size
    return taken


def joined(documents: list[Document]) -> str:
    """Joins documents to one text, in the format of heldout.txt."""
    return END_OF_TEXT.join(document.text for document in documents)
