"""API keys come from a file or the environment, and never stand among the arguments of vLLM's process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from steer.serving.keys import KEYS, Keys, api_keys, arguments_of, hub_token
from vectors.errors import UsageError


@pytest.mark.parametrize(
    ("flags", "keys", "rest"),
    [
        (["--api-key", "a"], ("a",), ()),
        (["--api-key=a", "--port", "1"], ("a",), ("--port", "1")),
        (["--x", "1", "--api-key", "a", "b", "--y"], ("a", "b"), ("--x", "1", "--y")),
        (["--api_key", "a"], ("a",), ()),
        (["--api-k=-a"], ("-a",), ()),
        (["--api-ke", "a"], ("a",), ()),
        (["--api-server-count", "2"], (), ("--api-server-count", "2")),
        (["--max-model-len", "9"], (), ("--max-model-len", "9")),
    ],
)
def test_keys_among_the_flags_for_vllm_are_taken_out(
    flags: Sequence[str], keys: tuple[str, ...], rest: tuple[str, ...]
) -> None:
    assert api_keys(flags, (), None, {}) == Keys(keys, rest, bool(keys))


def test_a_file_holds_one_key_a_line_and_the_environment_one(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert api_keys([], (), file, {"STEER_API_KEY": "other"}) == Keys(("one", "two"), (), False)
    both = {"STEER_API_KEY": "ours", "VLLM_API_KEY": "theirs"}
    assert api_keys([], (), None, both).keys == ("ours",)
    assert api_keys([], (), None, {"STEER_API_KEY": "", "VLLM_API_KEY": "theirs"}).keys == ("theirs",)
    assert api_keys([], (), None, {}) == Keys((), (), False)
    assert api_keys([], ("shown",), None, both) == Keys(("shown",), (), True)


@pytest.mark.parametrize("key", ["", "a b", "é", "a\nb", "\x00"])
def test_a_key_that_no_client_can_send_is_refused_and_never_shown(key: str) -> None:
    with pytest.raises(UsageError, match="the API key number 1") as caught:
        api_keys([], (key,), None, {})
    assert not key.strip() or key not in "".join(caught.value.problems)


def test_a_key_given_twice_or_a_file_without_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "key").write_text("a")
    for file, flags, reason in (
        (tmp_path / "empty", [], "holds no key"),
        (tmp_path / "missing", [], "can't be read: No such file"),
        (tmp_path / "key", ["--api-key", "b"], "given by -- --api-key and by --api-key-file"),
    ):
        with pytest.raises(UsageError, match=reason):
            api_keys(flags, (), file, {})


def test_vllm_gets_the_keys_inside_its_process() -> None:
    assert arguments_of({}) == arguments_of({KEYS: "[]"}) == []
    assert arguments_of({KEYS: '["-a"]'}) == ["--api-key=-a"]
    assert arguments_of({KEYS: '["a", "b"]'}) == ["--api-key", "a", "b"]


@pytest.mark.parametrize(
    ("flags", "rest", "token"),
    [
        (["--hf-token", "secret", "--x"], ("--x",), "secret"),
        (["--x", "1", "--hf_token=secret"], ("--x", "1"), "secret"),
        (["--hf-to", "secret"], (), "secret"),
        (["--hf-token"], ("--hf-token",), None),
        (["--hf-token", "--x"], ("--hf-token", "--x"), None),
        (["--hf-overrides", "{}"], ("--hf-overrides", "{}"), None),
    ],
)
def test_the_token_of_the_hub_is_taken_out_too(flags: list[str], rest: tuple[str, ...], token: str | None) -> None:
    assert hub_token(flags) == (rest, token)
