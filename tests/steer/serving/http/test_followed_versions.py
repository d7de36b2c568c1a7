"""A served alias that moves: new conversations switch, running ones stay, and the receipt says which commit."""

from __future__ import annotations

import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serve_process import Serving, chat, promote

from steer.serving.http import followed
from steer.serving.http.followed import Followed, Version
from steer.store import names, refs
from steer.store.working import document
from vectors.expression import parse


def version(number: int) -> Version:
    return Version(f"sha256:{number:064x}", f"{number}*warm", ("warm",))


@pytest.fixture
def arm() -> Followed:
    return Followed("champion", "tone@champion", Path("s"), Path("w"), "pico", version(1))


def moved(arm: Followed, number: int) -> None:
    arm.current = version(number)
    arm.versions[arm.current.commit] = arm.current


def test_a_running_conversation_keeps_its_version_and_a_new_one_gets_the_present_one(arm: Followed) -> None:
    assert arm.version_for("a", begins=False) == version(1)
    moved(arm, 2)
    assert arm.version_for("a", begins=False) == version(1)
    assert arm.version_for("b", begins=False) == version(2)
    assert arm.version_for("a", begins=True) == version(2)  # another conversation that begins with the same words
    arm.remember("resp_1", version(1))
    assert arm.version_for("resp_1", begins=False) == version(1)


def test_a_vector_that_only_a_condition_reads_is_one_of_the_version() -> None:
    settings = {"name": "tone@champion", "store": "s", "work": "w", "base": "pico", "commit": version(1).commit}
    admission: Any = SimpleNamespace(arms={"champion": parse("warm@when:anger>0.5 + formal")})
    begun = followed.begin({"champion": settings}, admission)
    assert set(begun["champion"].current.vectors) == {"warm", "formal", "anger"}


def test_what_is_remembered_is_bounded(arm: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed, "CONVERSATIONS", 3)
    for i in range(10):
        arm.version_for(str(i), begins=False)
    moved(arm, 2)
    assert arm.version_for("9", begins=False) == version(1)
    assert arm.version_for("0", begins=False) == version(2)
    assert len(arm.conversations) == 3
    arm.versions = OrderedDict({arm.current.commit: arm.current})  # the oldest versions are dropped
    assert arm.version_for("9", begins=False) == version(2)


@pytest.mark.slow
def test_a_served_alias_moves_under_the_server(server: Serving) -> None:
    def talk(conversation: str | None = None, **more: object) -> tuple[dict[str, str], dict]:
        headers = {"X-Steer-Conversation": conversation} if conversation else {}
        body = {"model": "pico:champion", "max_tokens": 4, "temperature": 0, **more}
        body.setdefault("messages", [{"role": "user", "content": "warm"}])
        status, given, answer = server.call("POST", "/v1/chat/completions", body, headers=headers)
        assert status == 200, answer
        assert given["x-steer-commit"] == answer["steer"]["version"]["commit"]
        assert answer["steer"]["version"]["name"] == "tone@champion"
        return given, answer

    def wait_for(commit: str) -> None:
        end = time.monotonic() + 30
        while server.call("GET", "/steer")[2]["versions"]["champion"]["commit"] != commit:
            assert time.monotonic() < end
            time.sleep(0.2)

    first = names.resolve(server.store, "tone@champion")
    assert talk("running")[1]["steer"]["expression"].startswith("0.5*formal.")
    begun = [{"role": "user", "content": "the warm"}]
    reply = talk(messages=begun)[1]["choices"][0]["message"]
    second = promote(server.store, formal=0.5, warm=1.5)
    wait_for(second)
    assert talk("running")[0]["x-steer-commit"] == first
    goes_on = [*begun, {"role": "assistant", "content": reply["content"] or "x"}, {"role": "user", "content": "cold"}]
    assert talk(messages=goes_on)[0]["x-steer-commit"] == first
    headers, answer = talk("new")
    assert headers["x-steer-commit"] == second
    assert [term["vector"].partition(".")[0] for term in answer["steer"]["terms"]] == ["formal", "warm"]
    # A version that can't be served is reported, and the arm stays what it was.
    document.edit(server.store.file, document.with_field(("base",), "another"))
    bad = promote(server.store, formal=2.0)
    end = time.monotonic() + 30
    while (state := server.call("GET", "/steer")[2]["versions"]["champion"])["problem"] is None:
        assert time.monotonic() < end
        time.sleep(0.2)
    assert (state["commit"], state["problem"]["commit"]) == (second, bad)
    assert "another" in state["problem"]["problem"]
    assert talk("newer")[0]["x-steer-commit"] == second
    # Undone, as after a bad promotion: new conversations get the first version again.
    refs.point(server.store, {refs.alias("tone", "champion"): first}, "steer undo")
    wait_for(first)
    assert talk("newest")[0]["x-steer-commit"] == first
    assert talk("new")[0]["x-steer-commit"] == second
    document.edit(server.store.file, document.with_field(("base",), str(server.model)))
    assert chat(server, "pico:friendly")[2]["steer"].get("version") is None
