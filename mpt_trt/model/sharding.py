"""Divides a model among tensor-parallel ranks: pure functions over index ranges.

Attention heads and feed-forward columns are divided among ranks. The matrix before them is split by
output columns, the matrix after them by input rows (Shoeybi et al. 2019, arXiv:1909.08053).
"""

from __future__ import annotations

from dataclasses import dataclass

from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MptConfig

MAX_TP_SIZE = 64


@dataclass(frozen=True)
class Range:
    """The half-open index range [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def shifted(self, offset: int) -> Range:
        """The range moved up by `offset`."""
        return Range(self.start + offset, self.stop + offset)


@dataclass(frozen=True)
class Rank:
    """One rank of a tensor-parallel group."""

    index: int
    tp_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.tp_size:
            raise ValueError(f"rank {self.index} is outside 0..{self.tp_size - 1}")

    def part(self, size: int) -> Range:
        """This rank's equal part of `size` items; `size` must be a multiple of tp_size."""
        if size % self.tp_size:
            raise ValueError(f"{size} is not a multiple of tp_size {self.tp_size}")
        width = size // self.tp_size
        return Range(self.index * width, (self.index + 1) * width)


@dataclass(frozen=True)
class VocabularySharding:
    """The vocabulary's matrices that are split among ranks instead of copied to each."""

    embedding: bool = False
    head: bool = True


def all_ranks(tp_size: int) -> list[Rank]:
    """Every rank of a tensor-parallel group, in order."""
    return [Rank(index, tp_size) for index in range(tp_size)]


def is_legal(config: MptConfig, tp_size: int) -> bool:
    """Returns whether every rank gets whole attention heads and equal feed-forward columns.

    K/V heads are divided among ranks, or each of them is on tp_size / num_kv_heads ranks.
    """
    kv_fits = config.num_kv_heads % tp_size == 0 or tp_size % config.num_kv_heads == 0
    return config.num_heads % tp_size == 0 and config.intermediate_size % tp_size == 0 and kv_fits


def require_legal(config: MptConfig, tp_size: int) -> None:
    """Raises MptTrtError, listing the valid sizes, when tp_size does not divide the model."""
    if tp_size >= 1 and is_legal(config, tp_size):
        return
    legal = [str(size) for size in range(1, MAX_TP_SIZE + 1) if is_legal(config, size)]
    raise MptTrtError(
        f"tensor-parallel size {tp_size} does not divide a model with {config.num_heads} heads, "
        f"{config.num_kv_heads} K/V heads and {config.intermediate_size} feed-forward columns; "
        f"valid sizes are {', '.join(legal)}"
    )


def vocabulary_rows(config: MptConfig, rank: Rank) -> Range:
    """Tokens whose rows of a sharded embedding or head are on this rank.

    The last ranks may have fewer rows or none. The network pads them to `vocabulary_width`, and
    removes the padding when it joins the ranks' parts.
    """
    width = vocabulary_width(config, rank.tp_size)
    start = min(rank.index * width, config.vocab_size)
    return Range(start, min(start + width, config.vocab_size))


def vocabulary_width(config: MptConfig, tp_size: int) -> int:
    """Rows of a rank's part of the vocabulary, including padding."""
    return -(-config.vocab_size // tp_size)


def query_heads(config: MptConfig, rank: Rank) -> Range:
    """Global indices of this rank's query heads."""
    return rank.part(config.num_heads)


def kv_heads(config: MptConfig, rank: Rank) -> Range:
    """Global indices of the K/V heads that this rank's query heads use."""
    group = config.num_heads // config.num_kv_heads
    heads = query_heads(config, rank)
    return Range(heads.start // group, (heads.stop - 1) // group + 1)


def qkv_columns(config: MptConfig, rank: Rank) -> tuple[Range, Range, Range]:
    """This rank's Q, K and V columns within the whole projection Q | K | V, `[qkv_size]`."""

    def columns(heads: Range) -> Range:
        return Range(heads.start * config.head_dim, heads.stop * config.head_dim)

    kv_columns = columns(kv_heads(config, rank))
    return (
        columns(query_heads(config, rank)),
        kv_columns.shifted(config.hidden_size),
        kv_columns.shifted(config.hidden_size + config.kv_size),
    )


def feed_forward_columns(config: MptConfig, rank: Rank) -> Range:
    """This rank's feed-forward units: columns of the first matrix, rows of the second."""
    return rank.part(config.intermediate_size)
