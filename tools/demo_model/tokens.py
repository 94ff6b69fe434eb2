"""Trains the demo model's tokenizer, and converts the corpus to tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from tools.demo_model.corpus import END_OF_TEXT, Split
from tools.demo_model.recipe import Recipe
from tools.demo_model.snippets import snippet_texts

END_OF_TEXT_ID = 0


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE, which represents any text exactly.

    It puts `<|endoftext|>` (id 0) before a text. Every document in training starts with it; without
    it, the model treats a prompt as the middle of a document.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)]
    )
    return tokenizer


def make_streams(tokenizer: Tokenizer, split: Split, recipe: Recipe) -> dict[str, Tensor]:
    """Converts each part, and snippets if needed, to int64 [tokens], with `<|endoftext|>` first."""
    texts = {part: [document.text for document in documents] for part, documents in split.items()}
    if recipe.snippet_windows:
        texts["snippets"] = snippet_texts(split["training"], recipe.seed)

    def to_stream(texts: list[str]) -> Tensor:
        encodings = tokenizer.encode_batch(texts)
        return torch.tensor([token for encoding in encodings for token in encoding.ids])

    return {part: to_stream(texts) for part, texts in texts.items()}
