"""Division of a model among tensor-parallel ranks, against index lists made one by one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt_trt.errors import MptTrtError
from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Range, Rank


def config_of(num_heads: int, num_kv_heads: int, head_dim: int, intermediate_size: int):
    return MptConfig(
        hidden_size=num_heads * head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_layers=1,
        intermediate_size=intermediate_size,
        vocab_size=8,
        max_seq_len=8,
        softmax_scale=1.0,
    )


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def kv_heads_used(config: MptConfig, tp_size: int) -> list[set[int]]:
    """Lists, for each rank, the K/V heads of its share of query heads, head by head."""
    used: list[set[int]] = [set() for _ in range(tp_size)]
    for head in range(config.num_heads):
        rank = head * tp_size // config.num_heads
        used[rank].add(head * config.num_kv_heads // config.num_heads)
    return used


def fits(config: MptConfig, tp_size: int) -> bool:
    """Checks the definition: equal shares of query heads, feed-forward units and K/V heads.

    And no K/V head is on more ranks than another.
    """
    if config.num_heads % tp_size or config.intermediate_size % tp_size:
        return False
    used = kv_heads_used(config, tp_size)
    copies = Counter(head for heads in used for head in heads)
    return len(set(map(len, used))) == 1 and len(set(copies.values())) == 1


@st.composite
def divisible_models(draw: st.DrawFn) -> tuple[MptConfig, int]:
    """A model and a tp_size that fits it."""
    tp_size = draw(st.integers(1, 12))
    num_heads = tp_size * draw(st.integers(1, 6))
    intermediate_size = tp_size * draw(st.integers(1, 40))
    head_dim = draw(st.integers(1, 17))
    models = [config_of(num_heads, n, head_dim, intermediate_size) for n in divisors(num_heads)]
    return draw(st.sampled_from([model for model in models if fits(model, tp_size)])), tp_size


def indices(part: Range) -> list[int]:
    return list(range(part.start, part.stop))


def gathered(parts: list[Range]) -> list[int]:
    return [index for part in parts for index in indices(part)]


class TestParts:
    @given(divisible_models())
    def test_ranks_together_hold_the_whole_once(self, model: tuple[MptConfig, int]) -> None:
        config, tp_size = model
        ranks = sharding.all_ranks(tp_size)
        queries = [sharding.qkv_columns(config, rank)[0] for rank in ranks]
        assert gathered(queries) == list(range(config.hidden_size))
        columns = [sharding.feed_forward_columns(config, rank) for rank in ranks]
        assert gathered(columns) == list(range(config.intermediate_size))

    @given(divisible_models())
    def test_kv_heads_are_those_of_the_query_heads(self, model: tuple[MptConfig, int]) -> None:
        config, tp_size = model
        found = [set(indices(sharding.kv_heads(config, r))) for r in sharding.all_ranks(tp_size)]
        assert found == kv_heads_used(config, tp_size)

    @given(divisible_models())
    def test_kv_columns(self, model: tuple[MptConfig, int]) -> None:
        config, tp_size = model
        # Column numbers of Q | K | V, by head.
        numbers = iter(range(config.qkv_size))
        heads = [
            [[next(numbers) for _ in range(config.head_dim)] for _ in range(count)]
            for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        ]
        for rank, used in zip(
            sharding.all_ranks(tp_size), kv_heads_used(config, tp_size), strict=True
        ):
            _, keys, values = sharding.qkv_columns(config, rank)
            assert indices(keys) == [c for head in sorted(used) for c in heads[1][head]]
            assert indices(values) == [c for head in sorted(used) for c in heads[2][head]]

    @given(divisible_models())
    def test_few_kv_heads_are_replicated(self, model: tuple[MptConfig, int]) -> None:
        config, tp_size = model
        held = [sharding.kv_heads(config, rank) for rank in sharding.all_ranks(tp_size)]
        copies = max(1, tp_size // config.num_kv_heads)
        assert Counter(gathered(held)) == dict.fromkeys(range(config.num_kv_heads), copies)
        if copies == 1:
            assert gathered(held) == list(range(config.num_kv_heads))

    @pytest.mark.parametrize(
        ("num_heads", "num_kv_heads", "tp_size", "expected"),
        [
            (8, 8, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
            (8, 2, 2, [[0], [1]]),
            (8, 2, 4, [[0], [0], [1], [1]]),
            (6, 1, 3, [[0], [0], [0]]),
            (24, 8, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ],
    )
    def test_examples(self, num_heads, num_kv_heads, tp_size, expected) -> None:
        config = config_of(num_heads, num_kv_heads, 4, tp_size)
        found = [sharding.kv_heads(config, rank) for rank in sharding.all_ranks(tp_size)]
        assert list(map(indices, found)) == expected

    def test_wrong_rank(self) -> None:
        for rank in (-1, 2):
            with pytest.raises(ValueError, match=f"rank {rank} is outside 0..1"):
                Rank(rank, 2)

    def test_uneven_part(self) -> None:
        with pytest.raises(ValueError, match="10 is not a multiple of tp_size 4"):
            Rank(0, 4).part(10)


class TestLegalSizes:
    def test_definition(self) -> None:
        checked = Counter()
        for num_heads in range(1, 25):
            for num_kv_heads in divisors(num_heads):
                for intermediate_size in (24, 30, 4 * num_heads):
                    config = config_of(num_heads, num_kv_heads, 2, intermediate_size)
                    for tp_size in range(1, 26):
                        legal = fits(config, tp_size)
                        assert sharding.is_legal(config, tp_size) == legal, (config, tp_size)
                        checked[legal] += 1
        assert checked[True] > 500
        assert checked[False] > 500

    @pytest.mark.parametrize(
        ("config", "tp_size", "legal"),
        [
            (config_of(4, 4, 16, 256), 3, "1, 2, 4"),
            (config_of(24, 8, 128, 12288), 3, "1, 2, 4, 8, 24"),
            (config_of(24, 8, 128, 12288), 12, "1, 2, 4, 8, 24"),
            (config_of(6, 1, 16, 100), 3, "1, 2"),
            (config_of(64, 64, 112, 28672), 128, "1, 2, 4, 8, 16, 32, 64"),
            (config_of(4, 4, 16, 256), 0, "1, 2, 4"),
            (config_of(4, 4, 16, 256), -2, "1, 2, 4"),
        ],
    )
    def test_refusal_lists_legal_sizes(self, config: MptConfig, tp_size: int, legal: str) -> None:
        with pytest.raises(MptTrtError) as error:
            sharding.require_legal(config, tp_size)
        message = str(error.value)
        assert message.startswith(f"tensor-parallel size {tp_size} does not divide")
        assert message.endswith(f"valid sizes are {legal}")

    def test_legal_size_is_accepted(self) -> None:
        sharding.require_legal(config_of(4, 4, 16, 256), 4)
