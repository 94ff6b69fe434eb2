"""The choice of formats within a budget, against all choices that there are."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.errors import MptTrtError
from mpt_trt.quantization.mixed import Candidate, choose_formats, require_budget
from mpt_trt.quantization.schemes import IntegerFormat, Mixed, default_group_size
from support.demo import MODEL

NARROW = read_hf_config(MODEL)
FORMATS = [IntegerFormat(4, 128), IntegerFormat(4, 32), IntegerFormat(8)]
NUM_WEIGHTS = 1000.0


def candidates(divergences: list[list[float]]) -> dict[int, list[Candidate]]:
    return {
        place: [
            Candidate(each, each.bits_per_weight(256) * NUM_WEIGHTS, value)
            for each, value in zip(FORMATS, values, strict=True)
        ]
        for place, values in enumerate(divergences)
    }


falling = st.lists(st.floats(1e-6, 1), min_size=3, max_size=3).map(
    lambda values: sorted(values, reverse=True)
)


@given(st.lists(falling, min_size=1, max_size=4), st.floats(4.2, 9))
def test_the_choice_is_near_the_best(divergences: list[list[float]], bits: float) -> None:
    places = candidates(divergences)
    chosen = choose_formats(places, int(NUM_WEIGHTS) * len(places), bits)
    pick = [next(c for c in places[p] if c.format == chosen[p]) for p in places]
    budget = bits * NUM_WEIGHTS * len(places)
    assert sum(each.size for each in pick) <= budget
    total = sum(each.divergence for each in pick)
    possible = [
        sum(each.divergence for each in choice)
        for choice in itertools.product(*places.values())
        if sum(each.size for each in choice) <= budget
    ]
    # What greed leaves is less than one matrix could gain.
    largest = max(values[0] for values in divergences)
    assert min(possible) - 1e-9 <= total <= min(possible) + largest


def test_sensitive_matrices_get_more_bits() -> None:
    places = candidates([[0.1, 0.08, 0.001], [0.9, 0.7, 0.002]])
    chosen = choose_formats(places, 2000, 6.2)
    assert [chosen[0].name, chosen[1].name] == ["int4-g128", "int8"]


def test_too_small_budgets_are_refused_with_the_smallest() -> None:
    with pytest.raises(
        MptTrtError, match=r"bits = 4: .* take 4\.125 bits .*; set bits to 4\.125 or"
    ):
        choose_formats(candidates([[1, 0.5, 0.1]]), 1000, 4)
    assert default_group_size(NARROW) == 64
    require_budget(NARROW, 4.25)
    with pytest.raises(MptTrtError, match=r"bits = 4\.2: .* take 4\.25 bits .*; set bits to 4\.25"):
        require_budget(NARROW, 4.2)
    without_groups = replace(NARROW, intermediate_size=600)
    require_budget(without_groups, 8.1)
    with pytest.raises(MptTrtError, match=r"bits = 6\.5: .* smallest formats \(int8\) take 8\.05"):
        require_budget(without_groups, 6.5)
    with pytest.raises(MptTrtError, match=r"bits = 3\.9: 4\.125 .* to 16 bits per weight"):
        Mixed(3.9)


def test_names_of_formats() -> None:
    assert [each.name for each in FORMATS] == ["int4-g128", "int4-g32", "int8"]
    assert [IntegerFormat.of(each.name) for each in FORMATS] == FORMATS
    with pytest.raises(ValueError, match="int3: one of int8, int4-g128"):
        IntegerFormat.of("int3")
