"""Plans run by the engine, on a simulated TensorRT that enforces the rules of the real one.

Each engine's logits are compared with those of its network under ONNX Runtime. The rules are in
support/simulated/rules.py; every test ends with none broken and nothing leaked.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.test_quantized_engines import QUANTIZATIONS, WITH_FP8_CACHE, Model
from mpt_trt.calibration.calibrated_quantization import NOT_QUANTIZED, CalibratedQuantization
from mpt_trt.engines.build.rank_network import NetworkInputs
from mpt_trt.engines.interface import RowModel
from mpt_trt.engines.load import load_engine
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.engines.tensorrt import engine
from mpt_trt.engines.tensorrt.engine import TensorRtEngine
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.quantization.schemes import Quantization, WeightOnly
from mpt_trt.scheduling.scheduler import Request, Scheduler
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.engines import FEATURES, LIMITS, make_ft_checkpoint
from support.simulated.install import Simulation, build_simulated, installed
from support.step_scenario import require_same_steps, require_same_text

EVERY_QUANTIZATION = QUANTIZATIONS | WITH_FP8_CACHE
# Largest difference, as a multiple of the logits' standard deviation. The same network on the same
# numbers is the same; where ONNX Runtime computes in float32, TensorRT's cache keeps 16 bits.
BOUNDS = {"float32": 0, "float16": 0, "bfloat16": 0.1}
ROUNDED_BOUND = 0.5
# Odd sizes in bytes: nothing is aligned by itself.
UNEVEN = CheckpointSpec(hidden_size=60, num_heads=6, num_kv_heads=3, num_layers=1, vocab_size=101)
UNEVEN_LIMITS = BuildLimits(max_batch_size=4, max_input_len=9, max_output_len=24)
TINY = CheckpointSpec(hidden_size=64, num_heads=4, num_kv_heads=2, num_layers=1, vocab_size=67)


@pytest.fixture
def simulation() -> Iterator[Simulation]:
    with installed() as made:
        yield made


def simulated(
    checkpoint: FtCheckpoint,
    target: Path,
    limits: BuildLimits = LIMITS,
    calibrated: CalibratedQuantization = NOT_QUANTIZED,
) -> Path:
    return build_simulated(
        NetworkInputs(checkpoint, limits, VocabularySharding(), calibrated), target
    )


def load_both(engine_dir: Path) -> tuple[TensorRtEngine, RowModel]:
    """The engine on the simulated TensorRT, and its network under ONNX Runtime."""
    ours = load_engine(engine_dir, "tensorrt")
    assert ours.fallback_reason is None and ours.runtime.startswith("tensorrt_rtx 1.")
    assert isinstance(ours.model, TensorRtEngine)
    return ours.model, load_engine(engine_dir, "onnxruntime", num_threads=1).model


# --- results of engines --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURES)
def test_features(name, simulation, tmp_path):
    spec = FEATURES[name]
    ours, theirs = load_both(simulated(make_ft_checkpoint(tmp_path, spec), tmp_path / "engine"))
    require_same_steps(ours, theirs, spec.vocab_size, 0)
    assert simulation.cuda.launches, "no step was captured"


@pytest.mark.parametrize("storage_type", BOUNDS)
@pytest.mark.parametrize("gather_all", [False, True])
def test_types_and_sizes_that_nothing_is_aligned_to(storage_type, gather_all, simulation, tmp_path):
    limits = replace(UNEVEN_LIMITS, gather_all_token_logits=gather_all)
    checkpoint = make_ft_checkpoint(tmp_path, UNEVEN, storage_type)
    ours, theirs = load_both(simulated(checkpoint, tmp_path / "engine", limits))
    require_same_steps(ours, theirs, UNEVEN.vocab_size, BOUNDS[storage_type])
    if storage_type != "bfloat16":
        require_same_text(ours, theirs, UNEVEN.vocab_size)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Model:
    folder = tmp_path_factory.mktemp("tiny")
    generator = torch.Generator().manual_seed(1)
    samples = torch.randint(TINY.vocab_size, (2, 16), generator=generator)
    return Model(write_checkpoint(folder / "hf", TINY), folder, samples, group_size=16)


@pytest.mark.parametrize("name", EVERY_QUANTIZATION)
def test_quantizations_and_caches(name, tiny, simulation, tmp_path):
    check_quantization(tiny, EVERY_QUANTIZATION[name], "float16", tmp_path)


def check_quantization(tiny: Model, quantization: Quantization, dtype: str, folder: Path) -> None:
    checkpoint = tiny.checkpoint(quantization, 1, dtype)
    calibrated = tiny.calibrated(quantization, checkpoint)
    ours, theirs = load_both(simulated(checkpoint, folder / "engine", LIMITS, calibrated))
    exact = isinstance(quantization.scheme, WeightOnly) and dtype != "bfloat16"
    require_same_steps(ours, theirs, ours.vocab_size, 0 if exact else ROUNDED_BOUND)


# --- lives of engines ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    return simulated(make_ft_checkpoint(folder, TINY), folder / "engine")


@pytest.fixture(scope="module")
def other_engine_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    return simulated(make_ft_checkpoint(folder, replace(TINY, seed=5)), folder / "engine")


def test_text(engine_dir, simulation):
    require_same_text(*load_both(engine_dir), TINY.vocab_size)


def test_an_engine_is_dropped_and_loaded_again(engine_dir, simulation):
    for _ in range(2):
        ours, theirs = load_both(engine_dir)
        require_same_steps(ours, theirs, TINY.vocab_size, 0)
        del ours, theirs
        simulation.require_clean()


def test_two_engines_in_one_process_take_turns(engine_dir, other_engine_dir, simulation):
    pairs = [load_both(folder) for folder in (engine_dir, other_engine_dir)]
    numbers = np.random.default_rng(0)
    for pair in pairs:
        for model in pair:
            model.start(2)
    for position in range(6):
        ids = numbers.integers(0, TINY.vocab_size, (2, 1))
        where = np.array([[0, 0], [1, 0]])
        results = [
            [model.step(ids, np.array([position] * 2), where) for model in pair] for pair in pairs
        ]
        for found, expected in results:
            assert np.array_equal(found, expected)
        assert not np.array_equal(results[0][0], results[1][0])


@pytest.mark.parametrize("name", ["none", "int8 cache"])
def test_rows_that_join_and_leave_a_batch(name, tiny, simulation, tmp_path):
    """Prompts are read into one row while others wait; the last row moves into a gap."""
    quantization = Quantization() if name == "none" else EVERY_QUANTIZATION[name]
    checkpoint = tiny.checkpoint(quantization, 1)
    calibrated = tiny.calibrated(quantization, checkpoint)
    models = load_both(simulated(checkpoint, tmp_path / "engine", LIMITS, calibrated))
    numbers = np.random.default_rng(0)
    lengths: list[int] = []

    def step(seq: int, positions: list[int]) -> None:
        ids = numbers.integers(0, TINY.vocab_size, (len(positions), seq))
        where = np.array([[row, seq - 1] for row in range(len(positions))])
        found, expected = (model.step(ids, np.array(positions), where) for model in models)
        assert np.array_equal(found, expected)

    def select(first: int, count: int) -> None:
        for model in models:
            model.select_rows(first, count)

    def decode(times: int) -> None:
        select(0, len(lengths))
        for _ in range(times):
            step(1, lengths)
            lengths[:] = [length + 1 for length in lengths]

    for model in models:
        model.start(4)
    for size in (5, 9, 3):
        select(len(lengths), 1)
        step(size, [0])
        lengths.append(size)
        decode(4)
    for model in models:
        model.copy_row(2, 0)
    lengths[0] = lengths.pop()
    decode(4)
    select(2, 1)
    step(7, [0])
    lengths.append(7)
    decode(3)
    assert simulation.cuda.launches


def test_many_numbers_of_rows_keep_few_contexts(engine_dir, simulation, monkeypatch):
    """Contexts and graphs take memory, so old ones go; what comes back is captured again."""
    monkeypatch.setattr(engine, "MOST_CONTEXTS", 4)
    ours, theirs = load_both(engine_dir)
    numbers = np.random.default_rng(0)
    for rows, logits in itertools.product((4, 3, 2, 1), (1, 2)):
        if logits > rows:
            continue
        for model in (ours, theirs):
            model.start(rows)
        for position in range(4):
            ids = numbers.integers(0, TINY.vocab_size, (rows, 1))
            where = np.array([[row, 0] for row in range(logits)])
            found, expected = (
                model.step(ids, np.array([position] * rows), where) for model in (ours, theirs)
            )
            assert np.array_equal(found, expected)
    # One more, for prompts.
    assert simulation.world.contexts == 4 + 1


def test_requests_that_come_and_go_reuse_contexts_and_graphs(tmp_path, simulation):
    """There is a context for each number of rows, however often it changes."""
    limits = BuildLimits(max_batch_size=8, max_input_len=16, max_output_len=32)
    model = load_engine(
        simulated(make_ft_checkpoint(tmp_path, TINY), tmp_path / "engine", limits), "tensorrt"
    ).model
    scheduler, numbers = Scheduler(model), np.random.default_rng(0)
    errors: list[Exception | None] = []
    rows, num_changes = 0, 0
    for number in range(500):
        if number < 400 and numbers.random() < 0.15:
            prompt = tuple(numbers.integers(0, TINY.vocab_size, 5).tolist())
            config = GenerationConfig(int(numbers.integers(1, 30)), end_ids=(), pad_id=0)
            scheduler.add(Request(prompt, config, lambda _: None, errors.append))
        scheduler.run_once()
        num_changes += scheduler.num_running != rows
        rows = scheduler.num_running
    assert scheduler.is_idle and set(errors) == {None}
    assert num_changes > 5 * limits.max_batch_size
    assert simulation.world.created <= limits.max_batch_size + 1


def test_a_plan_of_an_earlier_version(engine_dir, simulation, monkeypatch):
    monkeypatch.setattr("support.simulated.network.CHOICE", ())
    assert load_error(engine_dir) == (
        f"{engine_dir / 'rank0.engine'}: the plan does not choose tokens, so an earlier version of "
        "mpt-trt built it; build the engine again"
    )


def test_a_choice_of_tokens_that_fails(engine_dir, simulation):
    """The caller gets the error, and the engine is as good as before."""
    ours, theirs = load_both(engine_dir)
    for model in (ours, theirs):
        model.start(1)

    def choose(count: int) -> list[int]:
        steps = ours.greedy_steps(np.array([5]), np.array([0]), count)
        return [int(tokens[0]) for tokens, _ in steps]

    simulation.world.failing.add("execute_async_v3")
    with pytest.raises(MptTrtError, match="a kernel failed"):
        choose(5)
    chosen = choose(5)
    for position, token in enumerate([5, *chosen[:-1]]):
        logits = theirs.step(np.array([[token]]), np.array([position]), np.array([[0, 0]]))
        assert logits.argmax() == chosen[position]
    assert choose(3) == chosen[:3]


# --- faults --------------------------------------------------------------------------------------


def load_error(engine_dir: Path) -> str:
    with pytest.raises(MptTrtError) as caught:
        load_engine(engine_dir, "tensorrt", is_trusted=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_damaged_plan(tmp_path, simulation):
    engine = simulated(make_ft_checkpoint(tmp_path, TINY), tmp_path / "engine")
    plan = engine / "rank0.engine"
    plan.write_bytes(b"x" * plan.stat().st_size)
    assert load_error(engine).startswith(
        f"{plan}: tensorrt_rtx 1.7.1.116 cannot load the plan on this GPU: magic tag does not match"
    )


def test_a_gpu_of_another_capability(engine_dir):
    with installed(capability="9.0"):
        message = load_error(engine_dir)
        assert "this GPU has compute capability 9.0, the plan is for 8.9" in message


# From nothing, to all that the engine takes: whatever is allocated last fails.
@pytest.mark.parametrize("capacity", [0, 1000, 1600, 2500, 3100])
def test_too_little_memory_to_load(capacity, engine_dir, simulation, monkeypatch):
    simulation.cuda.memory.capacity = capacity
    monkeypatch.setattr("mpt_trt.engines.load._memory_obstacle", lambda _: None)
    message = load_error(engine_dir)
    assert message == "CUDA: out of memory; free GPU memory or lower the engine's limits"
    gc.collect()
    assert simulation.cuda.memory.used() == 0


def test_too_little_memory_for_the_cache(engine_dir, simulation):
    model = load_engine(engine_dir, "tensorrt").model
    simulation.cuda.memory.capacity = simulation.cuda.memory.used() + 100
    with pytest.raises(MptTrtError, match="CUDA: out of memory"):
        model.start(4)
    # With memory it goes on.
    simulation.cuda.memory.capacity *= 10
    model.start(1)
    assert np.isfinite(model.step(np.array([[1, 2]]), np.array([0]), np.array([[0, 1]]))).all()


def test_a_context_that_cannot_be_created(engine_dir, simulation):
    simulation.world.failing.add("create_execution_context")
    assert load_error(engine_dir) == (
        "tensorrt_rtx 1.7.1.116 failed to create an execution context: out of memory (simulated)"
    )


@pytest.mark.parametrize("index", range(4), ids=["prompt", "plain", "plain again", "captured"])
def test_a_step_that_fails(index, engine_dir, simulation):
    ours, theirs = load_both(engine_dir)
    for model in (ours, theirs):
        model.start(1)
    where = np.array([[0, 0]])
    steps = [([[1, 2, 3]], [0]), *(([[4]], [position]) for position in (3, 4, 5, 6))]
    for number, (ids, position) in enumerate(steps):
        if number == index:
            simulation.world.failing.add("execute_async_v3")
            with pytest.raises(MptTrtError) as caught:
                ours.step(np.array(ids), np.array(position), where)
            assert str(caught.value) == (
                "tensorrt_rtx 1.7.1.116 failed to run a step: a kernel failed (simulated)"
            )
        # The engine is as good as before: the step can be repeated.
        found, expected = (
            model.step(np.array(ids), np.array(position), where) for model in (ours, theirs)
        )
        assert np.array_equal(found, expected)


def test_nothing_is_printed_to_the_standard_output(engine_dir, simulation, capfd):
    """TensorRT's own logger would, where results go."""
    model = load_engine(engine_dir, "tensorrt").model
    model.start(1)
    simulation.world.failing.add("execute_async_v3")
    with pytest.raises(MptTrtError):
        model.step(np.array([[1]]), np.array([0]), np.array([[0, 0]]))
    assert capfd.readouterr().out == ""
