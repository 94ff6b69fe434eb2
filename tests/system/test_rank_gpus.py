"""Which GPU each rank gets, on one host and on several."""

from __future__ import annotations

import re

import pytest

from mpt_trt.errors import SharedError
from mpt_trt.system.rank_gpus import Place, assign_gpus

FOUR = ("GPU-a", "GPU-b", "GPU-c", "GPU-d")


def test_ranks_that_see_all_gpus_of_their_host_take_them_in_order() -> None:
    places = [
        Place("one", FOUR),
        Place("one", FOUR),
        Place("two", FOUR[:2]),
        Place("two", FOUR[:2]),
    ]
    assert assign_gpus(places) == ["GPU-a", "GPU-b", "GPU-a", "GPU-b"]


def test_ranks_may_alternate_between_hosts() -> None:
    places = [Place(host, FOUR) for host in ("one", "two", "one", "two")]
    assert assign_gpus(places) == ["GPU-a", "GPU-a", "GPU-b", "GPU-b"]


def test_ranks_that_see_only_their_own_gpu_take_it() -> None:
    places = [Place("one", (name,)) for name in reversed(FOUR)]
    assert assign_gpus(places) == list(reversed(FOUR))


@pytest.mark.parametrize("gpus", [(), FOUR[:1]])
def test_fewer_gpus_than_ranks(gpus: tuple[str, ...]) -> None:
    message = (
        f"2 ranks on one share {len(gpus)} GPU(s), but each rank needs its own; start fewer ranks "
        "there, or set CUDA_VISIBLE_DEVICES= to use the CPU"
    )
    with pytest.raises(SharedError, match=f"^{re.escape(message)}$"):
        assign_gpus([Place("one", gpus), Place("one", gpus), Place("two", FOUR)])


def test_two_ranks_with_one_gpu() -> None:
    places = [Place("two", FOUR), Place("one", FOUR[:2]), Place("one", FOUR[:1])]
    with pytest.raises(SharedError, match=r"^ranks 1 and 2 have the same GPU of one \(GPU-a\); "):
        assign_gpus(places)
