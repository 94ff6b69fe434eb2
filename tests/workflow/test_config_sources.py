"""Values of `--config`: their types, and the source that errors name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpt_trt.errors import MptTrtError
from mpt_trt.quantization.schemes import SmoothQuant, WeightOnly
from mpt_trt.workflow.config_sources import ConfigSources, require_yaml
from mpt_trt.workflow.settings import Settings, parse_settings


def given(text: str, **content: Any) -> Settings:
    """Settings of `content`, and of a command line as Snakemake reads it: all texts, if nested."""
    command_line = yaml.load(text, yaml.BaseLoader)
    merged = copy.deepcopy(content)
    for section, entry in command_line.items():
        merged[section] = merged.get(section, {}) | entry if isinstance(entry, dict) else entry
    return parse_settings(merged, ConfigSources(("config.yaml",), command_line))


def test_numbers_booleans_and_null() -> None:
    settings = given(
        "{variants: {v: {max_batch_size: 4, shard_head: false, gather_all_token_logits: True, "
        "tolerance: {error_factor: 5e-1, min_top1: 1}, compute_capabilities: [8.9, 9.0]}}}"
    )
    variant = settings.variant("v")
    assert variant.max_batch_size == 4
    assert (variant.shard_head, variant.gather_all_token_logits) == (False, True)
    tolerance = variant.tolerance
    assert (tolerance.error_factor, tolerance.min_top1) == (0.5, 1.0)
    assert variant.compute_capabilities == ("8.9", "9.0")


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("{method: int4_weight_only, group_size: 64}", WeightOnly(4, 64)),
        ("{method: int4_weight_only, group_size: null}", WeightOnly(4)),
        ("{method: smoothquant, alpha: 1, per_token: false}", SmoothQuant(1.0, True, False)),
        ("{method: none}", None),
    ],
)
def test_choices_that_are_no_texts(text: str, scheme: object) -> None:
    settings = given(f"{{variants: {{v: {{quantization: {text}}}}}}}")
    assert settings.variant("v").quantization == scheme


def test_lists_and_texts_that_look_like_something_else() -> None:
    settings = given(
        "{report: {tp_sizes: [1, 2], more_tp_sizes: {v: [4]}, variants: null}, targets: [1], "
        "models: {m: {source: '7', revision: 1234567, tokenizer: null}}, site: {gpus_per_node: 2}}"
    )
    assert settings.report.tp_sizes == (1, 2) and settings.report.more_tp_sizes == {"v": (4,)}
    assert settings.report.variants is None and settings.targets == ("1",)
    model = settings.model("m")
    assert (model.source, model.revision, model.tokenizer) == ("7", "1234567", None)
    assert settings.site.gpus_per_node == 2


def test_what_a_file_says_keeps_its_type() -> None:
    """This also holds next to a value of the command line."""
    content = {"variants": {"v": {"max_input_len": "24"}}}
    with pytest.raises(MptTrtError, match=r"^config\.yaml: variants\.v\.max_input_len = '24'"):
        given("{smoke_test: {max_new_tokens: 4}}", **content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{variants: {v: {max_batch_size: four}}}", "variants.v.max_batch_size = 'four': "),
        ("{variants: {v: {max_batch_size: 0}}}", "variants.v.max_batch_size = 0: "),
        ("{variants: {v: {shard_head: maybe}}}", "variants.v.shard_head = 'maybe': "),
        ("{variants: {v: {max_bach_size: 4}}}", "variants.v: unknown key 'max_bach_size'; did"),
        ("{variants: {v: {quantization: {group_size: 64}}}}", "variants.v.quantization.group_size"),
        (
            "{variants: {v: {tolerance: {error_factor: nan}}}}",
            "variants.v.tolerance.error_factor",
        ),
        ("{smoke_test: {promt: x}}", "smoke_test: unknown key 'promt'; did you mean 'prompt'?"),
    ],
)
def test_the_command_line_is_blamed_for_what_it_says(text: str, message: str) -> None:
    with pytest.raises(MptTrtError) as caught:
        given(text, variants={"other": {}})
    assert str(caught.value).startswith(f"--config: {message}")


def test_the_file_that_says_it_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {
        "config.yaml": {"models": {"m": {"source": "s"}}, "smoke_test": {"max_new_tokens": 3}},
        "site.yaml": {"site": {"gpus_per_node": 0}},
        "more.yaml": {"smoke_test": {"max_new_tokens": 0}},
    }
    for name, content in contents.items():
        Path(name).write_text(yaml.safe_dump(content))
    sources = ConfigSources.of_run([tmp_path / name for name in contents], {})
    assert sources.files == ("config.yaml", "site.yaml", "more.yaml")
    for name in ("site.yaml", "more.yaml"):
        merged = contents["config.yaml"] | contents[name]
        with pytest.raises(MptTrtError, match=f"^{name}: "):
            parse_settings(merged, sources)
    with pytest.raises(MptTrtError, match=r"^config\.yaml: top level: unknown key 'x'"):
        parse_settings({"x": 1}, sources)
    with pytest.raises(MptTrtError, match=r"^configuration: top level: unknown key 'x'"):
        parse_settings({"x": 1}, ConfigSources(()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:\n  m:\n\tsource: x\n", r"config\.yaml, line 3: not valid YAML: found character"),
        ("models: {m: [}\n", r"config\.yaml, line 1: not valid YAML: "),
        ("a: b: c\n", r"config\.yaml, line 1: not valid YAML: mapping values are not allowed"),
        ("a: \x00\n", r"config\.yaml: cannot be read as YAML"),
        (
            "models:\n  m: {source: x}\n  n: {source: y}\n  m: {source: z}\n",
            r"config\.yaml, line 4: the key m is also in line 2, which would not count; remove",
        ),
        ("targets: []\nmodels: {}\ntargets: [a]\n", r"line 3: the key targets is also in line 1"),
        ("a: [{b: 1}, {b: 2, 'b': 3}]\n", r"line 1: the key b is also in line 1"),
    ],
)
def test_broken_yaml_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(MptTrtError, match=message) as caught:
        require_yaml(tmp_path / "config.yaml")
    assert str(caught.value).count("config.yaml") == 1
    for right in (
        "",
        "models: {}\n",
        "a: &x {b: 1, c: {b: 1}}\nd: {<<: *x, b: 2}\n",
        "a: &y [*y]\n",
    ):
        (tmp_path / "config.yaml").write_text(right)
        require_yaml(tmp_path / "config.yaml")
