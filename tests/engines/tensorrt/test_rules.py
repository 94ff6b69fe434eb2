"""Every rule of the simulation, broken on purpose in a copy of the engine's code, is noticed.

A mutation that nothing notices would mean that the simulation does not check what it claims.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cuda.bindings import runtime as cudart

from engines.tensorrt.test_simulated_engine import UNEVEN, UNEVEN_LIMITS, simulated, tiny
from engines.test_mpi import WHOLE
from engines.test_quantized_engines import QUANTIZATIONS, Model
from mpt_trt.engines.build.rank_network import NetworkInputs
from mpt_trt.engines.load import load_engine
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.quantization.schemes import Quantization
from support.engines import LIMITS, make_ft_checkpoint
from support.simulated.cuda import SimulatedCuda
from support.simulated.install import Simulation, build_simulated, installed
from support.simulated.memory import POISON
from support.simulated.mutants import Change, mutated
from support.simulated.rules import Book, Rule, Violation
from support.step_scenario import require_same_steps

__all__ = ["tiny"]

# Keys of the modules that have imported CUDA's runtime.
USERS_OF_CUDA = ("graphs", "memory", "steps_ahead")
NUMBERS = "wrong numbers"
IN_PLACE, COPIED, RANKS = "in place", "copied", "ranks"

SYNCHRONIZE = """.copy_to(logits, stream)
            self._stream.synchronize()
"""
ENQUEUE = """        def enqueue() -> None:
            context.enqueue(stream)
"""
PREPARE = "        self._cache.before_step(seq)\n"
STORE = "        self._cache.after_step(write_positions, self._stream.handle)\n"
ADVANCE = """            if index:
                buffers["input_ids"].copy_from_device(buffers[CHOSEN], rows * INT64_BYTES, stream)
"""
RUN_CHOSEN = "            self._run_chosen(write_positions + index)\n"
# A second stream in addition to the engine's own.
SECOND_STREAM: Change = (
    "engine",
    "        self._stream = Stream()\n",
    "        self._stream, self._second = Stream(), Stream()\n",
)
# Each context has its own scratch memory.
OWN_SCRATCH: Change = (
    "plan",
    "context.set_device_memory(self._scratch.address, self._scratch.size)",
    "own = DeviceBuffer(self._scratch.size)\n"
    "        self._all_scratch = [*getattr(self, '_all_scratch', []), own]\n"
    "        context.set_device_memory(own.address, own.size)",
)


def within_the_step(line: str) -> Change:
    """Adds a line to what a single-token step enqueues, plainly or captured."""
    return "engine", ENQUEUE, f"{ENQUEUE}            {line}\n"


# The broken rule, the engine, and the change that breaks it.
MUTATIONS: list[tuple[str, Rule | str, str, list[Change]]] = [
    (
        "an output without an address",
        Rule.ADDRESS_SET,
        IN_PLACE,
        [
            (
                "engine",
                "for name, buffer in self._buffers.items()}",
                "for name, buffer in self._buffers.items() if name != 'logits'}",
            )
        ],
    ),
    (
        "a cache whose parts are not aligned",
        Rule.ADDRESS_ALIGNED,
        IN_PLACE,
        [("kv_cache", "ALIGNMENT = 256", "ALIGNMENT = 1")],
    ),
    (
        "new keys and values that are not aligned",
        Rule.ADDRESS_ALIGNED,
        COPIED,
        [("kv_cache", "ALIGNMENT = 256", "ALIGNMENT = 1")],
    ),
    (
        "too few logits",
        Rule.BUFFER_LARGE_ENOUGH,
        IN_PLACE,
        [("engine", "limits.max_logits * self.vocab_size *", "2 * self.vocab_size *")],
    ),
    (
        "too few write positions",
        Rule.MEMORY_LIVE,
        IN_PLACE,
        [("engine", "DeviceBuffer(limits.max_batch_size * INT64_BYTES)", "DeviceBuffer(8)")],
    ),
    (
        "a cache that was freed",
        Rule.MEMORY_LIVE,
        COPIED,
        [
            (
                "kv_cache",
                "self._spare = new, old\n        self.select_rows(0, len(rows))\n",
                "self._spare = new, None\n        self._count = len(rows)\n",
            )
        ],
    ),
    (
        "a name that the plan does not have",
        Rule.KNOWN_TENSOR,
        IN_PLACE,
        [
            (
                "engine",
                '"input_ids": DeviceBuffer(',
                '"tokens": DeviceBuffer(8), "input_ids": DeviceBuffer(',
            )
        ],
    ),
    (
        "the cache's shape is left out",
        Rule.SHAPE_SET,
        IN_PLACE,
        [
            (
                "engine",
                "        shapes |= dict.fromkeys(self._cache_inputs, (rows, *self._row_shape))\n",
                "",
            )
        ],
    ),
    (
        "prompts in the profile of single tokens",
        Rule.SHAPE_IN_PROFILE,
        IN_PLACE,
        [
            (
                "engine",
                "create_context(CONTEXT_PROFILE, None)",
                "create_context(GENERATION_PROFILE, None)",
            )
        ],
    ),
    (
        "a cache of more rows than the step has",
        Rule.SHAPES_CONSISTENT,
        IN_PLACE,
        [
            (
                "engine",
                "(rows, *self._row_shape)",
                "(self.max_batch_size, *self._row_shape)",
            )
        ],
    ),
    (
        "past and present apart",
        Rule.CACHE_ALIASED,
        IN_PLACE,
        [
            (
                "kv_cache",
                'cache_names("present", self._shape.num_layers)',
                'cache_names("present", self._shape.num_layers)[::-1]',
            )
        ],
    ),
    (
        "new values on top of the cache",
        Rule.OUTPUTS_APART,
        COPIED,
        [("kv_cache", "self._new[key].bind(", "self._filled.bind(")],
    ),
    (
        "no scratch memory",
        Rule.SCRATCH_SET,
        IN_PLACE,
        [
            (
                "plan",
                "        context.set_device_memory(self._scratch.address, self._scratch.size)\n",
                "",
            )
        ],
    ),
    (
        "scratch memory that TensorRT shall manage",
        Rule.SCRATCH_SET,
        IN_PLACE,
        [("plan", "Strategy.USER_MANAGED", "Strategy.STATIC")],
    ),
    (
        "scratch memory that is not aligned",
        Rule.SCRATCH_ALIGNED,
        IN_PLACE,
        [
            (
                "plan",
                "set_device_memory(self._scratch.address,",
                "set_device_memory(self._scratch.address + 8,",
            )
        ],
    ),
    (
        "too little scratch memory",
        Rule.SCRATCH_LARGE_ENOUGH,
        IN_PLACE,
        [
            (
                "plan",
                "self._engine.device_memory_size_v2)",
                "self._engine.device_memory_size_v2 // 2)",
            )
        ],
    ),
    (
        "contexts that share scratch memory at the same time",
        Rule.SCRATCH_EXCLUSIVE,
        IN_PLACE,
        [
            SECOND_STREAM,
            (
                "engine",
                ENQUEUE,
                "        self._prompts.enqueue(self._second.handle)\n\n" + ENQUEUE,
            ),
        ],
    ),
    (
        "contexts that share a profile at the same time",
        Rule.PROFILE_EXCLUSIVE,
        IN_PLACE,
        [
            SECOND_STREAM,
            OWN_SCRATCH,
            (
                "engine",
                ENQUEUE,
                "        twin = self._plan.create_context(GENERATION_PROFILE, None)\n"
                "        self._stream.synchronize()\n"
                "        twin.set(self._addresses, shapes)\n"
                "        twin.enqueue(self._second.handle)\n\n" + ENQUEUE,
            ),
        ],
    ),
    (
        "a profile that the plan does not have",
        Rule.PROFILE_VALID,
        IN_PLACE,
        [
            (
                "engine",
                "create_context(GENERATION_PROFILE, self._nccl)",
                "create_context(2, self._nccl)",
            )
        ],
    ),
    (
        "a profile that is set on another stream",
        Rule.PROFILE_SYNCHRONIZED,
        IN_PLACE,
        [
            (
                "plan",
                "        stream = self._stream.handle\n",
                "        self._other = Stream()\n        stream = self._other.handle\n",
            )
        ],
    ),
    (
        "a capture without a plain run",
        Rule.CAPTURE_AFTER_PLAIN_RUN,
        IN_PLACE,
        [("graphs", "PLAIN_RUNS = 2", "PLAIN_RUNS = 0")],
    ),
    (
        "a graph that outlives a change of its context",
        Rule.GRAPH_MATCHES_CONTEXT,
        IN_PLACE,
        [
            ("engine", "            graphs.clear()\n", "            pass\n"),
            ("engine", "graphs.run(self._cache.place,", "graphs.run(None,"),
        ],
    ),
    (
        "one context for all numbers of logits, with its graphs kept",
        Rule.GRAPH_MATCHES_CONTEXT,
        COPIED,
        [
            ("engine", 'key = (self._batch_size, shapes["logit_positions"][0])', "key = (0, 0)"),
            ("engine", "            graphs.clear()\n", "            pass\n"),
            ("engine", "graphs.run(self._cache.place,", 'graphs.run(shapes["logit_positions"],'),
        ],
    ),
    (
        "a wait in a capture",
        Rule.CAPTURE_HOST_WAIT,
        IN_PLACE,
        [within_the_step("self._stream.synchronize()")],
    ),
    (
        "an allocation in a capture",
        Rule.CAPTURE_ALLOCATION,
        IN_PLACE,
        [within_the_step("DeviceBuffer(8)")],
    ),
    (
        "a copy from pageable memory in a capture",
        Rule.CAPTURE_PAGEABLE_MEMORY,
        IN_PLACE,
        [within_the_step("self._buffers['input_ids'].copy_from(np.zeros(1, int), stream)")],
    ),
    (
        "captures in captures",
        Rule.CAPTURE_PAIRED,
        IN_PLACE,
        [
            (
                "graphs",
                "        call(cudart.cudaStreamBeginCapture(stream, mode))\n",
                "        call(cudart.cudaStreamBeginCapture(stream, mode))\n" * 2,
            )
        ],
    ),
    (
        "logits that are read before they are there",
        NUMBERS,
        IN_PLACE,
        [("engine", SYNCHRONIZE, ".copy_to(logits, stream)\n")],
    ),
    (
        "no wait at all",
        Rule.HOST_COPY_AWAITED,
        "without comparing",
        [("engine", SYNCHRONIZE, ".copy_to(logits, stream)\n")],
    ),
    (
        "copies in the wrong direction",
        Rule.COPY_KIND,
        IN_PLACE,
        [
            (
                "memory",
                "kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice",
                "kind = DEVICE_TO_DEVICE",
            )
        ],
    ),
    (
        "a copy beyond the end of a row",
        Rule.BOX_IN_ARRAY,
        IN_PLACE,
        [("kv_cache", "source.block(source_row, 0)", "source.block(source_row, 1)")],
    ),
    (
        "a graph that is destroyed and launched again",
        Rule.HANDLE_LIVE,
        IN_PLACE,
        [
            (
                "graphs",
                "        call(cudart.cudaGraphLaunch(self._executable, self._stream))",
                "        call(cudart.cudaGraphLaunch(self._executable, self._stream))\n"
                "        cudart.cudaGraphExecDestroy(self._executable)",
            )
        ],
    ),
    (
        "the default stream",
        Rule.NONDEFAULT_STREAM,
        IN_PLACE,
        [("plan", "execute_async_v3(stream)", "execute_async_v3(0)")],
    ),
    (
        "memory that is not freed",
        Rule.RELEASED,
        IN_PLACE,
        [("memory", "            cudart.cudaFree(self.address)\n", "            pass\n")],
    ),
    (
        "a stream that is not destroyed",
        Rule.RELEASED,
        IN_PLACE,
        [("memory", "            cudart.cudaStreamDestroy(self.handle)\n", "            pass\n")],
    ),
    (
        "captured graphs that are not destroyed",
        Rule.RELEASED,
        IN_PLACE,
        [
            (
                "graphs",
                "        finally:\n            cudart.cudaGraphDestroy(graph)\n",
                "        finally:\n            pass\n",
            )
        ],
    ),
    (
        "executable graphs that are not destroyed",
        Rule.RELEASED,
        IN_PLACE,
        [
            (
                "graphs",
                "            cudart.cudaGraphExecDestroy(self._executable)\n",
                "            pass\n",
            )
        ],
    ),
    (
        "a context without a communicator",
        Rule.COMMUNICATOR_SET,
        RANKS,
        [
            (
                "engine",
                "create_context(GENERATION_PROFILE, self._nccl)",
                "create_context(GENERATION_PROFILE, None)",
            )
        ],
    ),
    (
        "the first context without a communicator",
        Rule.COMMUNICATOR_SET,
        RANKS,
        [("engine", "        self._prompts.connect(self._nccl)\n", "")],
    ),
    (
        "NCCL that is destroyed before the graphs",
        Rule.RELEASED,
        RANKS,
        [("engine", "in reversed(list(self.__dict__)):", "in list(self.__dict__):")],
    ),
    (
        "new keys and values that are not stored",
        NUMBERS,
        COPIED,
        [("engine", STORE, "")],
    ),
    (
        "new keys and values that are stored before the step",
        NUMBERS,
        COPIED,
        [
            ("engine", STORE, ""),
            ("engine", PREPARE, PREPARE + STORE),
        ],
    ),
    (
        "tokens that are copied behind the step",
        NUMBERS,
        IN_PLACE,
        [
            (
                "engine",
                "            self._buffers[name].copy_from(value, stream)\n",
                "            pass\n",
            ),
            (
                "engine",
                "            if input_ids.shape[1] == 1:\n",
                "            for name, value in staged.items():\n"
                "                self._buffers[name].copy_from(value, stream)\n"
                "            if input_ids.shape[1] == 1:\n",
            ),
        ],
    ),
    (
        "chosen tokens that are read before they are there",
        NUMBERS,
        IN_PLACE,
        [("steps_ahead", "        self._event.synchronize()\n", "")],
    ),
    (
        "chosen tokens that the next step overwrites before they are read",
        NUMBERS,
        IN_PLACE,
        [("steps_ahead", "results[index % 2].fetch", "results[(index - 1) % 2].fetch")],
    ),
    (
        "chosen tokens that are still copied when their memory is freed",
        Rule.MEMORY_LIVE,
        IN_PLACE,
        [("steps_ahead", "        call(cudart.cudaStreamSynchronize(stream))\n", "        pass\n")],
    ),
    (
        "chosen tokens that the next step does not get",
        NUMBERS,
        IN_PLACE,
        [("engine", ADVANCE, "")],
    ),
    (
        "chosen tokens that the next step gets too late",
        NUMBERS,
        IN_PLACE,
        [("engine", ADVANCE, ""), ("engine", RUN_CHOSEN, RUN_CHOSEN + ADVANCE)],
    ),
    (
        "an event that is not destroyed",
        Rule.RELEASED,
        IN_PLACE,
        [("memory", "            cudart.cudaEventDestroy(self._handle)\n", "            pass\n")],
    ),
    (
        "pinned memory that is not freed",
        Rule.RELEASED,
        IN_PLACE,
        [("memory", "            cudart.cudaFreeHost(self._address)\n", "            pass\n")],
    ),
    (
        "beams that are not moved",
        NUMBERS,
        IN_PLACE,
        [
            (
                "kv_cache",
                "new.copy_row(target, old, int(source), stream)",
                "new.copy_row(target, old, target, stream)",
            )
        ],
    ),
]


class LoneRank:
    """Rank 0 of 2, whose other rank always answers the same."""

    rank, size = 0, 2
    patience_seconds = 300.0

    def exchange(self, value):
        return [value, value]

    def all_reduce(self, value):
        return value + value

    @contextmanager
    def deferred_interrupts(self) -> Iterator[None]:
        yield


@pytest.fixture(scope="module")
def engine_dirs(tiny: Model, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    uneven = simulated(make_ft_checkpoint(folder, UNEVEN), folder / IN_PLACE, UNEVEN_LIMITS)
    quantization = QUANTIZATIONS["int8 cache"]
    checkpoint = tiny.checkpoint(quantization, 1)
    calibrated = tiny.calibrated(quantization, checkpoint)
    copied = simulated(checkpoint, folder / COPIED, LIMITS, calibrated)
    inputs = NetworkInputs(tiny.checkpoint(Quantization(), 2), LIMITS, WHOLE)
    ranks = build_simulated(inputs, folder / RANKS)
    return {IN_PLACE: uneven, COPIED: copied, RANKS: ranks, "without comparing": uneven}


def run_scenario(kind: str, engine_dir: Path, engine_class: type, ranks: LoneRank) -> None:
    """Everything that an engine does, and its end."""
    manifest = read_manifest(engine_dir)
    model = engine_class(engine_dir, manifest)
    if kind in (IN_PLACE, COPIED):
        reference = load_engine(engine_dir, "onnxruntime", num_threads=1).model
        require_same_steps(model, reference, model.vocab_size, 0)
        return
    if kind == RANKS:
        model.join(ranks)
    model.start(1)
    for position in range(5):
        model.step(np.array([[1, 2]]), np.array([2 * position]), np.array([[0, 1]]))
    for position in range(10, 15):
        model.step(np.array([[3]]), np.array([position]), np.array([[0, 0]]))


def notice(
    kind: str, engine_dir: Path, changes: list[Change], folder: Path, monkeypatch
) -> tuple[Simulation, str]:
    """Runs a changed copy; returns what went wrong, or an empty text."""
    # The simulation's book also has violations that Python swallows in `__del__`.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    found, ranks = "", LoneRank()
    with mutated(changes, folder) as modules:
        users = tuple(modules[name] for name in USERS_OF_CUDA)
        with installed(ranks=ranks, users_of_cuda=users) as simulation:
            simulation.is_clean_at_end = False
            try:
                run_scenario(kind, engine_dir, modules["engine"].TensorRtEngine, ranks)
            except AssertionError as error:
                found = str(error) if isinstance(error, Violation) else NUMBERS
                error.__traceback__ = None
            gc.collect()
            if not found and simulation.book.violations:
                found = simulation.book.violations[0]
            elif not found and (simulation.cuda.leaks() or simulation.world.contexts):
                found = Rule.RELEASED.name
    return simulation, found


@pytest.mark.parametrize(
    ("rule", "kind", "changes"),
    [mutation[1:] for mutation in MUTATIONS],
    ids=[mutation[0] for mutation in MUTATIONS],
)
def test_mutation_is_noticed(rule, kind, changes, engine_dirs, tmp_path, monkeypatch):
    _, found = notice(kind, engine_dirs[kind], changes, tmp_path, monkeypatch)
    expected = rule if isinstance(rule, str) else rule.name
    assert found.split(":")[0] == expected, found


@pytest.mark.parametrize("kind", [IN_PLACE, COPIED, RANKS])
def test_unchanged_copy_breaks_no_rule(kind, engine_dirs, tmp_path, monkeypatch):
    simulation, found = notice(kind, engine_dirs[kind], [], tmp_path, monkeypatch)
    assert found == ""
    assert simulation.cuda.launches


def test_every_rule_is_broken_by_a_mutation():
    assert {rule for _, rule, _, _ in MUTATIONS} == {*Rule, NUMBERS}


# --- laziness ------------------------------------------------------------------------------------

KIND = cudart.cudaMemcpyKind


def test_pinned_memory_is_read_and_written_when_cuda_would():
    """A copy that nothing waited for has not happened; it copies the memory's later content."""
    cuda = SimulatedCuda(Book())
    _, device = cuda.cudaMalloc(1)
    _, pinned = cuda.cudaHostAlloc(2, 0)
    host = cuda.memory.find(pinned, 2).reserved
    content = host[pinned - host.ctypes.data :][:2]
    _, stream = cuda.cudaStreamCreate()
    _, event = cuda.cudaEventCreate()
    content[0] = 1
    cuda.cudaMemcpyAsync(device, pinned, 1, KIND.cudaMemcpyHostToDevice, stream)
    content[0] = 2
    cuda.cudaMemcpyAsync(pinned + 1, device, 1, KIND.cudaMemcpyDeviceToHost, stream)
    cuda.cudaEventRecord(event, stream)
    assert content[1] == POISON
    cuda.cudaEventSynchronize(event)
    assert content[1] == 2
