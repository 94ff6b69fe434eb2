"""config.yaml: the schema, defaults, and messages about mistakes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.distance import Tolerance
from mpt_trt.quantization.schemes import Awq, Fp8, Gptq, Mixed, SmoothQuant, WeightOnly
from mpt_trt.workflow import settings
from mpt_trt.workflow.config_sources import ConfigSources
from mpt_trt.workflow.settings import (
    Calibration,
    Model,
    Proofs,
    Quality,
    Report,
    Site,
    SmokeTest,
    Variant,
    parse_settings,
)
from support.paths import REPOSITORY

ROOT = REPOSITORY
SCHEMA = yaml.safe_load((ROOT / "mpt_trt/workflow/config.schema.yaml").read_text())
SHIPPED = yaml.safe_load((ROOT / "config.yaml").read_text())
FULL: dict[str, Any] = {
    "models": {"tiny": {"source": "folder"}},
    "variants": {"half": {"dtype": "float16", "tolerance": {"error_factor": 0.5}}},
    "smoke_test": {"prompt": "x"},
    "quality": {},
    "report": {},
    "targets": [],
}


def changed(path: str, value: object) -> dict[str, Any]:
    """FULL with the value at a dotted path replaced or added."""
    content = copy.deepcopy(FULL)
    *parents, key = path.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    place[key] = value
    return content


def refusal(content: Any) -> str:
    with pytest.raises(MptTrtError) as error:
        parse_settings(content)
    message = str(error.value)
    assert message.startswith("config.yaml: ")
    assert "\n" not in message
    return message


class TestSchema:
    def objects(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields every object in the schema that has keys, with its place."""
        open_places = [("", SCHEMA), *((name, s) for name, s in SCHEMA["$defs"].items())]
        while open_places:
            place, schema = open_places.pop()
            if "properties" in schema:
                yield place, schema
            open_places += [(f"{place}.{k}", s) for k, s in schema.get("properties", {}).items()]

    def keys(self) -> Iterator[tuple[str, dict[str, Any], bool]]:
        for place, schema in self.objects():
            for key, entry in schema["properties"].items():
                yield f"{place}.{key}", entry, key in schema.get("required", [])

    def test_every_key_is_described(self) -> None:
        keys = list(self.keys())
        assert len(keys) >= 20
        for place, entry, _ in keys:
            description = entry.get("description", "")
            assert len(description.split()) >= 3, place
            assert description.endswith("."), place

    def test_every_key_that_is_not_required_has_a_valid_default(self) -> None:
        for place, entry, required in self.keys():
            assert ("default" in entry) != required, place
            if not required:
                jsonschema.validate(entry["default"], {**entry, "$defs": SCHEMA["$defs"]})

    def test_every_object_is_closed(self) -> None:
        for place, schema in self.objects():
            assert schema["additionalProperties"] is False, place

    @pytest.mark.parametrize(
        ("dataclass", "schema"),
        [
            (Model, SCHEMA["$defs"]["model"]),
            (Variant, SCHEMA["$defs"]["variant"]),
            (Tolerance, SCHEMA["$defs"]["variant"]["properties"]["tolerance"]),
            (SmokeTest, SCHEMA["properties"]["smoke_test"]),
            (Quality, SCHEMA["properties"]["quality"]),
            (Report, SCHEMA["properties"]["report"]),
            (settings.Settings, SCHEMA),
        ],
    )
    def test_every_key_is_read(self, dataclass: type, schema: dict) -> None:
        # A variant's head is a key of its quantization.
        fields = {f.name for f in dataclasses.fields(dataclass)} - {"head"}
        assert fields == set(schema["properties"])


class TestShippedConfiguration:
    def test_it_is_valid(self) -> None:
        found = parse_settings(SHIPPED)
        assert {"mpt-demo", "mpt-7b", "mpt-30b", "replit-code-v1_5-3b"} <= set(found.models)
        assert found.variant("fp32").dtype == "float32"
        assert found.variant("fp16").dtype == "float16"
        assert found.variant("bf16").dtype == "bfloat16"
        assert found.model("mpt-7b") == Model("mosaicml/mpt-7b", "main", None, None, ())

    def test_targets_name_known_models_and_variants(self) -> None:
        found = parse_settings(SHIPPED)
        assert found.targets
        for target in found.targets:
            _, model, variant, _ = target.split("/")
            found.model(model)
            found.variant(variant)


class TestDefaults:
    def test_empty(self) -> None:
        assert parse_settings({}) == settings.Settings(
            models={},
            variants={},
            calibration=Calibration(None, 32, 512, "auto"),
            smoke_test=SmokeTest("def fibonacci", 32),
            quality=Quality("resources/mpt-demo/heldout.txt", 16, 512, True, (), None),
            proofs=Proofs(None, None),
            report=Report(None, (1,), {}),
            site=Site(
                gpus="auto",
                gpu_request="gpus",
                gpu_memory_gb={},
                gpus_per_node=8,
                mpi="mpirun --oversubscribe --bind-to none --allow-run-as-root",
                container=None,
                job_overhead_mb=0,
            ),
            targets=(),
        )

    def test_entries(self) -> None:
        found = parse_settings({"models": {"m": {"source": "s"}}, "variants": {"v": {}}})
        assert found.model("m") == Model(
            source="s", revision="main", tokenizer=None, adapter=None, facts=()
        )
        expected = {
            "dtype": "float16",
            "quantization": None,
            "kv_cache_dtype": "auto",
            "max_batch_size": 8,
            "max_input_len": 512,
            "max_output_len": 64,
            "gather_all_token_logits": False,
            "backend": "auto",
            "compute_capabilities": ("8.0", "8.6", "8.9", "12.0"),
            "tolerance": Tolerance(error_factor=1.0, min_top1=0.95),
        }
        variant = found.variant("v")
        assert {key: getattr(variant, key) for key in expected} == expected

    @pytest.mark.parametrize(
        ("mapping", "scheme"),
        [
            ({}, None),
            ({"method": "none"}, None),
            ({"method": "int8_weight_only"}, WeightOnly(8)),
            ({"method": "int4_weight_only"}, WeightOnly(4)),
            ({"method": "int4_weight_only", "group_size": 32}, WeightOnly(4, 32)),
            ({"method": "int4_awq"}, Awq()),
            ({"method": "int4_awq", "group_size": 64}, Awq(64)),
            ({"method": "int4_awq", "scales": "error"}, Awq(scales="error")),
            ({"method": "int4_gptq", "group_size": 32}, Gptq(32)),
            ({"method": "mixed", "bits": 4.5}, Mixed(4.5)),
            ({"method": "smoothquant"}, SmoothQuant(0.5, True, True)),
            (
                {"method": "smoothquant", "alpha": 0.8, "per_channel": False, "per_token": False},
                SmoothQuant(0.8, False, False),
            ),
            ({"method": "fp8"}, Fp8()),
        ],
    )
    def test_quantization(self, mapping: dict, scheme: object) -> None:
        assert (
            parse_settings({"variants": {"v": {"quantization": mapping}}}).variant("v").quantization
            == scheme
        )

    def test_given_values_stay(self) -> None:
        content = {
            "models": {"m": {"source": "s", "revision": "v1", "tokenizer": "t", "adapter": "a"}},
            "variants": {"v": {"max_batch_size": 3, "tolerance": {"min_top1": 0.5}}},
            "smoke_test": {"max_new_tokens": 5},
            "targets": ["a", "b"],
        }
        found = parse_settings(content)
        assert found.model("m") == Model("s", "v1", "t", "a", ())
        assert found.variant("v").max_batch_size == 3
        assert found.variant("v").max_input_len == 512
        assert found.variant("v").tolerance == Tolerance(1.0, 0.5)
        assert found.smoke_test == SmokeTest("def fibonacci", 5)
        assert found.targets == ("a", "b")

    @pytest.mark.parametrize(
        ("report", "engines"),
        [
            ({}, [("a", 1), ("b", 1), ("c", 1)]),
            ({"tp_sizes": [2, 1]}, [(name, size) for name in "abc" for size in (1, 2)]),
            ({"variants": ["c", "a"]}, [("c", 1), ("a", 1)]),
            (
                {"variants": ["c"], "more_tp_sizes": {"c": [4, 2, 1]}},
                [("c", 1), ("c", 2), ("c", 4)],
            ),
            ({"variants": ["c"], "more_tp_sizes": {"a": [2]}}, [("c", 1), ("a", 2)]),
            ({"variants": []}, []),
        ],
    )
    def test_engines_of_a_report(self, report: dict, engines: list) -> None:
        found = parse_settings({"variants": {"a": {}, "b": {}, "c": {}}, "report": report})
        assert found.engines_of_report() == engines

    def test_the_shipped_report_shows_every_variant(self) -> None:
        found = parse_settings(SHIPPED)
        assert {name for name, _ in found.engines_of_report()} == set(found.variants)

    def test_the_content_is_left_alone(self) -> None:
        content = copy.deepcopy(FULL)
        parse_settings(content)
        assert content == FULL

    def test_one_entry_does_not_change_another(self) -> None:
        variants = {"a": {"tolerance": {"error_factor": 9.0}}, "b": {}}
        assert parse_settings({"variants": variants}).variant("b").tolerance.error_factor == 1.0

    def test_command_line_defaults(self) -> None:
        assert settings.variant_default("max_input_len") == 512
        assert settings.variant_choices("dtype") == ["float32", "float16", "bfloat16"]
        assert settings.default_tolerance() == Tolerance(1.0, 0.95)


class TestMistakes:
    @pytest.mark.parametrize(
        ("path", "place", "hint"),
        [
            ("modles", "top level", "did you mean 'models'?"),
            ("models.tiny.revison", "models.tiny", "did you mean 'revision'?"),
            ("variants.half.dtyp", "variants.half", "did you mean 'dtype'?"),
            ("variants.half.tolerance.eror_factor", "variants.half.tolerance", "'error_factor'?"),
            ("smoke_test.promt", "smoke_test", "did you mean 'prompt'?"),
            ("smoke_test.zzz", "smoke_test", "known names: max_new_tokens, prompt"),
        ],
    )
    def test_unknown_key(self, path: str, place: str, hint: str) -> None:
        message = refusal(changed(path, "x"))
        key = path.rpartition(".")[2]
        assert message.startswith(f"config.yaml: {place}: unknown key {key!r}; ")
        assert message.endswith(hint)

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("models", ["a"]),
            ("models.tiny", None),
            ("models.tiny.source", ""),
            ("models.tiny.source", 7),
            ("models.tiny.revision", 1234567),
            ("models.tiny.tokenizer", ["a"]),
            ("variants.half.dtype", "float17"),
            ("variants.half.dtype", None),
            ("variants.half.max_batch_size", 0),
            ("variants.half.max_batch_size", "8"),
            ("variants.half.max_batch_size", 2.5),
            ("variants.half.max_input_len", -1),
            ("variants.half.max_output_len", True),
            ("variants.half.gather_all_token_logits", "yes"),
            ("variants.half.backend", "cuda"),
            ("variants.half.compute_capabilities", "8.9"),
            ("variants.half.compute_capabilities", []),
            ("variants.half.tolerance", 0.1),
            ("variants.half.tolerance.error_factor", 0),
            ("variants.half.tolerance.error_factor", -0.5),
            ("variants.half.tolerance.min_top1", 1.5),
            ("smoke_test", "def"),
            ("smoke_test.prompt", ""),
            ("smoke_test.max_new_tokens", 0),
            ("quality.text", ""),
            ("quality.num_windows", 0),
            ("quality.window_length", 0.5),
            ("report.variants", "fp16"),
            ("report.tp_sizes", []),
            ("report.more_tp_sizes", [2]),
            ("targets", "smoke_tests/a/b/1-gpu.json"),
        ],
    )
    def test_wrong_value(self, path: str, value: object) -> None:
        message = refusal(changed(path, value))
        assert message.startswith(f"config.yaml: {path} = {value!r}: ")

    @pytest.mark.parametrize(
        ("method", "option"),
        [
            ("none", "group_size"),
            ("int8_weight_only", "group_size"),
            ("int4_awq", "alpha"),
            ("smoothquant", "group_size"),
            ("fp8", "per_token"),
        ],
    )
    def test_option_of_another_method(self, method: str, option: str) -> None:
        values = {"group_size": 64, "alpha": 0.7, "per_token": False}
        mapping = {"method": method, option: values[option]}
        message = refusal(changed("variants.half.quantization", mapping))
        assert f"variants.half.quantization.{option} = {values[option]!r}: {method} has" in message

    @pytest.mark.parametrize("value", [8.9, "89", "sm_89"])
    def test_wrong_item(self, value: object) -> None:
        message = refusal(changed("variants.half.compute_capabilities", ["8.6", value]))
        assert f"variants.half.compute_capabilities.1 = {value!r}: " in message

    def test_enum_lists_the_choices(self) -> None:
        message = refusal(changed("variants.half.dtype", "fp16"))
        assert message.endswith("choose one of float32, float16, bfloat16")

    def test_missing_source(self) -> None:
        message = refusal(changed("models.other", {"revision": "main"}))
        assert message == "config.yaml: models.other: 'source' is a required property"

    @pytest.mark.parametrize("section", ["models", "variants"])
    @pytest.mark.parametrize("name", ["a/b", "../up", ".hidden", "-x", "with space", "", "a\n"])
    def test_names_that_are_no_path_component(self, section: str, name: str) -> None:
        entry = {"source": "s"} if section == "models" else {}
        message = refusal({section: {name: entry}})
        assert message.startswith(f"config.yaml: {section}")
        assert repr(name) in message

    def test_no_mapping(self) -> None:
        assert "None" in refusal(None)

    def test_origin(self) -> None:
        with pytest.raises(MptTrtError, match=r"^other\.yaml: top level: unknown key 'x'"):
            parse_settings({"x": 1}, ConfigSources(("other.yaml",)))

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("mpt-7B", "did you mean 'mpt-7b'?"),
            ("mpt7b", "did you mean 'mpt-7b'?"),
            ("llama", "known names: mpt-30b, mpt-7b"),
        ],
    )
    def test_unknown_model(self, name: str, hint: str) -> None:
        models = {"mpt-7b": {"source": "s"}, "mpt-30b": {"source": "s"}}
        with pytest.raises(MptTrtError) as error:
            parse_settings({"models": models}).model(name)
        assert str(error.value) == f"config.yaml has no model named {name!r}; {hint}"

    def test_unknown_variant(self) -> None:
        with pytest.raises(MptTrtError, match="no variant named 'hlaf'; did you mean 'half'"):
            parse_settings(FULL).variant("hlaf")

    @pytest.mark.parametrize("report", [{"variants": ["hlaf"]}, {"more_tp_sizes": {"hlaf": [2]}}])
    def test_unknown_variant_in_a_report(self, report: dict) -> None:
        with pytest.raises(MptTrtError, match="no variant named 'hlaf'; did you mean 'half'"):
            parse_settings(FULL | {"report": report}).engines_of_report()

    @pytest.mark.parametrize(
        ("content", "place"),
        [
            ({"models": {1: {"source": "s"}}}, "models: the key 1 "),
            ({"variants": {True: {}}}, "variants: the key True "),
            ({"variants": {"half": {"quantization": {None: 4}}}}, "quantization: the key None "),
            ({7: {}}, "top level: the key 7 "),
        ],
    )
    def test_keys_that_are_no_texts(self, content: dict, place: str) -> None:
        with pytest.raises(MptTrtError, match=f"{place}is not a text in YAML; put it in quotes"):
            parse_settings(content)

    def test_no_entries_at_all(self) -> None:
        with pytest.raises(MptTrtError, match=r"has no variants, not even 'fp16'; .*--configfile"):
            parse_settings({}).variant("fp16")
