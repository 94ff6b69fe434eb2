"""Times of loads, on a model whose steps take a known time, and the command."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.throughput import Load, Spread, all_loads, measure_load, read_throughput
from support.engines import call_tool
from support.generation import TableModel


class TimedModel(TableModel):
    """Reads a prompt in 20 ms, and needs 5 ms per token after it."""

    def step(self, input_ids, write_positions, logit_positions):
        time.sleep(0.02 if input_ids.shape[1] > 1 else 0.005)
        return super().step(input_ids, write_positions, logit_positions)


MODEL = TimedModel(np.eye(7), max_batch_size=4)


def test_times_are_those_of_the_steps() -> None:
    speed = measure_load(MODEL, Load(batch_size=3, prompt_len=4, new_tokens=6), rounds=3)
    assert speed.rounds == 3
    assert 0.02 <= speed.first_token_s.median <= speed.first_token_s.p99
    assert 0.005 <= speed.between_tokens_s.median <= speed.between_tokens_s.p99
    # The steps take 0.045 s at least; a busy machine takes longer.
    assert speed.tokens_per_s <= 18 / 0.045
    one = measure_load(MODEL, Load(batch_size=1, prompt_len=4, new_tokens=1), rounds=1)
    assert one.between_tokens_s is None


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert Spread.of([1.0]) == Spread(1, 1)
    assert Spread.of([*map(float, range(1, 101))]) == Spread(50.5, 99)
    assert Spread.of([*map(float, range(200, 0, -1))]) == Spread(100.5, 198)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (([1, 5], [4], [4]), "--batch_sizes = 5: the engine has 4 rows"),
        (([1], [4, 30], [3, 1]), "--prompt_lens = 30 and --output_lens = 3: a row of the engine"),
        (([1], [0], [3]), "--prompt_lens = 0: at least 1 is required"),
    ],
)
def test_loads_that_the_engine_cannot_have(sizes, message: str) -> None:
    with pytest.raises(MptTrtError, match=message):
        all_loads(MODEL, *sizes)


def test_the_command(demo_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "throughput.json"
    call_tool(
        "benchmark_engine.py",
        f"--engine_dir={demo_engine}",
        f"--output={output}",
        "--prompt_lens", "8", "16",
        "--output_lens", "4",
        "--rounds=1",
        "--num_threads=1",
    )  # fmt: skip
    result = read_throughput(output)
    loads = [(one.load.batch_size, one.load.prompt_len) for one in result.speeds]
    assert loads == [(1, 8), (1, 16), (4, 8), (4, 16)]
    assert all(one.tokens_per_s > 0 for one in result.speeds)
    assert result.runtime.startswith("ONNX Runtime") and result.peak_memory > 1 << 20
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines if line[:1] in (["1"], ["4"])] == [
        ["1", "8", "4"], ["1", "16", "4"], ["4", "8", "4"], ["4", "16", "4"],
    ]  # fmt: skip
