"""quantize.py as users call it, and the samples that models read."""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpt_trt.calibration.result import read_calibration
from mpt_trt.calibration.samples import read_samples
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import read_ft_checkpoint
from mpt_trt.ft.int8 import Int8Conversion
from mpt_trt.quantization.schemes import GROUPED
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.engines import call_tool
from support.ft import random_amax, write_ft
from support.paths import REPOSITORY

TEXT = REPOSITORY / "mpt_trt" / "calibration" / "calibration.txt"
README = REPOSITORY / "resources" / "README.md"
DEMO = REPOSITORY / "resources" / "mpt-demo"
SPEC = CheckpointSpec(num_heads=6, num_kv_heads=2)
FEW = ("--calib_size=3", "--calib_max_seq_length=20", "--device=cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("quantize") / "hf", SPEC)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text for the tests' tokenizers, with one token per character."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 5)
    return path


def quantize(model: Path, text: Path, target: Path, *options: str) -> Path:
    call_tool(
        "quantize.py", f"--model_dir={model}", f"--calib_text={text}", f"--export_path={target}",
        *FEW, *options,
    )  # fmt: skip
    return target / "mpt_tp1_rank0.npz"


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_files_of_others_are_kept(
    content: bytes | None, model: Path, text: Path, tmp_path: Path
) -> None:
    """Files of NVIDIA's tools have the same names, also of arrays."""
    target = tmp_path / "mpt_tp1_rank0.npz"
    if content is None:
        np.savez(target, scale=np.ones(3))
    else:
        target.write_bytes(content)
    before = target.read_bytes()
    with pytest.raises(MptTrtError, match=f"^{target}: not replaced, .* with --force$"):
        quantize(model, text, tmp_path, "--qformat=kv_cache")
    assert target.read_bytes() == before
    quantize(model, text, tmp_path, "--qformat=kv_cache", "--force")
    first = target.read_bytes()
    assert quantize(model, text, tmp_path, "--qformat=kv_cache").read_bytes() == first


def test_a_link_to_an_input_is_never_written_through(
    model: Path, text: Path, tmp_path: Path
) -> None:
    target = tmp_path / "mpt_tp1_rank0.npz"
    for source in (model / "config.json", text):
        content = source.read_bytes()
        target.symlink_to(source)
        with pytest.raises(MptTrtError, match=f"^{target}: not replaced, because it is a link"):
            quantize(model, text, tmp_path, "--qformat=kv_cache", "--force")
        assert source.read_bytes() == content
        target.unlink()


@pytest.mark.parametrize("qformat", ["int4_awq", "int4_gptq", "fp8", "int8_sq", "kv_cache"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_format_and_type(
    qformat: str, dtype: str, model: Path, text: Path, tmp_path: Path
) -> None:
    path = quantize(model, text, tmp_path / "a", f"--qformat={qformat}", f"--dtype={dtype}")
    write_ft(model, tmp_path / "ft")
    result = read_calibration(path, read_ft_checkpoint(tmp_path / "ft"))
    assert result.quantization_format == qformat
    # 12 features for each of 4 ranks: no larger group lies within one.
    assert result.group_size == (16 if qformat in GROUPED else None)
    if qformat in GROUPED:
        stored = result.file.array("_np:layers:0:mlp:fc:weight").dtype
        assert stored == ("float16" if dtype == "float16" else "float32")


@pytest.mark.parametrize("qformat", ["int4_awq", "int4_gptq", "fp8"])
def test_same_input_same_bytes(qformat: str, model: Path, text: Path, tmp_path: Path) -> None:
    """The form of the checkpoint makes no difference."""
    first, second = (
        quantize(model, text, tmp_path / name, f"--qformat={qformat}") for name in "ab"
    )
    write_ft(model, tmp_path / "ft", tp_size=2)
    from_ft = quantize(
        tmp_path / "ft", text, tmp_path / "c", f"--qformat={qformat}", f"--tokenizer_dir={model}"
    )
    assert first.read_bytes() == second.read_bytes() == from_ft.read_bytes()


def test_group_size_is_an_option(model: Path, text: Path, tmp_path: Path) -> None:
    wide = write_checkpoint(tmp_path / "hf", replace(SPEC, hidden_size=96))
    path = quantize(wide, text, tmp_path / "a", "--qformat=int4_awq", "--awq_block_size=32")
    write_ft(wide, tmp_path / "ft")
    assert read_calibration(path, read_ft_checkpoint(tmp_path / "ft")).group_size == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--qformat=int4_awq", "--awq_block_size=64"], "group_size = 64: .* valid sizes are 16"),
        (["--qformat=fp8", "--awq_block_size=64"], "fp8 has no groups"),
        (["--qformat=mixed"], "--qformat = mixed: give its --bits per weight"),
        (["--qformat=int4_gptq", "--bits=5.5"], "5.5: only mixed .* int4_gptq; leave --bits out"),
        (["--qformat=int4_gptq", "--scales=error"], "only int4_awq has a choice of scales"),
        (["--qformat=fp8", "--calib_size=40"], r"225 tokens, but 40 samples of 20 tokens are 800"),
        (["--qformat=fp8", "--calib_size=0"], "--calib_size = 0: at least 1 is required"),
        (["--qformat=fp8", "--batch_size=0"], "--batch_size = 0: at least 1 is required"),
        (["--qformat=fp8", "--tokenizer_dir=nowhere/at/all"], "no such folder: nowhere/at/all"),
        (["--qformat=fp8", "--calib_text=nowhere.txt"], r"nowhere\.txt: cannot be read"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], message: str, model: Path, text: Path, tmp_path: Path
) -> None:
    assert_refused(message, model, text, tmp_path / "a", *options)


def assert_refused(message: str, model: Path, text: Path, target: Path, *options: str) -> None:
    """The command fails with the message and leaves nothing."""
    with pytest.raises(MptTrtError, match=message):
        quantize(model, text, target, *options)
    assert not target.exists() or not list(target.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(model: Path, text: Path, tmp_path: Path) -> None:
    message = "--device = cuda: PyTorch finds no GPU; choose cpu or auto"
    assert_refused(message, model, text, tmp_path / "a", "--qformat=fp8", "--device=cuda")


def test_models_without_legal_groups_are_refused(text: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "hf", replace(SPEC, hidden_size=60))
    message = "60, 240 input features .* valid sizes are none"
    assert_refused(message, model, text, tmp_path / "a", "--qformat=int4_awq")


def test_smoothed_checkpoints_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    write_ft(model, tmp_path / "ft", int8=Int8Conversion(random_amax(SPEC), 0.5, {}))
    message = "smoothed for int8, not a full-precision checkpoint"
    options = ("--qformat=fp8", f"--tokenizer_dir={model}")
    assert_refused(message, tmp_path / "ft", text, tmp_path / "a", *options)


def test_ft_checkpoints_of_unknown_provenance_need_a_tokenizer(
    model: Path, text: Path, tmp_path: Path
) -> None:
    write_ft(model, tmp_path / "ft")
    (tmp_path / "ft" / "manifest.json").unlink()
    message = "does not record where its checkpoint came from; give --tokenizer_dir"
    assert_refused(message, tmp_path / "ft", text, tmp_path / "a", "--qformat=fp8")


def test_modelopt_is_imported_by_calibration_alone() -> None:
    """ModelOpt takes seconds to import; reading results needs neither it nor PyTorch."""
    code = (
        "import sys, mpt_trt.calibration.result, mpt_trt.cli.engine_requests;"
        "assert 'torch' not in sys.modules;"
        "import mpt_trt.evaluation.reference, mpt_trt.calibration.calibrate;"
        "assert 'modelopt' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


# --- reading -------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 40))
def test_samples_are_spread_over_the_text(number: int, length: int) -> None:
    tokens = beginning().encode(TEXT.read_text())
    samples = read_samples(TEXT, beginning(), number, length)
    assert samples.shape == (number, length) and samples.dtype == torch.int64
    assert samples[0].tolist() == tokens[:length]
    if number > 1:
        assert samples[-1].tolist() == tokens[-length:]


@functools.cache
def beginning() -> _Beginning:
    return _Beginning(read_tokenizer(DEMO))


class _Beginning:
    """A tokenizer that reads the beginning of a text."""

    def __init__(self, tokenizer):
        self._encode = functools.cache(tokenizer.encode)

    def encode(self, text: str) -> list[int]:
        return self._encode(text[:4000])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("déjà vu".encode("latin-1"), "cannot be read as UTF-8 text"),
        ("text".encode("utf-16-le"), "contains NUL characters"),
    ],
)
def test_texts_in_other_encodings_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.txt"
    path.write_bytes(content)
    with pytest.raises(MptTrtError, match=rf"other\.txt: .*{message}.*; convert it to UTF-8$"):
        read_samples(path, read_tokenizer(DEMO), 1, 1)


@pytest.mark.parametrize(
    "content", ["\ufeffdef f\ndef g\n", "def f\r\ndef g\r\n", "def f\rdef g\r"]
)
def test_marks_and_line_ends_do_not_change_the_samples(tmp_path: Path, content: str) -> None:
    path, tokenizer = tmp_path / "text.txt", read_tokenizer(DEMO)
    path.write_bytes(content.encode())
    expected = tokenizer.encode("def f\ndef g\n")
    assert read_samples(path, tokenizer, 1, len(expected)).tolist() == [expected]


def test_the_default_text_is_enough_and_holds_nothing_held_out() -> None:
    text = TEXT.read_text()
    assert hashlib.sha256(text.encode()).hexdigest() in README.read_text()
    assert len(read_tokenizer(DEMO).encode(text)) > 2 * 32 * 512
    heldout = (DEMO / "heldout.txt").read_text().split("<|endoftext|>")
    assert len(heldout) == 21
    paragraphs = {p for document in heldout for p in document.split("\n\n") if len(p) >= 80}
    assert len(paragraphs) > 300
    assert not [p for p in paragraphs if p in text]
