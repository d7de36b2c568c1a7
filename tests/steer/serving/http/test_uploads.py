"""A vector that is sent: bounded by the model's size, and refused by its header before anything is decoded."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import pytest
import torch

from steer.serving.engine.admission import Admission
from steer.serving.http import uploads
from steer.serving.http.bodies import TooLarge
from steer.serving.settings import Settings
from vectors.errors import SteerError
from vectors.probe import Probe, Readout
from vectors.steering import SteeringVector

VECTORS = fakes.vectors()
WARM = VECTORS["warm"]


class Request:
    """Starlette's, as far as it is read; `read` is how many parts of the body were taken."""

    def __init__(self, parts: list[bytes], name: str | None = "warm", **headers: str) -> None:
        self.parts, self.read = parts, 0
        self.headers = {key.replace("_", "-"): value for key, value in headers.items()}
        self.scope = {"headers": [(key.encode(), value.encode()) for key, value in self.headers.items()]}
        self.query_params = {"name": name} if name else {}

    async def receive(self) -> dict[str, Any]:
        self.read += 1
        return {"type": "http.request", "body": self.parts[self.read - 1], "more_body": self.read < len(self.parts)}


def admission(*folders: Path) -> Admission:
    return Admission(Settings(folders=folders), fakes.HIDDEN, fakes.LAYERS, None)


def received(request: Request, *folders: Path) -> tuple[str, SteeringVector | Probe]:
    return asyncio.run(uploads.received(admission(*folders), request))


def header(value: Any, length: int | None = None) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def tensor(name: str = "layer.0", dtype: Any = "F32", shape: Any = (8,)) -> bytes:
    """A file with one tensor, as far as its header says it."""
    return header({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 32]}}) + bytes(32)


def test_a_vector_in_parts_is_the_vector() -> None:
    content = WARM.encode()
    name, vector = received(Request([content[i : i + 7] for i in range(0, len(content), 7)]))
    assert (name, vector.digest) == ("warm", WARM.digest)


def test_a_body_is_read_no_further_than_a_vector_of_the_model_can_be() -> None:
    limit = uploads.largest(admission())
    announced = Request([b"x"], content_length=str(limit + 1))
    with pytest.raises(TooLarge, match=f"at most {limit}; send a steering vector"):
        received(announced)
    assert announced.read == 0
    silent = Request([b"x" * (limit // 4)] * 100)
    with pytest.raises(TooLarge, match=f"at most {limit}; send a steering vector"):
        received(silent)
    assert silent.read == 5


def test_a_body_of_many_parts_takes_time_in_proportion() -> None:
    async def run() -> list[bytes]:
        return await uploads.collected(Request([b"x"] * 200_000), 1 << 20)

    assert len(asyncio.run(run())) == 200_000, "not joined until all is there"


def test_decoding_leaves_the_event_loop_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    decode = uploads.native.decode

    def noted(content: bytes, path: Path) -> SteeringVector:
        threads.append(threading.current_thread())
        return decode(content, path)

    monkeypatch.setattr(uploads, "native", SimpleNamespace(decode=noted))
    received(Request([WARM.encode()]))
    assert threads != []
    assert threading.main_thread() not in threads


def test_of_many_uploads_at_once_one_is_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads that run Python would each delay the event loop."""
    running, most, decode = 0, 0, uploads.native.decode

    def noted(content: bytes, path: Path) -> SteeringVector:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.002)
        running -= 1
        return decode(content, path)

    async def several() -> list[tuple[str, SteeringVector]]:
        return await asyncio.gather(*(uploads.received(admission(), Request([WARM.encode()])) for _ in range(12)))

    monkeypatch.setattr(uploads, "native", SimpleNamespace(decode=noted))
    assert len(asyncio.run(several())) == 12
    assert most == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated or no safetensors file"),
        (header(b"{"), "truncated or no safetensors file"),
        (header({}, length=1 << 40), "longer than the file"),
        (header(b"[" * 15_000), "no safetensors file"),
        (header(b"[" + b"[]," * 80_000 + b"1]"), "header holds more than 20000 values"),
        (header({"__metadata__": {"steer": json.dumps([[]] * 20_000)}}), "header holds more than 20000 values"),
        (header([1]), "no safetensors file"),
        (header({"layer.0": 5}), "no safetensors file"),
        (header({f"layer.{i}": {"dtype": "F32", "shape": [8]} for i in range(5)}), "holds 5 tensors; .* has 4 layers"),
        (tensor(shape=[9]), r"F32 of shape \[9\]; a vector of the model has layer.0 to layer.3, floats of shape \[8\]"),
        (tensor(shape=[8, 8]), r"shape \[8, 8\]"),
        (tensor(shape="x" * 10_000), r"shape 'xx"),
        (tensor(dtype="I64"), "'layer.0', I64 of shape"),
        (tensor(dtype="F8_E4M3"), "'layer.0', F8_E4M3 of shape"),
        (tensor(dtype=["F32"] * 1000), "of shape"),
        (tensor("model.embed_tokens.weight"), "'model.embed_tokens.weight', F32"),
        (tensor("layer.4"), "'layer.4', F32"),
        (tensor("layer.-1"), "'layer.-1', F32"),
        (tensor("layer." + "9" * 5000), "'layer.999"),
        (SteeringVector({0: torch.ones(9)}).encode(), r"shape \[9\]"),
        (WARM.encode()[:-1], "the file is truncated"),
    ],
)
def test_what_is_no_vector_of_the_model_is_refused_without_a_path_of_the_server(content: bytes, reason: str) -> None:
    with pytest.raises(SteerError, match=reason) as caught:
        received(Request([content]))
    assert not any("/" in problem for problem in caught.value.problems)
    assert len("".join(caught.value.problems)) < 1000


def nothing_is_decoded(*args: Any) -> None:
    raise AssertionError("decoded")


def test_files_that_are_no_vectors_are_refused_from_their_header_on_both_routes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiny tensors by the thousand, and weights of a model: of the file, no more than the header is read."""
    monkeypatch.setattr(uploads, "native", SimpleNamespace(decode=nothing_is_decoded))
    tiny = {f"layer.{i}": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]} for i in range(100_000)}
    few = {name: tiny[name] for name in list(tiny)[:2000]}
    weights = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]}}
    for value, reason in ((tiny, "larger than|at most"), (few, "holds 2000 tensors"), (weights, "embed_tokens")):
        content = header(value) + bytes(32)
        (tmp_path / "big.safetensors").write_bytes(content)
        body = json.dumps({"name": "warm", "path": "big.safetensors"}).encode()
        for request in (Request([content]), Request([body], content_type="application/json")):
            with pytest.raises((SteerError, TooLarge), match=reason):
                received(request, tmp_path)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts the bytes that this process reads")
def test_of_a_large_file_nothing_is_read(tmp_path: Path) -> None:
    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(WARM.encode())
        file.truncate(1 << 30)
    body = json.dumps({"name": "warm", "path": "model.safetensors"}).encode()
    before = bytes_read()
    with pytest.raises(SteerError, match=r"model.safetensors is larger than \d+ bytes"):
        received(Request([body], content_type="application/json"), tmp_path)
    assert bytes_read() - before < 20_000


@pytest.mark.parametrize("body", [b"", b"[" * 60_000, b"5", b"{}", b'{"name": 1, "path": "x"}', b"\xff"])
def test_json_that_names_no_path_is_refused(body: bytes) -> None:
    with pytest.raises(SteerError, match="the body is not"):
        received(Request([body], content_type="application/json"))


def test_a_path_is_read_within_its_folder_and_errors_name_what_the_client_wrote(tmp_path: Path) -> None:
    WARM.save(tmp_path / "warm.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no vector at all")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")

    def by_path(path: str) -> Request:
        return Request([json.dumps({"name": "warm", "path": path}).encode()], content_type="application/json")

    assert received(by_path("warm.safetensors"), tmp_path)[1].digest == WARM.digest
    for path in ("bad.safetensors", "loop.safetensors"):
        with pytest.raises(SteerError, match=path) as caught:
            received(by_path(path), tmp_path)
        assert str(tmp_path) not in "".join(caught.value.problems)


@pytest.mark.parametrize("name", ["a/b", "/", ".", ".."])
def test_names_that_no_delete_could_name_are_refused(name: str) -> None:
    request = Request([WARM.encode()], name)
    with pytest.raises(SteerError, match="can't be part of a path"):
        received(request)
    assert request.read == 0


def test_an_arm_is_a_name_and_an_expression() -> None:
    def arm(body: Any) -> tuple[str, str]:
        return asyncio.run(uploads.received_arm(Request([json.dumps(body).encode()], None)))

    assert arm({"name": "friendly", "expression": "2*warm"}) == ("friendly", "2*warm")
    for body in ({}, {"name": "a"}, {"name": "a", "expression": 5}, [], None, "a=b", {"name": "a", "steer": "b"}):
        with pytest.raises(SteerError, match=r"the body is not \{name, expression\}"):
            arm(body)
    with pytest.raises(SteerError, match="the body has 'vectors', which means nothing here"):
        arm({"name": "a", "expression": "warm", "vectors": {}})


def test_a_probe_is_received_as_a_vector_is_and_must_fit_the_model() -> None:
    probe = fakes.probes()["joy"]
    name, found = received(Request([probe.encode()], "joy"))
    assert (name, found.digest) == ("joy", probe.digest)
    assert isinstance(found, Probe)
    many = Probe({i: Readout(torch.zeros(fakes.HIDDEN), 0.0) for i in range(fakes.LAYERS)})
    assert received(Request([many.encode()], "joy"))[1].digest == many.digest
    for wrong, reason in (
        (Probe({4: Readout(torch.zeros(fakes.HIDDEN), 0.0)}), "a probe of the model has layer.0 to layer.3"),
        (Probe({0: Readout(torch.zeros(fakes.HIDDEN + 1), 0.0)}), r"each with .weight \[8\] and .bias \[1\]"),
    ):
        with pytest.raises(SteerError, match=reason):
            received(Request([wrong.encode()], "joy"))
    with pytest.raises(SteerError, match=r"layer.0.weight.* of shape \[9\]"):
        received(Request([tensor("layer.0.weight", shape=(9,))], "joy"))
