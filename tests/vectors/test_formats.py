"""Formats: what is written is read back, layers are where each tool has them, and no file can do harm."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vectors import artifact, fit, formats
from vectors.errors import ArtifactError, OutputError, UsageError
from vectors.steering import SteeringVector

BUILT_IN = ("caa", "gguf", "lm_eval", "native", "persona_vectors")
KEEPS_METADATA = ("gguf", "native")
SUFFIX = {"native": ".safetensors", "gguf": ".gguf"}

METADATA = {
    "base": {"digest": "sha256:ab", "architecture": "LlamaForCausalLM", "name": "tiny", "layers": 6},
    "method": {"name": "mean_difference", "pairs": 12, "θ": [0.1, 1e-300, None, 'naïve\n"quoted" 深']},
    "apply": [3],
}


@pytest.fixture
def vector() -> SteeringVector:
    """Layers 1, 3 and 4 of a model of six, of which 3 acts; values that only exact copying preserves.

    Eight floats fill GGUF's alignment, so that no file ends in padding that could be cut without loss.
    """
    generator = torch.Generator().manual_seed(0)
    layers = {i: torch.randn(8, generator=generator) for i in (1, 3, 4)}
    layers[3][:3] = torch.tensor([-0.0, 1e-42, 3.4e38])
    return SteeringVector(layers, METADATA)


def bits(vector: SteeringVector) -> dict[int, bytes]:
    return {i: values.numpy().tobytes() for i, values in vector.layers.items()}


def quietly_read(path: Path) -> SteeringVector:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return formats.read(path)


def quietly_write(vector: SteeringVector, path: Path, name: str | None = None) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return formats.write(vector, path, name)


def written(vector: SteeringVector, folder: Path, name: str) -> Path:
    path = folder / f"vector{SUFFIX.get(name, '.pt')}"
    quietly_write(vector, path, name)
    return path


def control_vector(path: Path, directions: dict[int, Any], architecture: str = "controlvector") -> Path:
    """A file as repeng writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(directions))
    for i, values in directions.items():
        writer.add_tensor(f"direction.{i}", np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def entry(**changes: object) -> dict[str, object]:
    """An entry of lm-evaluation-harness's steering file."""
    return {
        "steering_vector": torch.ones(4),
        "steering_coefficient": 2.0,
        "action": "add",
        "bias": None,
        "head_index": None,
    } | changes


# Round trips


def test_every_built_in_format_is_found_and_says_what_it_is() -> None:
    found = formats.formats()
    assert set(BUILT_IN) <= set(found)
    assert all(found[name].SUMMARY and isinstance(found[name].SUFFIXES, tuple) for name in BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_written_is_read_back_bit_for_bit(name: str, vector: SteeringVector, tmp_path: Path) -> None:
    assert bits(quietly_read(written(vector, tmp_path, name))) == bits(vector)


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_file_is_recognised_by_its_own_format_alone(name: str, vector: SteeringVector, tmp_path: Path) -> None:
    anonymous = written(vector, tmp_path, name).rename(tmp_path / "anonymous")
    assert [other for other in BUILT_IN if recognises(formats.formats()[other], anonymous)] == [name]


def recognises(module: ModuleType, path: Path) -> bool:
    return bool(module.reads(path))


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_same_vector_gives_the_same_bytes_and_the_digest_of_the_file(
    name: str, vector: SteeringVector, tmp_path: Path
) -> None:
    from vectors.storage.files import digest_bytes

    first, second = tmp_path / "first", tmp_path / "second"
    digests = {quietly_write(vector, path, name) for path in (first, second)}
    assert digests == {digest_bytes(first.read_bytes())}
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", KEEPS_METADATA)
def test_metadata_survives_so_that_the_artifact_has_the_same_digest(
    name: str, vector: SteeringVector, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = formats.read(written(vector, tmp_path, name))
    assert back.metadata == METADATA
    assert back.digest == vector.digest


@pytest.mark.parametrize("name", KEEPS_METADATA)
def test_metadata_that_never_named_layers_still_gives_the_same_digest(name: str, tmp_path: Path) -> None:
    plain = SteeringVector({2: torch.ones(3)}, {"note": "no apply"})
    assert quietly_read(written(plain, tmp_path, name)).digest == plain.digest


@pytest.mark.parametrize(("suffix", "name"), [(".safetensors", "native"), (".gguf", "gguf"), (".PT", "caa")])
def test_the_suffix_chooses_the_format(suffix: str, name: str, vector: SteeringVector, tmp_path: Path) -> None:
    path = tmp_path / f"v{suffix}"
    quietly_write(vector, path)
    assert recognises(formats.formats()[name], path)


def test_a_suffix_that_names_no_format_is_wrong_usage_that_lists_those_that_do(
    vector: SteeringVector, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        formats.write(vector, tmp_path / "v.bin")
    assert ".gguf (gguf)" in caught.value.hint
    assert "persona_vectors" in caught.value.hint


def test_a_format_that_can_only_be_read_is_wrong_usage_that_lists_those_written(
    vector: SteeringVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_read = ModuleType("only_read")
    vars(only_read).update(SUMMARY="read only", SUFFIXES=(".ro",), reads=lambda path: False)
    available = formats.formats() | {"only_read": only_read}
    monkeypatch.setattr(formats, "formats", lambda: available)
    with pytest.raises(UsageError, match="only_read can be read but not written") as caught:
        formats.write(vector, tmp_path / "v.ro", "only_read")
    assert all(name in caught.value.hint for name in BUILT_IN)
    assert "only_read" not in caught.value.hint
    with pytest.raises(UsageError, match="does not say"):
        formats.write(vector, tmp_path / "v.ro")


def test_a_misspelt_format_is_wrong_usage_with_a_guess(vector: SteeringVector, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        formats.write(vector, tmp_path / "v.gguf", "ggfu")
    assert "did you mean gguf?" in caught.value.hint


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_output_that_cannot_be_written_is_said_and_leaves_nothing(
    name: str, vector: SteeringVector, tmp_path: Path
) -> None:
    for path in (tmp_path / "missing" / "v.pt", tmp_path):
        with pytest.raises(OutputError):
            quietly_write(vector, path, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", BUILT_IN)
def test_writing_leaves_the_file_and_nothing_beside_it(name: str, vector: SteeringVector, tmp_path: Path) -> None:
    path = written(vector, tmp_path, name)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["gguf", "lm_eval"])
def test_exporting_layers_that_do_not_act_warns_where_the_tool_would_apply_them(
    name: str, vector: SteeringVector, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="--layers 3"):
        formats.write(vector, tmp_path / "all", name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        formats.write(vector.select([3]), tmp_path / "acting", name)


# Layer numbering of files made elsewhere


def test_direction_i_of_a_control_vector_is_block_i(tmp_path: Path) -> None:
    path = control_vector(tmp_path / "v.gguf", {i: np.full(4, i, np.float32) for i in (3, 1, 2)})
    with pytest.warns(UserWarning, match="base is unverified"):
        read = formats.read(path)
    assert {i: values.tolist() for i, values in read.layers.items()} == {i: [float(i)] * 4 for i in (1, 2, 3)}
    assert read.metadata["method"] == {"name": "imported", "format": "gguf", "model_hint": "llama"}


def test_a_control_vector_has_the_keys_that_llama_cpp_and_repeng_read(vector: SteeringVector, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(written(vector, tmp_path, "gguf"))
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 3
    tensors = [(t.name, t.tensor_type, t.shape.tolist()) for t in reader.tensors]
    f32 = gguf.GGMLQuantizationType.F32
    assert tensors == [(f"direction.{i}", f32, [8]) for i in (1, 3, 4)]


def test_layer_0_is_refused_for_llama_cpp_with_the_layers_that_can_go(tmp_path: Path) -> None:
    with_0 = SteeringVector({i: torch.ones(3) for i in range(4)})
    with pytest.raises(ArtifactError, match="layer 0") as caught:
        formats.write(with_0, tmp_path / "v.gguf")
    assert "--layers 1-3" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [12, "12", "layer_12", "layers.12", "layer.12", "model.layers.12"])
@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_a_dictionary_names_its_layers_in_any_usual_way(key: int | str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = saved(tmp_path / "v.pt", {key: torch.full(shape, 7, dtype=torch.bfloat16)})
    with pytest.warns(UserWarning, match="base is unverified"):
        read = formats.read(path)
    assert {i: values.tolist() for i, values in read.layers.items()} == {12: [7.0] * 4}


def test_a_layer_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="twice"):
        formats.read(saved(tmp_path / "v.pt", {12: torch.ones(4), "layer_12": torch.ones(4)}))


def test_a_single_tensor_of_caa_has_the_layer_of_its_name(tmp_path: Path) -> None:
    read = quietly_read(saved(tmp_path / "vec_layer_13_Llama-2-7b-chat-hf.pt", torch.ones(4)))
    assert list(read.layers) == [13]
    assert read.metadata["method"]["model_hint"] == "Llama-2-7b-chat-hf"


def test_a_single_tensor_without_a_layer_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not give its layer") as caught:
        formats.read(saved(tmp_path / "warm.pt", torch.ones(4)))
    assert "vec_layer_{i}" in caught.value.hint


def test_row_l_of_a_persona_stack_is_layer_l_minus_1_and_the_embeddings_are_dropped(tmp_path: Path) -> None:
    stack = torch.arange(7.0)[:, None].expand(7, 4).clone()
    stack[0] = 99
    with pytest.warns(UserWarning, match="base is unverified"):
        read = formats.read(saved(tmp_path / "evil_response_avg_diff.pt", stack))
    assert {i: values.tolist() for i, values in read.layers.items()} == {i: [i + 1.0] * 4 for i in range(6)}


@pytest.mark.parametrize("as_list", [False, True])
def test_the_number_of_rows_of_a_stack_against_the_model_decides(as_list: bool, tmp_path: Path) -> None:
    rows = torch.arange(1.0, 8.0)[:, None].expand(7, 4).clone()
    path = saved(tmp_path / "stack.pt", list(rows) if as_list else rows)
    with pytest.warns(UserWarning, match="first of its 7 rows is the embeddings or block 0"):
        stack = formats.read(path)
    model = {"hidden_size": 4, "base": None}
    assert fit.problems_of("s", stack, layers=6, **model) == []
    assert stack.layers[0].tolist() == [2.0] * 4
    for layers, reason in ((7, "first row seems to be block 0"), (12, "13 rows would begin with the embeddings")):
        (problem,) = fit.problems_of("s", stack, layers=layers, **model)
        assert reason in problem
        assert "--first-row" in problem
        assert fit.problems_of("s", 2 * stack, layers=layers, **model)
        (tmp_path / "again.safetensors").write_bytes(stack.encode())
        assert fit.problems_of("s", formats.read(tmp_path / "again.safetensors"), layers=layers, **model)
    other = SteeringVector({1: torch.ones(4)})
    assert (stack + stack).rows == 7
    for operation in (stack.__add__, stack.cosine, stack.project_out):
        with pytest.raises(ArtifactError, match="whether") as caught:
            operation(other)
        assert "--first-row" in caught.value.hint


@pytest.mark.parametrize(("first_row", "value"), [("embeddings", 2.0), ("block-0", 1.0)])
def test_the_first_row_of_a_stack_can_be_given(first_row: str, value: float, tmp_path: Path) -> None:
    stack = torch.arange(1.0, 8.0)[:, None].expand(7, 4).clone()
    with pytest.warns(UserWarning, match="base is unverified"):
        read = formats.read(saved(tmp_path / "stack.pt", stack), first_row)
    assert read.layers[0].tolist() == [value] * 4
    assert len(read.layers) == (6 if first_row == "embeddings" else 7)
    assert read.rows is None
    with pytest.raises(UsageError, match="no stack"):
        formats.read(saved(tmp_path / "caa.pt", {1: torch.ones(4)}), first_row)


@pytest.mark.parametrize(("hook", "layer"), [("blocks.3.hook_resid_post", 3), ("blocks.3.hook_resid_pre", 2)])
def test_hooks_of_transformer_lens_name_the_block_whose_output_they_are(hook: str, layer: int, tmp_path: Path) -> None:
    assert list(quietly_read(saved(tmp_path / "v.pt", {hook: torch.ones(4)})).layers) == [layer]
    with pytest.raises(ArtifactError, match="negative"):
        quietly_read(saved(tmp_path / "v.pt", {"blocks.0.hook_resid_pre": torch.ones(4)}))


def test_a_dictionary_that_counts_hidden_states_does_not_fit_and_the_error_says_why(tmp_path: Path) -> None:
    vector = quietly_read(saved(tmp_path / "v.pt", {i: torch.ones(4) for i in range(7)}))
    (problem,) = fit.problems_of("v", vector, hidden_size=4, layers=6, base=None)
    assert "has layer 6; the model has layers 0 to 5, counted from 0 without the embeddings" in problem


def test_a_persona_stack_has_a_row_for_every_layer_of_the_base(vector: SteeringVector, tmp_path: Path) -> None:
    stack = torch.load(written(vector, tmp_path, "persona_vectors"), weights_only=True)
    assert stack.shape == (7, 8)
    assert [row for row in range(7) if bool(stack[row].any())] == [2, 4, 5]
    unknown = SteeringVector(vector.layers)
    assert torch.load(written(unknown, tmp_path, "persona_vectors"), weights_only=True).shape == (6, 8)


def test_a_persona_stack_cannot_hold_a_layer_that_the_base_has_not(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="layer 6, its base only 6"):
        formats.write(SteeringVector({6: torch.ones(3)}, METADATA | {"apply": [6]}), tmp_path / "v", "persona_vectors")


@pytest.mark.parametrize("hook", ["layers.3", "model.layers.3", "transformer.h.3", "gpt_neox.layers.3", "blocks.3"])
def test_a_steering_file_of_the_harness_adds_coefficient_times_vector_at_the_block(hook: str, tmp_path: Path) -> None:
    read = quietly_read(saved(tmp_path / "v.pt", {hook: entry()}))
    assert {i: values.tolist() for i, values in read.layers.items()} == {3: [2.0] * 4}


@pytest.mark.parametrize(
    ("hook", "changes", "named"),
    [
        ("layers.3", {"action": "clamp"}, "the action at layers.3 is 'clamp'"),
        ("layers.3.mlp", {}, "hook point 'layers.3.mlp'"),
        ("blocks.3.hook_resid_pre", {}, "hook point 'blocks.3.hook_resid_pre'"),
        ("vision_tower.encoder.layers.3", {}, "hook point 'vision_tower.encoder.layers.3'"),
        ("layers.3", {"head_index": 0}, "head_index"),
        ("layers.3", {"bias": torch.ones(4)}, "bias"),
        ("layers.3", {"steering_coefficient": float("inf")}, "steering_coefficient"),
        ("layers.3", {"steering_coefficient": 10**400}, "steering_coefficient"),
        ("layers.3", {"steering_coefficient": "2"}, "steering_coefficient"),
    ],
)
def test_what_the_harness_does_otherwise_is_refused_by_name(
    hook: str, changes: dict[str, object], named: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "v.pt", {"layers.1": entry(), hook: entry(**changes)})
    with pytest.raises(ArtifactError) as caught:
        formats.read(path)
    assert len(caught.value.problems) == 1
    assert named in caught.value.problems[0]


@pytest.mark.parametrize(
    ("architecture", "hook"),
    [("LlamaForCausalLM", "layers.3"), ("GPT2LMHeadModel", "h.3"), ("OPTForCausalLM", "decoder.layers.3")],
)
def test_the_harness_gets_the_hook_points_of_the_family(architecture: str, hook: str, tmp_path: Path) -> None:
    vector = SteeringVector({3: torch.ones(4)}, {"base": {"architecture": architecture}})
    value = torch.load(written(vector, tmp_path, "lm_eval"), weights_only=True)
    assert list(value) == [hook]
    assert value[hook].pop("steering_vector").tolist() == [1.0] * 4
    assert value[hook] == {"steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}


def test_bare_safetensors_are_taken_in_any_float_dtype_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    save_file({"layer.2": torch.full((4,), 1.5, dtype=torch.bfloat16), "layer.10": torch.ones(4).bfloat16()}, path)
    with pytest.warns(UserWarning, match="base is unverified.*2,10"):
        read = formats.read(path)
    assert read.apply == (2, 10)
    assert read.layers[2].tolist() == [1.5] * 4
    assert read.layers[2].dtype == torch.float32


# Files that are refused


def test_a_missing_file_and_a_folder_are_refused_with_the_known_formats(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "none.gguf", "there is no file"), (tmp_path, "is a folder")):
        with pytest.raises(ArtifactError, match=what) as caught:
            formats.read(path)
        assert all(name in caught.value.hint for name in BUILT_IN)


@pytest.mark.parametrize("content", [b"", b"{", b"layer,value\n1,2\n", b"\x93NUMPY\x01\x00", bytes(64)])
def test_an_unknown_format_is_refused_with_the_known_ones(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="no known format") as caught:
        formats.read(path)
    assert all(name in caught.value.hint for name in BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_file_cut_short_anywhere_is_refused(name: str, vector: SteeringVector, tmp_path: Path) -> None:
    path = written(vector, tmp_path, name)
    content = path.read_bytes()
    for length in {0, 1, 3, 4, 8, 9, 20, 50, *range(0, len(content), 37), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError):
            quietly_read(path)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_damaged_file_is_read_or_refused_but_never_fails_otherwise(
    name: str, vector: SteeringVector, tmp_path: Path
) -> None:
    path = written(vector, tmp_path, name)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), 3):
            damaged[place] = generator.choice([0, 1, 127, 128, 255, int(generator.integers(256))])
        path.write_bytes(damaged)
        try:
            quietly_read(path)
        except ArtifactError:
            refused += 1
    assert refused > 0


class Payload:
    """Unpickling it would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ""])
@pytest.mark.parametrize("protocol", [0, 2, 4, "torch", "torch, not zipped"])
def test_pickled_code_is_refused_and_not_run(suffix: str, protocol: int | str, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / f"v{suffix}"
    value = {1: torch.ones(3), 2: Payload(marker)}
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(value, protocol))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=protocol == "torch")
    with pytest.raises(ArtifactError) as caught:
        quietly_read(path)
    # Protocol 0 is plain text: without a suffix nothing says that it is pickled, and it is not looked into.
    assert "nothing is ever unpickled" in str(caught.value) or (
        protocol == 0 and "no known format" in str(caught.value)
    )
    assert not marker.exists()


def test_the_payload_of_these_tests_would_run_if_it_were_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    plain, packed = saved(tmp_path / "plain.pt", {1: torch.zeros(1000)}), tmp_path / "packed.pt"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ArtifactError, match="compressed"):
        formats.read(packed)


@pytest.mark.parametrize("value", [torch.zeros(1).expand(10**12), torch.zeros(1, 1).expand(3, 10**12)])
def test_a_shape_of_terabytes_over_a_few_bytes_is_refused(value: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not that much data"):
        formats.read(saved(tmp_path / "vec_layer_1_x.pt", value))


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"weights": torch.ones(3)},
        {1: "text"},
        {True: torch.ones(3)},
        {1: torch.ones(3), "lr": 0.1},
        {1: torch.ones(2, 3)},
        {1: torch.ones(3), 2: torch.ones(4)},
        {-1: torch.ones(3)},
        {10**5: torch.ones(3)},
        {10**5000: torch.ones(3)},
        {1: torch.ones(3, dtype=torch.int64)},
        {1: torch.tensor([1.0, float("nan")])},
        {1: torch.ones(0)},
        {1: torch.ones(3).to_sparse()},
        torch.ones(3, 3).to_sparse(),
        torch.ones(3, 3, dtype=torch.int32),
        torch.zeros(3, 3),
        torch.full((3, 3), float("inf")),
        torch.ones(2, 3, 4),
        torch.tensor(1.0),
        torch.ones(3, 4, device="meta"),
        [torch.ones(3)],
        {"layers.1": {"steering_vector": [1.0], "action": "add"}},
        {"layers.1": {"steering_vector": torch.ones(3)}},
        {"layers.1": entry(), "model.layers.1": entry()},
        {"layers.1": entry(), "lr": 0.1},
        None,
        3,
    ],
)
def test_torch_files_that_hold_no_vector_are_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        quietly_read(saved(tmp_path / "v.pt", value))


def test_a_gguf_file_of_a_model_is_refused_by_its_architecture(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="architecture llama, not controlvector"):
        formats.read(control_vector(tmp_path / "v.gguf", {1: np.ones(4, np.float32)}, "llama"))


@pytest.mark.parametrize(
    "directions",
    [
        {1: np.ones(4, np.float16)},
        {1: np.ones((2, 4), np.float32)},
        {1: np.ones(4, np.float32), 2: np.ones(5, np.float32)},
        {1: np.array([1, np.nan], np.float32)},
        {"one": np.ones(4, np.float32)},
        {"01": np.ones(4, np.float32)},
        {},
    ],
)
def test_control_vectors_that_llama_cpp_would_refuse_are_refused(directions: dict[int, Any], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        quietly_read(control_vector(tmp_path / "v.gguf", directions))


def test_a_gguf_array_that_claims_to_be_endless_is_refused_at_once(tmp_path: Path) -> None:
    key = b"general.tags"
    array = struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8, 2**62)
    path = tmp_path / "v.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + array)
    with pytest.raises(ArtifactError, match="ends before"):
        formats.read(path)


@pytest.mark.parametrize(
    "text", ["[]", "{", "[" * 10**5, '{"apply":[9]}', '{"base":"x"}', '{"a":NaN}', '{"kind":"task-vector"}']
)
def test_gguf_metadata_is_checked_like_the_artifacts(text: str, tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("steer.metadata", text)
    writer.add_tensor("direction.1", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ArtifactError):
        quietly_read(path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "named"),
    [
        ({"layer.1": torch.ones(4)}, {"kind": "task-vector"}, "holds a task-vector, not a steering-vector"),
        ({"model.norm.weight": torch.ones(4)}, {"kind": "task-vector"}, "holds a task-vector"),
        ({"layer.1": torch.ones(4)}, {}, "of the kind null"),
        ({"layer.1": torch.ones(4)}, {"apply": [1, 2, 3]}, "acts at layer 2-3, which it lacks"),
        ({"layer.1": torch.ones(4)}, {"apply": 1}, "apply"),
        ({"layer.1": torch.ones(4)}, {"apply": [True]}, "apply"),
        ({"layer.1": torch.ones(4)}, {"hidden_size": 5}, "hidden size 5, its tensors 4"),
        ({"layer.1": torch.ones(4)}, {"base": "tiny"}, "base"),
        ({"layer.1": torch.ones(4).half()}, {}, "F16, not F32"),
        ({"layer.1": torch.ones(4), "layer.2": torch.ones(5)}, {}, "different hidden sizes"),
        ({"layer.01": torch.ones(4)}, {}, "layer.01"),
        ({"layer.1": torch.ones(4), "other": torch.ones(4)}, {}, "other"),
        ({"layer.1": torch.ones(2, 4)}, {}, "not \\[hidden\\]"),
        ({"layer.99999": torch.ones(4)}, {}, "no model has more"),
        ({}, {}, "at least one layer"),
    ],
)
def test_an_artifact_that_contradicts_itself_is_refused(
    tensors: dict[str, torch.Tensor], metadata: dict[str, Any], named: str, tmp_path: Path
) -> None:
    if named != "of the kind null":
        metadata = {"kind": "steering-vector"} | metadata
    path = tmp_path / "v.safetensors"
    artifact.write(path, tensors, metadata)
    with pytest.raises(ArtifactError, match=named):
        formats.read(path)


@pytest.mark.parametrize(
    "tensors",
    [{"layer.1": torch.ones(4, dtype=torch.int32)}, {"w": torch.ones(4)}, {"layer.1": torch.tensor([float("nan")])}],
)
def test_a_bare_file_of_something_else_is_refused(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    save_file(tensors, path)
    with pytest.raises(ArtifactError):
        quietly_read(path)


@pytest.mark.parametrize("text", ["[" * 10**5, "null", '{"schema":1,"a":NaN}', '{"schema":1,"a":"\\ud800"}', "7"])
def test_artifact_metadata_that_no_writer_makes_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    save_file({"layer.1": torch.ones(4)}, path, {"steer": text})
    with pytest.raises(ArtifactError):
        quietly_read(path)


def test_a_changed_artifact_is_refused_whatever_its_first_bytes_look_like(tmp_path: Path) -> None:
    # The first byte of a safetensors file is the low byte of its header's length; 0x80 also begins a pickle.
    for length in range(0x300):
        vector = SteeringVector({1: torch.ones(4)}, {"note": "x" * length})
        content = bytearray(vector.encode())
        if content[0] == 0x80:
            break
    assert content[0] == 0x80
    path = tmp_path / "v.safetensors"
    path.write_bytes(content)
    assert formats.read(path).digest == vector.digest
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="changed after it was written"):
        formats.read(path)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "v.pt", {1: torch.ones(3)})

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ArtifactError, match="Permission denied"):
        formats.read(path)
