"""llama.cpp's quantizations: which models have them, and their measurement if it is installed."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.commands import measure_llama_cpp as command
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation import llama_cpp, llama_cpp_result
from mpt_trt.evaluation.heldout import HeldOut, read_text, windows
from mpt_trt.evaluation.llama_cpp_result import fits_llama_cpp, read_llama_cpp
from mpt_trt.evaluation.reference import reference_hidden
from support.paths import REPOSITORY

DEMO = REPOSITORY / "resources" / "mpt-demo"


@pytest.fixture(scope="module")
def heldout() -> HeldOut:
    tokens = read_tokenizer(DEMO).encode(read_text(DEMO / "heldout.txt"))
    chosen = windows(tokens, 2, 64)
    hidden = reference_hidden(DEMO, chosen[:, :-1]).numpy()
    return HeldOut(chosen, hidden, "heldout.txt", "xxh3:0", "transformers")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"num_kv_heads": 1}, False),
        ({"norm_type": "rmsnorm"}, False),
        ({"position_embedding": "learned"}, False),
        ({"qk_ln": True}, False),
        ({"bias": True}, False),
        ({"logit_scale": 0.5}, False),
        ({"vocab_size": 4_000_000}, False),
    ],
)
def test_models_that_llama_cpp_computes(change: dict, expected: bool) -> None:
    assert fits_llama_cpp(replace(read_hf_config(DEMO), **change)) == expected


def test_without_its_packages(
    heldout: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "is_llama_cpp_installed", lambda: False)
    with pytest.raises(MptTrtError, match=r"gguf are missing: pip install '\.\[frontier\]'"):
        llama_cpp.measure_llama_cpp(DEMO, None, heldout, tmp_path)


def test_a_killed_run_leaves_its_files_to_the_next_one(
    heldout: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = llama_cpp_result.LlamaCppResult("0", "xxh3:0", (2, 64), ())
    ends = True

    def measure(model_dir: Path, adapter: None, windows: HeldOut, folder: Path, _: object):
        (folder / "f32.gguf").write_bytes(b"weights")
        if ends:
            os._exit(7)
        return result

    monkeypatch.setattr(command, "measure_llama_cpp", measure)
    monkeypatch.setattr(command, "read_heldout", lambda path: heldout)
    target = tmp_path / "results" / "llama_cpp.json"
    options = argparse.Namespace(
        model_dir=str(DEMO), revision="main", adapter=None, reference=DEMO, output=target
    )
    pid = os.fork()
    if pid == 0:
        command.run(options)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert len(list(target.parent.rglob("f32.gguf"))) == 1 and not target.exists()
    ends = False
    command.run(options)
    assert list(target.parent.iterdir()) == [target] and read_llama_cpp(target) == result


@pytest.mark.skipif(
    not llama_cpp_result.is_llama_cpp_installed(), reason="llama-cpp-python and gguf are missing"
)
def test_types_are_measured(heldout: HeldOut, tmp_path: Path) -> None:
    """Larger types are nearer to the reference; GGUF files are deleted."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    found = llama_cpp.measure_llama_cpp(DEMO, None, heldout, folder)
    assert [point.name for point in found.points] == [f"llama.cpp {t}" for t in llama_cpp.TYPES]
    by_name = {point.name: point for point in found.points}
    smallest, largest = by_name["llama.cpp Q4_0"], by_name["llama.cpp Q8_0"]
    assert smallest.megabytes < largest.megabytes and 0 < largest.kl < 0.01 < smallest.kl < 0.3
    assert list(folder.iterdir()) == []
    target = tmp_path / "llama_cpp.json"
    target.write_text(found.to_json())
    assert read_llama_cpp(target) == found
