"""Tokenizers, special tokens and chat templates against transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as TokenizerFile
from transformers import AutoTokenizer

from mpt_trt.checkpoint.chat import chat_prompt, choose_template, read_conversations
from mpt_trt.checkpoint.source import tokenizer_folder, tokenizer_folder_of
from mpt_trt.checkpoint.special_tokens import describe_conflict, read_special_tokens
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.checkpoint.tokenizer_files import tokenizer_files
from mpt_trt.errors import MptTrtError
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.paths import REPOSITORY

DEMO = REPOSITORY / "resources" / "mpt-demo"
VOCAB_SIZE = 4096
TEXT = "<|im_start|>user\ndef add(a, b):\n    return a + b<|im_end|>"
START = {
    "content": "<|im_start|>", "lstrip": False, "normalized": False, "rstrip": False,
    "single_word": False, "special": True,
}  # fmt: skip
END = {**START, "content": "<|im_end|>"}
CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    "added_tokens_decoder": {"added_tokens_decoder": {"4096": START, "4097": END}},
    "additional_special_tokens": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    "no bos": {"add_bos_token": False},
    "eos": {"add_eos_token": True},
    # What transformers writes if a tokenizer has no maximum length.
    "no maximum": {"model_max_length": int(1e30)},
    "GPTNeoX": {"tokenizer_class": "GPTNeoXTokenizer", "add_bos_token": False},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(DEMO / name, tmp_path / name)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


@pytest.mark.parametrize("change", CHANGES)
def test_ids_are_those_of_transformers(folder: Path, change: str) -> None:
    edit(folder / "tokenizer_config.json", **CHANGES[change])
    expected = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    assert read_tokenizer(folder).encode(TEXT) == expected


@pytest.mark.parametrize("has_own_config", [True, False])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2TokenizerFast", None])
def test_a_class_in_the_models_config(folder: Path, name: str | None, has_own_config: bool) -> None:
    """It counts if tokenizer_config.json names no class."""
    path = folder / "tokenizer_config.json"
    if has_own_config:
        content = json.loads(path.read_text())
        content.pop("tokenizer_class")
        path.write_text(json.dumps(content))
    else:
        path.unlink()
    edit(folder / "config.json", tokenizer_class=name)
    expected, found = AutoTokenizer.from_pretrained(str(folder)), read_tokenizer(folder)
    assert found.encode(TEXT) == expected(TEXT).input_ids
    assert (found.eos_token_id, found.pad_token_id) == (
        expected.eos_token_id,
        expected.pad_token_id,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2}},
        {"attn_config": {"alibi": True, "clip_qkv": 6}},
        {"expansion_ratio": 2.5},
        {"model_type": "mosaic_gpt"},
        {"model_type": "replit_lm", "auto_map": {"AutoConfig": "x.ReplitLMConfig"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_named", [True, False], ids=["class named", "no class named"])
def test_models_that_transformers_does_not_read(
    folder: Path, changes: dict[str, Any], is_named: bool
) -> None:
    """A tokenizer next to such a config.json is read like one of transformers' MPT."""
    if not is_named:
        path = folder / "tokenizer_config.json"
        content = json.loads(path.read_text())
        content.pop("tokenizer_class")
        path.write_text(json.dumps(content))
    expected = AutoTokenizer.from_pretrained(str(folder))(TEXT)["input_ids"]
    edit(folder / "config.json", **changes)
    assert read_tokenizer(folder).encode(TEXT) == expected


def test_tokens_of_a_file_of_their_own(folder: Path) -> None:
    edit(folder / "added_tokens.json", **{"<|im_start|>": 4096, "<|im_end|>": 4097})
    tokens = read_tokenizer(folder).encode(TEXT)
    assert tokens == AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    assert {4096, 4097} <= set(tokens)


def test_saved_truncation_and_padding_are_ignored(folder: Path) -> None:
    expected = read_tokenizer(folder).encode(TEXT)
    saved = TokenizerFile.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(max_length=4)
    saved.enable_padding(length=64, pad_id=0, pad_token="<|endoftext|>")
    saved.save(str(folder / "tokenizer.json"))
    assert read_tokenizer(folder).encode(TEXT) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-LFS pointer"),
        ("{}", "not a tokenizer that transformers reads"),
        ("[]", "tokenizer.json"),
        ('{"model": ', "tokenizer.json"),
    ],
)
def test_damaged_tokenizers_get_one_sentence(folder: Path, content: str, message: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(MptTrtError, match=message):
        read_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "merges.txt", "generation_config.json"])
def test_a_folder_with_the_name_of_a_file(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    with pytest.raises(MptTrtError, match=f"^{folder / name}: not a file; put the file of that"):
        read_tokenizer(folder)


def test_no_folder_for_temporary_files_is_needed(folder: Path, tmp_path: Path) -> None:
    """Containers have read-only file systems."""
    code = (
        "import sys, tempfile; from pathlib import Path; tempfile._candidate_tempdir_list = list; "
    )
    code += "from mpt_trt.checkpoint.tokenizer import read_tokenizer; "
    code += "print(read_tokenizer(Path(sys.argv[1])).encode('def f'))"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == read_tokenizer(folder).encode("def f")


def test_panics_print_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    single = [{"SpecialToken": {"id": "absent", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    edit(folder / "tokenizer.json", post_processor=template)
    with pytest.raises(MptTrtError, match=r"tokenizer\.json: not a tokenizer"):
        read_tokenizer(folder)
    assert "panicked" not in capfd.readouterr().err


NOTEBOOK = """
import sys, types
from pathlib import Path

sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=object)
sys.modules["ipywidgets"] = None
sys.stderr = sys.stdout  # not the process's own, as in a notebook
from mpt_trt.checkpoint.tokenizer import read_tokenizer
print(read_tokenizer(Path(sys.argv[1])).encode("def"), "tqdm" in sys.modules)
"""


def test_notebooks_without_widgets_are_not_asked_for_them(folder: Path) -> None:
    """tqdm, which transformers imports, recognises a notebook by these two modules."""
    command = [sys.executable, "-c", NOTEBOOK, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    (line,) = result.stdout.splitlines()
    assert line.endswith("] True")


def test_text_that_is_not_utf8(folder: Path) -> None:
    with pytest.raises(MptTrtError, match="not valid UTF-8"):
        read_tokenizer(folder).encode("a\udcff")


def test_a_tokenizer_beyond_the_vocabulary_is_rejected(folder: Path) -> None:
    tokenizer = read_tokenizer(folder)
    assert tokenizer.require_fitting(VOCAB_SIZE) is tokenizer
    with pytest.raises(MptTrtError, match=r"does not fit the model: token .* has id 4000"):
        tokenizer.require_fitting(4000)


def test_a_pad_token_beyond_the_vocabulary_is_accepted(folder: Path) -> None:
    """Scripts add one without a row of the embedding; only a text that contains it is rejected."""
    expected = read_tokenizer(folder).encode(TEXT)
    edit(folder / "tokenizer_config.json", pad_token="[PAD]")
    tokenizer = read_tokenizer(folder).require_fitting(VOCAB_SIZE)
    assert tokenizer.pad_token_id == VOCAB_SIZE
    assert tokenizer.encode(TEXT) == expected
    with pytest.raises(MptTrtError, match=r"token '\[PAD\]' has id 4096, but the vocabulary"):
        tokenizer.encode("def[PAD]")


def test_a_tokenizer_without_its_main_file(folder: Path) -> None:
    """The error names a file that is there, and the one that chooses how it is read."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    with pytest.raises(MptTrtError, match=r"vocab\.json: not a token.*tokenizer_config\.json"):
        read_tokenizer(folder)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([0, 7], None, (0, 7)),
        ([7, 0], [3], (7, 0)),
        (None, [9, 4], (9, 4)),
        (None, [4, 9], (4, 9)),
        (5, 6, (5,)),
        (None, 6, (6,)),
        (None, None, (0,)),
        (None, -1, (0,)),
    ],
)
def test_end_tokens(
    folder: Path, generation: object, config: object, expected: tuple[int, ...]
) -> None:
    edit(folder / "generation_config.json", eos_token_id=generation)
    edit(folder / "config.json", eos_token_id=config, bos_token_id=2)
    found = read_special_tokens(folder, folder, VOCAB_SIZE)
    assert (found.bos_id, found.end_ids) == (2, expected)
    ignored = {3: (3,), 6: (6,)} if generation else {}
    key = config[0] if isinstance(config, list) else config
    assert found.ignored_end_ids == ({"config.json": ignored[key]} if key in ignored else {})


def test_end_token_of_special_tokens_map(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id=None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    edit(folder / "special_tokens_map.json", eos_token="def")
    expected = AutoTokenizer.from_pretrained(folder).eos_token_id
    assert read_special_tokens(folder, folder, VOCAB_SIZE).end_ids == (expected,)


def test_a_conflict_between_files_is_recorded_and_described(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[5])
    edit(folder / "config.json", eos_token_id=[6, 5], bos_token_id=2)
    found = read_special_tokens(folder, folder, VOCAB_SIZE)
    assert found.ignored_end_ids == {"config.json": (6, 5)}
    assert describe_conflict(found.end_ids, found.ignored_end_ids) == (
        "text ends with [5]; config.json names [6, 5], which is ignored (run.py --end_id chooses)"
    )


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(None, 50278, (0,)), ([7, 4096], 6, (7,)), ([4096], 6, (6,)), (None, [4095, 4096], (4095,))],
)
def test_end_tokens_beyond_the_vocabulary_are_left_out(
    folder: Path,
    generation: object,
    config: object,
    expected: tuple[int, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The model cannot generate them; the tokenizer's comes last."""
    edit(folder / "generation_config.json", eos_token_id=generation)
    edit(folder / "config.json", eos_token_id=config, bos_token_id=50278)
    found = read_special_tokens(folder, folder, VOCAB_SIZE)
    assert (found.bos_id, found.end_ids) == (0, expected)
    assert all("is ignored: the vocabulary is 0..4095" in r.getMessage() for r in caplog.records)
    assert len(caplog.records) == 2


def test_tokens_of_a_tokenizer_beyond_the_vocabulary_are_left_out(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id=None, bos_token_id=None)
    assert read_special_tokens(folder, folder, VOCAB_SIZE).end_ids == (0,)
    edit(folder / "tokenizer_config.json", eos_token="def")
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    found = read_special_tokens(folder, folder, end)
    assert (found.bos_id, found.end_ids) == (0, ())


@pytest.mark.parametrize("value", ["</s>", [0, "x"], True, 1.5])
def test_malformed_end_tokens(folder: Path, value: object) -> None:
    edit(folder / "config.json", eos_token_id=value)
    with pytest.raises(MptTrtError, match=r"config\.json: eos_token_id = "):
        read_special_tokens(folder, folder, VOCAB_SIZE)


def test_recorded_folders_are_not_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for recorded in ({"source": "owner/name"}, {"kind": "folder", "source": "owner/name"}):
        with pytest.raises(MptTrtError, match=r"^no such folder: owner/name.*--tokenizer_dir"):
            tokenizer_folder_of(tmp_path / "engine", recorded, None)
    (tmp_path / "engine/tokenizer").mkdir(parents=True)
    found = tokenizer_folder_of(tmp_path / "engine", {"source": "owner/name"}, None)
    assert found == tmp_path / "engine/tokenizer"


def test_a_tokenizer_within_an_engine_directory(folder: Path, tmp_path: Path) -> None:
    """--tokenizer_dir takes an FT checkpoint or engine directory for the tokenizer in it."""
    engine = tmp_path / "engine"
    shutil.copytree(DEMO, engine / "tokenizer")
    assert tokenizer_folder(str(engine)) == engine / "tokenizer"
    assert tokenizer_folder(str(folder)) == folder


MESSAGES = [{"role": "user", "content": "Why?"}]


def test_templates_of_the_tokenizer_and_of_a_file(folder: Path, tmp_path: Path) -> None:
    template = "{{ messages[0].content }}!{% if add_generation_prompt %}>{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = read_tokenizer(folder)
    assert folder / "chat_template.jinja" in tokenizer_files(folder)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=False
    )
    tokens = chat_prompt(tokenizer, choose_template(tokenizer, []), MESSAGES)
    assert tokenizer.decode(tokens) == expected == "Why?!>"
    (tmp_path / "own").write_text("{{ messages[0].role }}")
    own = choose_template(tokenizer, [], tmp_path / "own")
    assert tokenizer.decode(chat_prompt(tokenizer, own, MESSAGES)) == "user"


BLURB = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
HONEST = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers."
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mosaicml/mpt-7b-instruct", f"{BLURB}\n### Instruction:\nWhy?\n### Response:\n"),
        ("mosaicml/mpt-30b-instruct", f"{BLURB}\n\n###Instruction\nWhy?\n\n### Response\n"),
        ("x/mpt-7b-8k-instruct", f"{BLURB}\n\n###Instruction\nWhy?\n\n### Response\n"),
        (
            "checkpoints/mpt-30b-chat",
            f"<|im_start|>system\n{HONEST}<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_templates_of_model_cards(folder: Path, name: str, text: str) -> None:
    tokenizer = read_tokenizer(folder)
    template = choose_template(tokenizer, ["something", name])
    assert tokenizer.decode(chat_prompt(tokenizer, template, MESSAGES)) == text
    assert template.stop == (("<|im_end|>",) if "chat" in name else ())
    with pytest.raises(MptTrtError, match="--chat_template"):
        choose_template(tokenizer, ["mpt-7b"])


@pytest.mark.parametrize(
    "content", [MESSAGES, {"messages": MESSAGES}, [MESSAGES], [{"messages": MESSAGES}]]
)
def test_conversations(tmp_path: Path, content: object) -> None:
    (tmp_path / "m.json").write_text("\ufeff" + json.dumps(content))
    assert read_conversations(tmp_path / "m.json") == [MESSAGES]


@pytest.mark.parametrize("content", ["[]", "{}", "3", '[{"role": "user"}]', "[[]]", "[1]", "{"])
def test_malformed_conversations(tmp_path: Path, content: str) -> None:
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(MptTrtError, match=r"m\.json: "):
        read_conversations(tmp_path / "m.json")


def test_a_file_larger_than_any_tokenizer_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CheckpointSpec())
    os.truncate(folder / "tokenizer.json", 5 << 30)
    with pytest.raises(MptTrtError, match=r"tokenizer\.json: 5368709120 bytes, and no tokenizer"):
        read_tokenizer(folder)
