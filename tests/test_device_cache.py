"""How long the buffers of a key-value cache are in GPU memory; what they hold is tested on GPUs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mpt_trt.engines.device_cache import LEAST_POSITIONS, positions_in_use

LENGTHS = st.integers(1, 1 << 16)


@given(used=st.data(), cache_len=LENGTHS)
def test_buffers_have_room_and_no_more_than_there_may_be(used, cache_len):
    needed = used.draw(st.integers(0, cache_len))
    assert needed <= positions_in_use(needed, cache_len) <= cache_len


@given(used=st.integers(LEAST_POSITIONS, 1 << 16))
def test_at_most_a_third_of_long_buffers_is_not_in_use(used):
    assert positions_in_use(used, 1 << 20) < used * 1.5


def test_lengths_are_few():
    assert {positions_in_use(used, 2000) for used in range(2001)} == {
        128, 192, 256, 384, 512, 768, 1024, 1536, 2000
    }  # fmt: skip
