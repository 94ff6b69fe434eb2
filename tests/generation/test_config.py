"""Checks of the generation settings."""

from __future__ import annotations

import pytest

from support.generation import greedy


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_new_tokens", 0, "max_new_tokens is 0; it must be an integer of at least 1"),
        ("max_new_tokens", 2.5, "max_new_tokens is 2.5; it must be an integer of at least 1"),
        ("end_ids", (3, -1), r"end_ids is \(3, -1\); it must be token ids >= 0"),
        ("pad_id", -2, "pad_id is -2; it must be a token id >= 0"),
        ("pad_id", None, "pad_id is None; it must be a token id >= 0"),
        ("num_beams", 0, "num_beams is 0; it must be an integer of at least 1"),
        ("temperature", 0.0, "temperature is 0.0; it must be a finite number above 0"),
        ("temperature", float("nan"), "temperature is nan; it must be a finite number above 0"),
        ("temperature", float("inf"), "temperature is inf; it must be a finite number above 0"),
        ("top_k", -1, "top_k is -1; it must be an integer of at least 0"),
        ("top_p", 1.5, "top_p is 1.5; it must be a number from 0 to 1"),
        ("top_p", -0.1, "top_p is -0.1; it must be a number from 0 to 1"),
        ("repetition_penalty", 0, "repetition_penalty is 0; it must be a number from 0.01 to 100"),
        ("repetition_penalty", 1e-39, "repetition_penalty is 1e-39; it must be a number from 0.01"),
        ("repetition_penalty", 100.5, "repetition_penalty is 100.5; it must be a number from 0.01"),
        ("repetition_penalty", float("nan"), "repetition_penalty is nan; it must be a number from"),
        ("length_penalty", float("inf"), "length_penalty is inf; it must be a finite number"),
        ("random_seed", -7, "random_seed is -7; it must be an integer of at least 0"),
    ],
)
def test_a_config_field_out_of_range_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        greedy(**{field: value})


@pytest.mark.parametrize("penalty", [0.01, 100])
def test_penalties_at_the_limits_are_accepted(penalty: float) -> None:
    assert greedy(repetition_penalty=penalty).repetition_penalty == penalty


def test_beams_that_sample_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k is 50 with num_beams 4; it must be 1, because"):
        greedy(num_beams=4, top_k=50)
