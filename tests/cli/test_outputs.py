"""Output files never replace what the command reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpt_trt.errors import MptTrtError
from support.built import Built
from support.engines import call_tool

# Options of each command; {}: the output, which is one of the command's inputs.
COMMANDS = {
    "check_facts.py": "--model=toy --facts={} --output={}",
    "compare_trtllm.py": "--engine_dir=engine --generation={} --model_dir=hf --output={}",
    "compute_reference.py": "--model_dir=hf --text={} --output={}",
    "encode_prompt.py": "--model_dir=hf --prompt=x --output=hf/tokenizer.json",
    "measure_facts.py": "--engine_dir=engine --facts={} --output={}",
    "measure_quality.py": "--engine_dir=engine --model_dir=hf --reference={} --output={}",
    "run.py": "--engine_dir=engine --max_output_len=1 --input_file={}.npy --output_npy={}.npy",
    "smoke_test.py": "--engine_dir=engine --model_dir=hf --output=engine/config.json",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_inputs_are_kept(
    command: str, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("hf", "engine"):
        Path(name).symlink_to(getattr(built, name))
    for name in ("file", "file.npy"):
        Path(name).write_text("kept")
    options = COMMANDS[command].format("file", "file").split()
    output = Path(options[-1].partition("=")[2])
    before = output.read_bytes()
    with pytest.raises(MptTrtError, match=f"^{output}: not replaced, because it is read from"):
        call_tool(command, *options)
    assert output.read_bytes() == before
