"""Settings of ONNX Runtime on a CPU: length of the cache, exactness of products."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mpt_trt.calibration.block_stream import Computation
from mpt_trt.calibration.calibrate import calibrate
from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.calibration.model_source import open_model
from mpt_trt.calibration.plan import CalibrationPlan
from mpt_trt.calibration.result import read_calibration
from mpt_trt.engines.onnxruntime import cpu_cache
from mpt_trt.engines.onnxruntime.cpu_settings import CpuSettings
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.errors import MptTrtError
from mpt_trt.quantization.schemes import KvCacheType, Quantization, WeightOnly
from support.checkpoints import CheckpointSpec
from support.engines import (
    deviation,
    feed,
    make_ft_checkpoint,
    make_network,
    open_network,
    open_spec,
    random_ids,
    reference,
    step,
)
from support.paths import REPOSITORY

SPEC = CheckpointSpec(num_heads=6, num_kv_heads=2, max_seq_len=160)
LIMITS = BuildLimits(max_batch_size=3, max_input_len=100, max_output_len=50)
FLOAT32_BOUND = 2e-5
WHOLE_CACHE = LIMITS.cache_len


# --- a cache as long as the filled part ----------------------------------------------------------


@pytest.mark.parametrize("pieces", [[100, *[1] * 50], [63, 1, 1, 63, 1, 21], [64, 64, 22]])
def test_a_cache_that_grows_equals_the_plain_model(pieces, tmp_path):
    ids = random_ids(SPEC, rows=2, length=150)
    found = feed(open_spec(tmp_path, SPEC, limits=LIMITS), ids, pieces)
    assert deviation(found, reference(SPEC, ids)) < FLOAT32_BOUND


def test_ragged_rows_grow_and_move(tmp_path):
    """The longest row counts; rows that are swapped later keep what they have."""
    ids = random_ids(SPEC, rows=2, length=140)
    expected = reference(SPEC, ids)
    engine = open_spec(tmp_path, SPEC, limits=LIMITS)
    engine.start(2)
    step(engine, ids[:, :20], [0, 0])
    step(engine, ids[:, 20:110], [20, 20])
    # Row 1 goes on from 10, over what it had.
    rows = np.stack([ids[0, 110:140], ids[1, 10:40]])
    found = step(engine, rows, [110, 10])
    assert deviation(found[0], expected[0, 110:140]) < FLOAT32_BOUND
    assert deviation(found[1], expected[1, 10:40]) < FLOAT32_BOUND
    engine.reorder(np.array([1, 0, 1]))
    swapped = np.stack([ids[1, 40], ids[0, 139], ids[1, 40]])[:, None]
    found = step(engine, swapped, [40, 139, 40])[:, 0]
    for row, (old, position) in enumerate([(1, 40), (0, 139), (1, 40)]):
        assert deviation(found[row], expected[old, position]) < FLOAT32_BOUND


@pytest.mark.parametrize("kv_cache", ["auto", "int8", "fp8"])
def test_the_length_of_the_buffers_does_not_matter(
    kv_cache: KvCacheType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_ft_checkpoint(tmp_path, SPEC)
    calibration = None
    if kv_cache != "auto":
        path, plan = tmp_path / "kv_cache.npz", CalibrationPlan("kv_cache", None)
        samples, weight_dtype = torch.arange(32).reshape(2, 16), np.dtype(np.float32)
        calibrate(open_model(tmp_path / "hf"), samples, plan, Computation(), weight_dtype, path)
        calibration = read_calibration(path, checkpoint)
    calibrated = CalibratedQuantization(Quantization(None, kv_cache), calibration)
    network = make_network(checkpoint, tmp_path / "network", LIMITS, calibrated)
    ids = random_ids(SPEC, rows=2, length=40)
    found = []
    for positions in (4, WHOLE_CACHE):
        monkeypatch.setattr(cpu_cache, "POSITIONS_AT_ONCE", positions)
        found.append(feed(open_network(network), ids, [30, *[1] * 10]))
    assert deviation(found[0], found[1]) < FLOAT32_BOUND


# --- exactness of products -----------------------------------------------------------------------


def test_activations_of_8_bits_are_asked_for_and_said(tmp_path):
    spec = CheckpointSpec(hidden_size=128, num_heads=4)
    calibrated = CalibratedQuantization(Quantization(WeightOnly(4, 32)))
    network = make_network(
        make_ft_checkpoint(tmp_path, spec), tmp_path / "network", calibrated=calibrated
    )
    ids = random_ids(spec, rows=1, length=12)
    exact, rounded = open_network(network), open_network(network, CpuSettings(1, "int8"))
    assert "int8 activations" in rounded.description
    assert "int8" not in exact.description
    difference = deviation(feed(rounded, ids, [11, 1]), feed(exact, ids, [11, 1]))
    assert FLOAT32_BOUND < difference < 0.3, "below: nothing was rounded"


def test_activations_of_8_bits_need_integer_weights(tmp_path):
    network = make_network(make_ft_checkpoint(tmp_path, SPEC), tmp_path / "network")
    with pytest.raises(MptTrtError, match="activations = int8"):
        open_network(network, CpuSettings(1, "int8"))


# --- huge pages ----------------------------------------------------------------------------------

SHOW = """
import os, sys
from pathlib import Path
from mpt_trt.system.process import restart_with_huge_pages
restart_with_huge_pages(Path(sys.argv[1]))
print(os.environ.get("GLIBC_TUNABLES"), *sys.argv[2:])
"""


HUGE = "glibc.malloc.hugetlb=1"
IN_ONE_RANGE = "glibc.malloc.mmap_threshold=33554432"
OTHER = "glibc.malloc.mmap_threshold=4096"


@pytest.mark.parametrize(
    ("offer", "asked", "expected"),
    [
        ("always [madvise] never", None, f"{HUGE}:{IN_ONE_RANGE}"),
        ("always [madvise] never", "a.b=0", f"a.b=0:{HUGE}:{IN_ONE_RANGE}"),
        ("always [madvise] never", OTHER, f"{OTHER}:{HUGE}"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, "None"),
        ("always madvise [never]", None, "None"),
        (None, None, "None"),
    ],
)
def test_huge_pages_are_asked_for_where_they_are_offered(offer, asked, expected, tmp_path):
    setting = tmp_path / "enabled"
    if offer is not None:
        setting.write_text(offer + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if asked is not None:
        environment["GLIBC_TUNABLES"] = asked
    for argument, found in (("an argument", expected), ("--help", asked)):
        command = [sys.executable, "-c", SHOW, setting, argument]
        shown = subprocess.check_output(command, text=True, cwd=REPOSITORY, env=environment)
        assert shown == f"{found} {argument}\n"
