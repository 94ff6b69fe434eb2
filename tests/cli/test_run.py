"""The commands of NVIDIA's MPT example, in its own spelling, on the model that ships."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, MptForCausalLM

from mpt_trt.errors import MptTrtError
from support.engines import call_tool, one_line_error
from support.paths import REPOSITORY

MODEL = REPOSITORY / "resources" / "mpt-demo"
PROMPTS = ["def read(self", "import os\n\n\nclass Path", "The"]


def script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = REPOSITORY / "workflow_scripts" / name
    return subprocess.run(
        [sys.executable, path, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def succeed(name: str, *arguments: str | Path) -> str:
    result = script(name, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    ft = folder / "ft_ckpts/mpt-demo/fp32"
    call_tool("convert_hf_mpt_to_ft.py", "-i", MODEL, "-o", ft, "-t", "float32")
    engine = folder / "trt_engines/mpt-demo/fp32/1-gpu"
    call_tool(
        "build.py",
        f"--model_dir={ft}/1-gpu",
        "--max_batch_size=16",
        "--max_input_len=32",
        "--max_output_len=64",
        "--use_gpt_attention_plugin",
        "--use_gemm_plugin",
        "--output_dir",
        engine,
    )
    return engine


@pytest.fixture(scope="module")
def reference() -> MptForCausalLM:
    return MptForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def run(engine_dir: Path, output: Path, *options: str | Path) -> list[list[int]]:
    """Token ids of every output, as run.py writes them."""
    arguments = ["--engine_dir", engine_dir, "--tokenizer_dir", MODEL, "--output_csv", output]
    call_tool("run.py", *arguments, "--num_threads=1", *options)
    with output.open(newline="") as stream:
        return [[int(cell) for cell in row] for row in csv.reader(stream)]


def generated(model: MptForCausalLM, text: str, count: int, **options: object) -> list[list[int]]:
    """Continues the text with transformers, up to the end token."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompt = tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        outputs = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=0,
            **options,
        )
    rows = outputs[:, prompt.shape[1] :].tolist()
    return [row[: row.index(0) + 1] if 0 in row else row for row in rows]


def test_greedy_equals_transformers(
    engine_dir: Path, reference: MptForCausalLM, tmp_path: Path
) -> None:
    """A ragged batch, one of whose prompts is fed in pieces."""
    long = (MODEL / "heldout.txt").read_text()[:100]
    prompts = [*PROMPTS, long]
    found = run(
        engine_dir, tmp_path / "out.csv", "--max_output_len", "24", "--input_text", *prompts
    )
    assert len(AutoTokenizer.from_pretrained(MODEL)(long).input_ids) > 32
    assert found == [generated(reference, text, 24)[0] for text in prompts]


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beams_equal_transformers(
    engine_dir: Path, reference: MptForCausalLM, tmp_path: Path, num_beams: int
) -> None:
    found = run(
        engine_dir,
        tmp_path / "out.csv",
        "--max_output_len=20",
        f"--num_beams={num_beams}",
        "--input_text",
        *PROMPTS,
    )
    expected = [
        row
        for text in PROMPTS
        for row in generated(
            reference, text, 20, num_beams=num_beams, num_return_sequences=num_beams
        )
    ]
    assert found == expected


def test_repetition_penalty_equals_transformers(
    engine_dir: Path, reference: MptForCausalLM, tmp_path: Path
) -> None:
    found = run(
        engine_dir,
        tmp_path / "out.csv",
        "--max_output_len=20",
        "--repetition_penalty=1.3",
        "--input_text",
        PROMPTS[0],
    )
    assert found == generated(reference, PROMPTS[0], 20, repetition_penalty=1.3)


def test_sampling_follows_the_seed(engine_dir: Path, tmp_path: Path) -> None:
    options = ("--max_output_len=16", "--top_k=0", "--top_p=0.95", "--temperature=1.2")
    texts = ("--input_text", *PROMPTS)
    first = run(engine_dir, tmp_path / "1.csv", *options, "--random_seed=7", *texts)
    again = run(engine_dir, tmp_path / "2.csv", *options, "--random_seed=7", *texts)
    other = run(engine_dir, tmp_path / "3.csv", *options, "--random_seed=8", *texts)
    assert first == again
    assert first != other


def test_text_is_printed_as_nvidias_script_does(engine_dir: Path) -> None:
    """The tokenizer is found without being named: the engine knows its checkpoint."""
    output = succeed("run.py", "--max_output_len", "10", "--engine_dir", engine_dir)
    lines = output.splitlines()
    assert lines[0] == 'Input [Text 0]: "Born in north-east France, Soyer trained as a"'
    assert lines[1].startswith('Output [Text 0 Beam 0]: "')


def test_streaming_prints_the_same_text(engine_dir: Path, reference: MptForCausalLM) -> None:
    output = succeed(
        "run.py",
        "--engine_dir", engine_dir,
        "--max_output_len=24",
        "--input_text", PROMPTS[0],
        "--streaming",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = generated(reference, PROMPTS[0], 24)[0]
    assert output.rstrip("\n") == tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\n")


def test_prompts_from_files(engine_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = ["def read(self", "class Path"]
    ids = [tokenizer(text).input_ids for text in texts]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "in.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in ids))
    np.save(tmp_path / "in.npy", np.array([ids[0]]))
    expected = run(engine_dir, tmp_path / "out.csv", "--max_output_len=8", "--input_text", *texts)
    for name, rows in (("in.txt", expected), ("in.csv", expected), ("in.npy", expected[:1])):
        options = ("--max_output_len=8", "--input_file", tmp_path / name)
        assert run(engine_dir, tmp_path / "out.csv", *options) == rows


def test_array_output_is_padded(engine_dir: Path, tmp_path: Path) -> None:
    call_tool(
        "run.py",
        "--engine_dir", engine_dir,
        "--max_output_len=8",
        "--num_beams=2",
        "--output_npy", tmp_path / "out.npy",
        "--input_text", *PROMPTS,
    )  # fmt: skip
    assert np.load(tmp_path / "out.npy").shape[:2] == (len(PROMPTS), 2)


def test_end_id_ends_the_output(
    engine_dir: Path, reference: MptForCausalLM, tmp_path: Path
) -> None:
    tokens = generated(reference, PROMPTS[0], 16)[0]
    found = run(
        engine_dir,
        tmp_path / "out.csv",
        "--max_output_len=16",
        f"--end_id={tokens[5]}",
        "--input_text",
        PROMPTS[0],
    )
    assert found == [tokens[: tokens.index(tokens[5]) + 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_output_len=900"], "a cache row holds 96"),
        (["--max_output_len=4", "--num_beams=17"], "17 cache rows, but the model has 16"),
        (["--max_output_len=4", "--temperature=0"], "temperature"),
        (["--max_output_len=4", "--runtime=tensorrt"], "TensorRT cannot run this engine here"),
        (["--max_output_len=4", "--tokenizer_dir=./nowhere"], "no such folder: ./nowhere"),
        (["--max_output_len=4", "--input_file=prompts.doc"], "prompts.doc: unknown file type"),
        (["--max_output_len=4", "--streaming", "--num_beams=2"], "num_beams"),
    ],
)
def test_bad_requests_are_rejected(engine_dir: Path, options: list[str], message: str) -> None:
    with pytest.raises(MptTrtError, match=re.escape(message)):
        call_tool("run.py", "--engine_dir", engine_dir, *options)


def test_a_bad_request_gets_one_line(engine_dir: Path) -> None:
    result = script("run.py", "--engine_dir", engine_dir, "--max_output_len=4", "--temperature=0")
    assert "temperature" in one_line_error(result)


def test_another_folder_is_no_engine(tmp_path: Path) -> None:
    result = script("run.py", "--engine_dir", tmp_path, "--max_output_len=4")
    assert result.returncode == 1
    assert f"{tmp_path / 'config.json'}: no such file" in result.stderr
