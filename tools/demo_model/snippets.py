"""Extracts stand-alone functions and classes of a corpus for the second training stage."""

from __future__ import annotations

import ast
import keyword
import random
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tools.demo_model.corpus import Document

SNIPPET_LINES = (2, 60)
MADE_UP_SHARE = 0.5
# Number of renderings of the snippets with different names, so that names are not learnt by heart.
SNIPPET_VARIANTS = 8


@dataclass(frozen=True)
class Snippet:
    """A stand-alone definition: the name that it defines, and its text around that name."""

    name: str
    parts: tuple[str, ...]


def snippets_of(document: Document) -> Iterator[Snippet]:
    """Finds undecorated functions with arguments and, in the library, methods and small classes.

    Each is a separate document in training. In a module, a name has usually occurred before its
    definition; only snippets teach the model what follows `def` and an unknown name.
    """
    lines = document.text.split("\n")
    shortest, longest = SNIPPET_LINES
    for parent in ast.walk(ast.parse(document.text if document.kind != "topic" else "")):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own = lines[node.lineno - 1 : node.end_lineno]
                fits = shortest <= len(own) <= longest
                text = standalone_text(node, parent, own, document.kind) if fits else None
                if text:
                    yield Snippet(node.name, tuple(re.split(rf"(?<![\w.]){node.name}\b", text)))


def standalone_text(
    node: ast.FunctionDef | ast.ClassDef, parent: ast.AST, lines: list[str], kind: str
) -> str | None:
    """Returns the definition in `lines` as in a module; None if it is not suitable."""
    match node:
        case ast.ClassDef() if kind == "library" and isinstance(parent, ast.Module):
            return "\n".join(lines) + "\n"
        case ast.FunctionDef(args=ast.arguments(args=[ast.arg(arg=first), *_])):
            if len(node.body) > 1 and ast.get_docstring(node):
                # Docstrings are removed, because prose would fill a short sample.
                lines = (
                    lines[: node.body[0].lineno - node.lineno]
                    + (lines[node.body[1].lineno - node.lineno :])
                )
            text = textwrap.dedent("\n".join(lines)) + "\n"
            if first == "self" and kind == "library":
                return method_as_function(text, parent)
            return text if text.startswith("def ") and first not in ("self", "cls") else None
    return None


def method_as_function(text: str, parent: ast.AST) -> str | None:
    """Turns a method into a function with its class's name for `self`; None if that fails."""
    class_words = re.findall("[A-Z]?[a-z]+", getattr(parent, "name", ""))
    receiver = class_words[-1].lower() if class_words else "class"
    plain = re.match(r"def (?!__)", text) and "return " in text and "super()" not in text
    if not plain or keyword.iskeyword(receiver) or receiver in text:
        return None
    return re.sub(r"\bself\b", receiver, text)


def plain_words(documents: list[Document]) -> list[str]:
    """Lists words of prose and code that occur at least three times in the documents."""
    counts = Counter(word for d in documents for word in re.findall(r"\b[a-z]{3,10}\b", d.text))
    return sorted(word for word, count in counts.items() if count >= 3)


def made_up_name(words: Sequence[str], draw: random.Random) -> str:
    """Makes a name of one to three words, or beginnings or ends of words."""
    pieces = []
    for word in draw.choices(words, k=draw.randint(1, 3)):
        cut = draw.randint(1, len(word) - 2)
        pieces.append(draw.choice([word, word, word[: cut + 1], word[cut:]]))
    return draw.choice(["", "_"]).join(pieces)


def render(snippets: list[Snippet], words: Sequence[str], draw: random.Random) -> list[str]:
    """Renders the snippets, some with made-up names, also in recursive calls."""
    texts = []
    for snippet in snippets:
        name, text = made_up_name(words, draw), "".join(snippet.parts)
        if text.startswith("class "):
            name = name.title().replace("_", "")
        usable = not keyword.iskeyword(name) and name not in text
        if draw.random() >= MADE_UP_SHARE or not usable:
            name = snippet.name
        texts.append(name.join(snippet.parts))
    return texts


def snippet_texts(documents: list[Document], seed: int) -> list[str]:
    """Lists all renderings of the documents' snippets."""
    snippets = [snippet for document in documents for snippet in snippets_of(document)]
    words, draw = plain_words(documents), random.Random(seed)
    return [text for _ in range(SNIPPET_VARIANTS) for text in render(snippets, words, draw)]
