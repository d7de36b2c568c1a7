"""Flags for vLLM that `steer serve` reads, in every form that vLLM takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer.cli.commands.serve import markers_in
from steer.serving.address import Address, address_of, problems_of_flags
from steer.serving.flags import has, served_name, value_of
from vectors.errors import UsageError


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], None),
        (["--port", "1"], None),
        (["--served-model-name", "a", "b", "--x"], "a"),
        (["--served-model-name=a"], "a"),
        (["--x", "--served_model_name", "a"], "a"),
        (["--served-model-name"], None),
        (["--served", "a", "b"], "a"),
    ],
)
def test_the_name_that_vllm_is_told_to_serve_is_read_from_its_flags(flags: list[str], name: str | None) -> None:
    assert served_name(flags) == name


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ([], None),
        (["--uds", "/s"], "/s"),
        (["--uds=/s"], "/s"),
        (["--ud", "/s"], "/s"),
        (["--uds", "/s", "--uds", "/t"], "/t"),
        (["--uds", "--x"], None),
        (["--max-model-len", "9", "/s"], None),
        (["--u", "/s"], None),
    ],
)
def test_the_last_value_of_a_flag_counts(flags: list[str], value: str | None) -> None:
    assert value_of(flags, "--uds", "--ud") == value


def test_flags_in_a_configuration_file_count_where_the_command_line_has_none(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("uds: /s\nssl_certfile: c.pem\nheadless: true\nport: 9\n")
    flags = ["--config", str(file)]
    assert value_of(flags, "--uds", "--ud") == "/s"
    assert value_of([*flags, "--uds", "/t"], "--uds", "--ud") == "/t"
    assert has(flags, "--headless", "--hea")
    assert address_of(flags, "127.0.0.1", 8000) == Address("127.0.0.1", 8000, True, "/s")
    file.write_text("served-model-name: [a, b]")
    assert served_name(flags) == "a"
    for damaged in ("uds: [", "- uds", "\xff"):
        file.write_text(damaged, encoding="latin-1")
        assert value_of(flags, "--uds", "--ud") is None, "vLLM says what is wrong with it"
    assert value_of(["--config", str(tmp_path / "missing")], "--uds", "--ud") is None


@pytest.mark.parametrize(
    ("flags", "address", "url"),
    [
        ([], "http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        (["--ssl-certfile", "c", "--ssl-keyfile", "k"], "https://127.0.0.1:8000", "https://127.0.0.1:8000"),
        (["--ssl_certfile=both.pem"], "https://127.0.0.1:8000", "https://127.0.0.1:8000"),
        (["--uds", "/tmp/s"], "unix:/tmp/s", "http://localhost"),
        (["--uds", "/tmp/s", "--ssl-certf", "c"], "unix:/tmp/s", "https://localhost"),
    ],
)
def test_the_address_follows_from_the_flags(flags: list[str], address: str, url: str) -> None:
    found = address_of(flags, "127.0.0.1", 8000)
    assert (str(found), found.url) == (address, url)
    assert address_of([], "::1", 8000).url == "http://[::1]:8000"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--port", "9000"], "--port 9000 is given to vLLM: give it to steer serve"),
        (["--port=9000"], "--port 9000 is given"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is given to vLLM"),
        (["--headless"], "--headless starts no HTTP server that steers"),
        (["--grpc"], "--grpc starts no HTTP server that steers"),
    ],
)
def test_flags_with_which_nothing_would_ever_answer_are_refused(flags: list[str], problem: str) -> None:
    (found,) = problems_of_flags(flags, {})
    assert problem in found


def test_a_front_end_without_plugins_is_refused() -> None:
    assert problems_of_flags(["--grpc-port", "0", "--max-model-len", "9"], {"VLLM_USE_RUST_FRONTEND": "0"}) == []
    assert "unset it" in problems_of_flags([], {"VLLM_USE_RUST_FRONTEND": "1"})[0]


def test_markers_of_sections_are_pairs_by_kind() -> None:
    given = ["thinking=<a=1>,</a>", "tools=[CALL]"]
    assert markers_in(given) == {"thinking": ["<a=1>", "</a>"], "tools": ["[CALL]", ""]}
    for wrong in ("thinking", "thinking=", "speech=a,b", "thinking=,b"):
        with pytest.raises(UsageError, match="is not thinking or tools with two texts"):
            markers_in([wrong])
    with pytest.raises(UsageError, match="gives tools twice"):
        markers_in(["tools=a,b", "tools=c,d"])
