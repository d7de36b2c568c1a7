"""The dtype of a served model on processors with and without the instructions that bfloat16 needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steer.serving import processor

WITHOUT = "processor\t: 0\nflags\t\t: fpu sse2 avx2 fma\n"
WITH = "processor\t: 0\nflags\t\t: fpu sse2 avx2 fma avx512f avx512_bf16\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\n"
FLOAT32 = ["--dtype", "float32"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(bytes(64))
    return tmp_path


@pytest.fixture(autouse=True)
def cpuinfo(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which Linux describes the processor: one without AVX-512."""
    path = tmp_path_factory.mktemp("proc") / "cpuinfo"
    path.write_text(WITHOUT)
    monkeypatch.setattr(processor, "CPUINFO", path)
    return path


@pytest.mark.parametrize(("text", "flags"), [(WITHOUT, FLOAT32), (WITH, []), (ARM, []), ("", [])])
def test_float32_is_chosen_on_an_x86_processor_without_avx512_alone(
    text: str, flags: list[str], model: Path, cpuinfo: Path
) -> None:
    cpuinfo.write_text(text)
    assert processor.dtype_flags(model, []) == flags


def test_a_machine_that_does_not_describe_its_processor_keeps_the_choice_of_vllm(model: Path, cpuinfo: Path) -> None:
    cpuinfo.unlink()
    assert processor.dtype_flags(model, []) == []


@pytest.mark.parametrize("flags", [["--dtype", "auto"], ["--dtype=bfloat16"], ["-q", "awq"], ["--quantization", "awq"]])
def test_a_dtype_or_a_quantisation_that_the_user_gives_stays(flags: list[str], model: Path) -> None:
    assert processor.dtype_flags(model, flags) == []


def test_other_flags_with_dtype_in_their_name_do_not_count(model: Path) -> None:
    assert processor.dtype_flags(model, ["--kv-cache-dtype", "auto"]) == FLOAT32


QUANTISED = {"quantization_config": {"quant_method": "awq"}}


@pytest.mark.parametrize("configuration", [QUANTISED, {"text_config": QUANTISED}, {"text_config": None, **QUANTISED}])
def test_a_quantised_model_keeps_the_choice_of_vllm(configuration: dict[str, object], model: Path) -> None:
    (model / "config.json").write_text(json.dumps(configuration))
    assert processor.dtype_flags(model, []) == []


def test_a_model_that_would_take_most_of_the_memory_in_float32_keeps_the_choice_of_vllm(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor.os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 4 * 64)
    assert processor.dtype_flags(model, []) == FLOAT32
    monkeypatch.setattr(processor.os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 4 * 64 - 1)
    assert processor.dtype_flags(model, []) == []
