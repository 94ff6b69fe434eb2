"""The commands of NVIDIA's MPT example, in its own spelling, on the model that ships."""

from __future__ import annotations

import csv
import json
import re
import shutil
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


def test_files_as_editors_and_numpy_write_them(engine_dir: Path, tmp_path: Path) -> None:
    """A BOM and CRLF; rows that are padded with the end token; our own output, beams included."""
    texts = ["def read(self", "class Path"]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    long, short = (tokenizer(text).input_ids for text in texts)
    assert len(long) > len(short)
    (tmp_path / "in.txt").write_bytes("\ufeff{}\r\n{}\r\n".format(*texts).encode())
    np.save(tmp_path / "in.npy", np.array([long, short + [0] * (len(long) - len(short))]))
    np.save(tmp_path / "flat.npy", np.array(short, np.int32))
    common = ("--max_output_len=6", "--input_file")
    expected = run(engine_dir, tmp_path / "out.csv", "--max_output_len=6", "--input_text", *texts)
    for name, rows in (("in.txt", expected), ("in.npy", expected), ("flat.npy", expected[1:])):
        assert run(engine_dir, tmp_path / "out.csv", *common, tmp_path / name) == rows, name
    again = ("--num_beams=2", "--output_npy", tmp_path / "own.npy")
    run(engine_dir, tmp_path / "out.csv", *common, tmp_path / "in.npy", *again)
    assert np.load(tmp_path / "own.npy").shape == (2, 2, 6)
    found = run(engine_dir, tmp_path / "out.csv", *common, tmp_path / "own.npy")
    assert len(found) == 4
    (tmp_path / "own.csv").write_text(
        "".join(
            ",".join(map(str, row)) + "\n" for row in np.load(tmp_path / "own.npy").reshape(4, 6)
        )
    )
    assert run(engine_dir, tmp_path / "out.csv", *common, tmp_path / "own.csv") == found


def test_long_prompts_keep_their_last_tokens(engine_dir: Path, tmp_path: Path) -> None:
    ids = AutoTokenizer.from_pretrained(MODEL)(PROMPTS[1]).input_ids
    (tmp_path / "end.csv").write_text(",".join(map(str, ids[-3:])))
    common = ("--max_output_len=6", "--input_file", tmp_path / "end.csv")
    expected = run(engine_dir, tmp_path / "out.csv", *common)
    cut = ("--max_output_len=6", "--max_input_length=3", "--input_text", PROMPTS[1])
    assert run(engine_dir, tmp_path / "out.csv", *cut) == expected


def test_several_prompts_stream_one_after_the_other(
    engine_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--engine_dir", engine_dir, "--max_output_len=9", "--num_threads=1")
    printed = []
    for more in ((), ("--streaming",)):
        call_tool("run.py", *options, *more, "--input_text", *PROMPTS)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count("Output [Text") == len(PROMPTS)


def test_chat_ends_before_a_stop_string(
    engine_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template makes the prompt of a plain run; the stop string crosses a border of tokens."""
    (tmp_path / "template").write_text("def {{ messages[-1].content }}(self")
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "read"}]
    (tmp_path / "m.json").write_text(json.dumps(messages))
    options = ("--engine_dir", engine_dir, "--max_output_len=12", "--num_threads=1")
    call_tool("run.py", *options, "--input_text", "def read(self")
    plain = capsys.readouterr().out
    text = plain.partition('Beam 0]: "')[2]
    stop = text[5:12]
    chat = ("--chat", "--chat_template", tmp_path / "template", "--stop", "no such text", stop)
    for more in (("--input_file", tmp_path / "m.json"), ("--input_text", "read")):
        call_tool("run.py", *options, *chat, *more)
        found = capsys.readouterr().out
        assert found == plain[: plain.index(text)] + text[: text.index(stop)] + '"\n'


def test_a_conflict_of_end_tokens_is_reported_once(
    engine_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    other = AutoTokenizer.from_pretrained(MODEL).convert_ids_to_tokens(300)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": other}))
    options = ("--engine_dir", engine_dir, "--max_output_len=3", "--tokenizer_dir", folder)
    call_tool("run.py", *options, "--input_text", *PROMPTS)
    message = (
        "text ends with [0]; the tokenizer names [300], which is ignored (run.py --end_id chooses)"
    )
    assert " ".join(capsys.readouterr().err.split()).count(message) == 1
    call_tool("run.py", *options, "--end_id", "300", "0")
    assert "is ignored" not in capsys.readouterr().err


def test_a_tokenizer_beyond_the_vocabulary_is_rejected(engine_dir: Path, tmp_path: Path) -> None:
    """A tokenizer option is always checked; the engine's own only if prompts are texts."""
    engine = shutil.copytree(engine_dir, tmp_path / "engine")
    for folder in (shutil.copytree(MODEL, tmp_path / "tokenizer"), engine / "tokenizer"):
        (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 4096}))
    options = ("run.py", "--engine_dir", engine, "--max_output_len=3", "--trust")
    (tmp_path / "ids.csv").write_text("5,6\n")
    with pytest.raises(MptTrtError, match=r"does not fit the model: token '<\|im_start\|>'"):
        call_tool(*options, "--input_text", "def")
    ids = ("--input_file", tmp_path / "ids.csv")
    with pytest.raises(MptTrtError, match="does not fit the model"):
        call_tool(*options, *ids, "--tokenizer_dir", tmp_path / "tokenizer")
    call_tool(*options, *ids, "--output_csv", tmp_path / "out.csv")
    assert len((tmp_path / "out.csv").read_text().split(",")) == 3


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
        (["--max_output_len=4", "--temperature=0"], "--temperature is 0"),
        (["--max_output_len=4", "--random_seed=-1"], "--random_seed is -1"),
        (["--max_output_len=4", "--num_threads=-3"], "--num_threads = -3"),
        (["--max_output_len=4", "--runtime=tensorrt"], "TensorRT cannot run this engine here"),
        (["--max_output_len=4", "--tokenizer_dir=./nowhere"], "no such folder: ./nowhere"),
        (["--max_output_len=4", "--input_file=prompts.doc"], "prompts.doc: unknown file type"),
        (["--max_output_len=4", "--streaming", "--num_beams=2"], "--num_beams"),
        (["--max_output_len=4", "--max_input_length=0"], "--max_input_length = 0: at least 1"),
        (["--max_output_len=4", "--max_input_length=-5"], "--max_input_length = -5: at least 1"),
        (["--max_output_len=4", "--input_text", "a\udcff"], "prompt 0 is not valid UTF-8"),
        (["--max_output_len=4", "--stop", ""], "--stop"),
        (["--max_output_len=4", "--chat"], "--chat_template"),
    ],
)
def test_bad_requests_are_rejected(engine_dir: Path, options: list[str], message: str) -> None:
    with pytest.raises(MptTrtError, match=re.escape(message)):
        call_tool("run.py", "--engine_dir", engine_dir, *options)


def test_two_outputs_need_two_files(engine_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for other in ("out", "link"):
        outputs = [f"--output_csv={tmp_path / 'out'}", f"--output_npy={tmp_path / other}"]
        with pytest.raises(MptTrtError, match="also --output_npy; name two different files"):
            call_tool("run.py", "--engine_dir", engine_dir, "--max_output_len=1", *outputs)
    assert not (tmp_path / "out").exists()


def test_a_bad_request_gets_one_line(engine_dir: Path) -> None:
    result = script("run.py", "--engine_dir", engine_dir, "--max_output_len=4", "--temperature=0")
    assert "temperature" in one_line_error(result)


def test_another_folder_is_no_engine(tmp_path: Path) -> None:
    result = script("run.py", "--engine_dir", tmp_path, "--max_output_len=4")
    assert result.returncode == 1
    assert f"{tmp_path / 'config.json'}: no such file" in result.stderr
