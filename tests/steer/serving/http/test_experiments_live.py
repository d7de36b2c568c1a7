"""Experiments on a real server under load: nothing is lost or doubled, whatever dies; and a verdict that is right.

Here one engine serves as many requests as a verdict needs; `make load` sends 500, and ends the server in both ways.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import openai
import postgres
import pytest
import sqlalchemy
import torch
from engine_process import save_adapter, save_model
from safetensors.torch import load_file
from serve_process import Serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from probes.generation import generate
from probes.models.loading import load
from probes.strengths import with_system
from steer.cli import run
from steer.evaluation import scorers
from steer.experiments import document, promotion
from steer.experiments.storage.database import engine_of, open_log
from steer.experiments.storage.tables import EXPOSURES, FEEDBACK
from steer.experiments.storage.writer import recover
from vectors.probe import Probe, Readout
from vectors.steering import SteeringVector

pytestmark = pytest.mark.slow

WHOLE = os.environ.get("STEER_TEST_LOAD") == "all"
REQUESTS = 500 if WHOLE else 360  # of the experiment with a verdict: about 120 for each of three arms
FEW = 150 if WHOLE else 72
AT_ONCE = 32
READ = ("mood", "last")  # judges that are probes
TOKENS = 8  # and up to two more, so that lengths vary in every run


class Trial(NamedTuple):
    """A running server with three experiments, its folder, and the PostgreSQL of one of them."""

    server: Serving
    folder: Path
    database: postgres.Server


def write_experiments(folder: Path, url: str) -> None:
    """tone in PostgreSQL, with an arm that ends its answers at once and one like the control; choice, with these arms
    and adaptive weights, and the others in SQLite."""
    model = save_model(folder, "llama")
    weights = load_file(next(model.glob("*.safetensors")))
    end = weights["lm_head.weight"][2].float()  # the row of the token that ends an answer
    SteeringVector({3: 400 * end / end.norm()}).save(folder / "end.safetensors")
    generous = {"length_ratio": 100.0, "repetition": 1.0, "latency_p95": 100.0}
    tone: dict[str, Any] = {
        # The arms differ by several tokens or by none. Lengths vary in every run: an effect of 1 left one undecided.
        "metric": {"name": "response_tokens", "better": "lower", "smallest_effect": 2},
        "secondary": [{"name": "thumbs"}],
        "guardrails": generous, "arms": {"control": {}, "brief": {"steer": "end"}, "twin": {"steer": "0*warm"}},
        "log": url,
    }  # fmt: skip
    small = {"metric": {"name": "thumbs"}, "arms": {"control": {}, "warm": {"steer": "warm"}}}
    direction = torch.randn(128, generator=torch.Generator().manual_seed(1))
    Probe({0: Readout(direction, 0.0)}).save(folder / "mood.safetensors")
    Probe({3: Readout(direction / 10, 0.5)}).save(folder / "last.safetensors")  # of the last layer
    gated = {
        "metric": {"name": "thumbs"},
        "secondary": [{"name": name, "kind": "number"} for name in READ],
        "judges": [{"name": name, "scorer": f"probe:{name}.safetensors", "sample_rate": 1} for name in READ],
        "store_texts": True,
        "arms": {
            "control": {},
            "once": {"steer": "end@when:mood>-1000"},
            "each": {"steer": "warm[2]@while:mood>0"},
            "pushed": {"steer": "8*warm[0]"},
        },
    }
    choice = {
        "metric": {"name": "response_tokens", "better": "lower", "smallest_effect": 1}, "guardrails": generous,
        "arms": tone["arms"], "allocation": {"method": "track-and-stop", "smallest_share": "10%", "every": 1},
    }  # fmt: skip
    for name, values in {"tone": tone, "small": small, "gated": gated, "choice": choice}.items():
        text = json.dumps({"name": name, "salt": f"{name}-salt", "unit": "user", **values})
        (folder / f"{name}.yaml").write_text(text)


def started(folder: Path) -> Serving:
    flags = ("--max-num-seqs", str(AT_ONCE), "--dtype", "float32")  # since scores of random weights are all rounding
    server = Serving(folder, *flags, experiments=["tone.yaml", "small.yaml", "gated.yaml", "choice.yaml"])
    server.wait()
    return server


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    folder = tmp_path_factory.mktemp("experiments")
    mounted = (
        os.getuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True
        ).returncode
    )
    with postgres.running() as database:
        try:
            write_experiments(folder, database.new_log().replace("+psycopg", ""))
            server = started(folder)
            try:
                yield Trial(server, folder, database)
            finally:
                server.close()
        finally:
            if mounted:
                subprocess.run(["umount", "-l", folder], check=True)


class Users:
    """Simulated users of an experiment, through OpenAI's client. `received` are the ids of whole answers."""

    def __init__(self, server: Serving, model: str) -> None:
        self.server, self.model = server, model
        self.received: list[str] = []
        self.failed = 0

    def run(self, count: int, *, first: int = 0, **events: Any) -> None:
        """`count` requests, `AT_ONCE` at a time; `events` are functions to run after so many answers (`after_10=f`)."""
        asyncio.run(
            self._run(range(first, first + count), {int(k.removeprefix("after_")): f for k, f in events.items()})
        )

    async def _run(self, numbers: range, events: dict[int, Any]) -> None:
        client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.server.port}/v1", api_key="none", max_retries=0, timeout=120
        )
        gate, done = asyncio.Semaphore(AT_ONCE), 0

        async def one(number: int) -> None:
            nonlocal done
            async with gate:
                try:
                    self.received.append(await self._ask(client, number))
                except openai.OpenAIError:
                    self.failed += 1
                done += 1
                if done in events:
                    await asyncio.to_thread(events[done])

        async with client:
            await asyncio.gather(*(one(number) for number in numbers))

    async def _ask(self, client: openai.AsyncOpenAI, number: int) -> str:
        """One request, every third one streamed; the id of the answer once it is whole."""
        options: Any = {
            "model": self.model, "max_tokens": TOKENS + number % 3, "user": f"user {number}",
            "messages": [{"role": "user", "content": f"word {number}"}],
        }  # fmt: skip
        if number % 3:
            return (await client.chat.completions.create(**options)).id
        found = ""
        async for chunk in await client.chat.completions.create(stream=True, **options):
            found = chunk.id or found
        return found


def recorded(folder: Path, name: str) -> Counter[str]:
    """How often each whole answer stands in the log; one that was cut off may have no id."""
    engine = engine_of(document.address(str(folder / f"{name}.yaml")).log)
    with engine.connect() as connection:
        whole = sqlalchemy.select(EXPOSURES.c.response).where(EXPOSURES.c.response.is_not(None))
        found = Counter(connection.execute(whole).scalars())
    engine.dispose()
    return found


def log_of(trial: Trial, name: str) -> dict[str, Any]:
    """How the log of an experiment is doing."""
    log: dict[str, Any] = trial.server.call("GET", "/steer/experiments")[2]["experiments"][name]["log"]
    return log


def wait_for(trial: Trial, name: str, seconds: float = 60) -> dict[str, Any]:
    """The state of an experiment once nothing waits for its log."""
    end = time.monotonic() + seconds
    while True:
        state: dict[str, Any] = trial.server.call("GET", "/steer/experiments")[2]["experiments"][name]
        if not state["log"]["waiting"]:
            return state
        assert time.monotonic() < end, state
        time.sleep(0.2)


def test_nothing_is_lost_or_doubled_when_postgresql_is_killed_in_the_middle(trial: Trial) -> None:
    users, seen = Users(trial.server, "tone"), list[dict[str, Any]]()
    users.run(
        REQUESTS,
        after_100=trial.database.kill,
        after_245=lambda: seen.append(log_of(trial, "tone")),
        after_250=trial.database.start,
    )
    assert (len(users.received), users.failed) == (REQUESTS, 0)  # requests never noticed
    assert seen[0]["waiting"] > 0
    assert wait_for(trial, "tone")["log"] == {"waiting": 0, "dropped": 0, "away": None}
    assert recorded(trial.folder, "tone") == Counter(users.received)


@contextlib.contextmanager
def full_disk(filler: Path) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Functions that fill the disk of a file and empty it again.

    In between a thread takes what becomes free: a log that is opened anew frees the space of its write-ahead log, and
    would have room for some rows.
    """
    full, ended = threading.Event(), threading.Event()

    def write() -> None:
        with filler.open("wb", buffering=0) as file:
            while not ended.is_set():
                try:
                    file.write(b"x" * 4096)
                except OSError:
                    full.set()
                    time.sleep(0.001)

    thread = threading.Thread(target=write, daemon=True)

    def fill() -> None:
        thread.start()
        assert full.wait(60)

    def empty() -> None:
        ended.set()
        thread.join()
        filler.unlink()

    try:
        yield fill, empty
    finally:
        ended.set()


def test_nothing_is_lost_while_the_disk_is_full(trial: Trial) -> None:
    free = os.statvfs(trial.folder)
    if free.f_blocks * free.f_frsize > 64 << 20:
        pytest.skip("only root may mount a small file system")
    users, seen = Users(trial.server, "small"), list[dict[str, Any]]()
    with full_disk(trial.folder / "filler") as (fill, empty):
        users.run(FEW, after_15=fill, after_45=lambda: seen.append(log_of(trial, "small")), after_50=empty)
    assert (len(users.received), users.failed) == (FEW, 0)
    assert seen[0]["waiting"] > 0
    assert wait_for(trial, "small")["log"]["dropped"] == 0
    assert recorded(trial.folder, "small") == Counter(users.received)


def test_the_verdict_is_ship_for_the_arm_that_is_better_and_no_difference_for_its_twin(trial: Trial) -> None:
    """On the answers of the first test, whose database was killed meanwhile."""
    experiment = document.read(trial.folder / "tone.yaml")
    engine = open_log(experiment.log)
    found = {arm.name: promotion.decision_of(engine, experiment, 1, arm) for arm in experiment.arms if not arm.plain}
    engine.dispose()
    assert {name: decision.state for name, decision in found.items()} == {"brief": "ship", "twin": "no difference"}, (
        found
    )


def test_adaptive_weights_select_the_arm_that_is_better_and_move_nobody(trial: Trial) -> None:
    """Weights follow the answers of the server's own log; a user of an earlier epoch keeps the arm of then."""
    users, sent = Users(trial.server, "choice"), 0
    while (state := wait_for(trial, "choice"))["epoch"]["selected"] != "brief":
        assert sent < 20 * AT_ONCE, state
        users.run(2 * AT_ONCE, first=sent)
        sent += 2 * AT_ONCE
        time.sleep(1.2)  # the shortest epoch
    assert users.failed == 0
    weights = state["epoch"]["weights"]
    assert weights["brief"] == max(weights.values()) > 0.5
    experiment = document.read(trial.folder / "choice.yaml")

    def arms() -> dict[str, set[str]]:
        engine = open_log(experiment.log)
        with engine.connect() as connection:
            rows = connection.execute(sqlalchemy.select(EXPOSURES.c.unit, EXPOSURES.c.arm)).all()
        engine.dispose()
        found: dict[str, set[str]] = {}
        for unit, arm in rows:
            found.setdefault(unit, set()).add(arm)
        return found

    before = arms()
    assert len(before) == sent
    users.run(AT_ONCE, first=0)  # again, some of them with an arm that new users hardly get
    users.run(AT_ONCE, first=sent)
    wait_for(trial, "choice")
    after = arms()
    assert {unit: after[unit] for unit in before} == before
    new = [arm for unit, found in after.items() if unit not in before for arm in found]
    assert len(new) == AT_ONCE
    assert new.count("brief") > AT_ONCE / 2


def test_what_the_conditions_of_an_arm_read_and_decided_is_recorded(trial: Trial) -> None:
    users = Users(trial.server, "gated")
    users.run(32)
    assert users.failed == 0
    wait_for(trial, "gated")
    engine = engine_of(document.address(str(trial.folder / "gated.yaml")).log)
    with engine.connect() as connection:
        rows = connection.execute(sqlalchemy.select(EXPOSURES)).mappings().all()
    engine.dispose()
    experiment = document.read(trial.folder / "gated.yaml")
    digest = experiment.probes["mood"].digest
    by_arm = {name: [row for row in rows if row["arm"] == name] for name in ("control", "once", "each", "pushed")}
    assert all(by_arm.values())
    assert {row["gates"] for row in (*by_arm["control"], *by_arm["pushed"])} == {None}
    for row in by_arm["once"]:
        (gate,) = json.loads(row["gates"])
        assert (gate["condition"], gate["digest"], gate["held"], gate["read"]) == ("@when:mood>-1000", digest, 1, 1)
        assert row["response_tokens"] < TOKENS  # it acted: the answer ended at once
    reads = [(json.loads(row["gates"])[0], row["response_tokens"]) for row in by_arm["each"]]
    assert all(gate["read"] == tokens - 1 and 0 <= gate["held"] <= gate["read"] for gate, tokens in reads)
    assert {row["composition"] for row in rows} == {None, *(arm.composition for arm in experiment.arms[1:])}


@pytest.mark.parametrize("judge", READ)
def test_a_probe_judges_by_what_the_unsteered_model_makes_of_an_answer(judge: str, trial: Trial) -> None:
    """As the scorer of `steer eval` does through transformers: also of an arm that steers the layer that it reads, and
    at the output of the last block."""
    experiment = document.read(trial.folder / "gated.yaml")
    engine = engine_of(experiment.log)
    shown, given = EXPOSURES.c, FEEDBACK.c
    query = sqlalchemy.select(shown.arm, shown.prompt, shown.answer, given.value).join(
        FEEDBACK, given.response == shown.response
    )
    end = time.monotonic() + 60
    while True:
        with engine.connect() as connection:
            rows = connection.execute(query.where(given.metric == judge, shown.experiment == "gated")).all()
            texts = connection.execute(sqlalchemy.select(shown.answer).where(shown.reason == "assigned")).scalars()
            wanted = sum(bool(text.strip()) for text in texts)
        if len(rows) >= wanted:
            break
        assert time.monotonic() < end, (len(rows), wanted)
        time.sleep(0.2)
    engine.dispose()
    assert len(rows) > 12
    model = load(trial.server.model, "cpu", "float32")
    scorer = scorers.configured({"kind": "probe", "file": f"{judge}.safetensors"}, trial.folder)
    expected = scorer.score(
        [scorers.GeneratedText(json.loads(prompt)[0]["content"], answer) for _, prompt, answer, _ in rows],
        scorers.Resources(loaded=model),
    )
    other = [
        (arm, answer, value, scored.evidence["score"])
        for (arm, _, answer, value), scored in zip(rows, expected, strict=True)
        if value != pytest.approx(scored.evidence["score"], rel=0.02, abs=0.05)
    ]
    # Random weights write null bytes too: the judge reads them, and the log has U+FFFD in their place.
    assert all("\N{REPLACEMENT CHARACTER}" in answer for _, answer, *_ in other), other
    assert len(other) < len(rows) / 4, other


def test_a_stop_sends_new_users_to_the_control(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trial.folder)
    assert run(["ab", "stop", "small", "--json"]) == 0
    end = time.monotonic() + 20
    while not trial.server.call("GET", "/steer/experiments")[2]["experiments"]["small"]["stopped"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    for i in range(12):
        _, headers, _ = trial.server.call("POST", "/v1/chat/completions", {**body, "user": f"new {i}"})
        assert (headers["x-steer-arm"], headers["x-steer-unit"]) == ("small:control", "user; stopped")


def test_what_was_answered_is_in_the_log_after_a_kill(trial: Trial) -> None:
    """Last: it ends the server, by SIGKILL, and where the whole trial is asked for, started again, by SIGTERM."""
    server = trial.server
    for number in (signal.SIGKILL, signal.SIGTERM)[: 1 + WHOLE]:
        if server.process.poll() is not None:
            server.close()
            server = started(trial.folder)
        before = recorded(trial.folder, "tone")
        trial.database.kill()  # so that the journal holds what was answered
        users, acknowledged = Users(server, "tone"), []

        def end(server: Serving = server, users: Users = users, number: int = number, said: Any = acknowledged) -> None:
            for response in users.received[-5:]:
                body = {"response_id": response, "metric": "thumbs", "value": True}
                status, _, answer = server.call("POST", "/v1/feedback", body)
                assert status == 200
                said.append(answer["id"])
            (api,) = _servers(server.process.pid)
            os.kill(api, number)

        users.run(FEW, first=10_000 * number, after_40=end)
        server.process.wait(60)
        trial.database.start()
        engine = open_log(document.address(str(trial.folder / "tone.yaml")).log)
        recover(engine, trial.folder / "tone.journal")
        now = recorded(trial.folder, "tone") - before
        assert set(users.received) <= set(now)
        assert set(now.values()) == {1}
        with engine.connect() as connection:
            assert set(acknowledged) <= set(connection.execute(sqlalchemy.select(FEEDBACK.c.id)).scalars())
        engine.dispose()
    server.close()


@pytest.mark.skipif(not WHOLE, reason="a server of its own: make load")
def test_a_lora_adapter_and_a_prompt_are_served_as_arms_beside_the_control(tmp_path: Path) -> None:
    """Requests of all arms at once: each gets the greedy answer of its own model, as transformers gives it."""
    model = save_model(tmp_path, "llama")
    plain, merged = (AutoModelForCausalLM.from_pretrained(model).eval() for _ in range(2))
    save_adapter(merged, tmp_path / "adapter")
    arms = {"control": {}, "adapter": {"lora": "adapter"}, "prompt": {"system": "be warm"}}
    values = {"name": "mixed", "salt": "s", "metric": {"name": "thumbs"}, "unit": "user", "arms": arms}
    (tmp_path / "mixed.yaml").write_text(json.dumps(values))
    # One at a time, as a CPU needs it; in float32, since greedy choices of random weights are close.
    flags = ("--max-num-seqs", "1", "--dtype", "float32")
    server = Serving(tmp_path, *flags, experiments=["mixed.yaml"])
    try:
        server.wait()

        def ask(number: int) -> tuple[str, int, str]:
            body = {"model": "mixed", "max_tokens": 8, "temperature": 0, "user": f"u{number}",
                    "messages": [{"role": "user", "content": f"word {number % 4}"}]}  # fmt: skip
            _, headers, answer = server.call("POST", "/v1/chat/completions", body)
            return headers["x-steer-arm"], number % 4, answer["choices"][0]["message"]["content"]

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(36)))
        state = server.call("GET", "/steer/experiments")[2]["experiments"]["mixed"]
    finally:
        server.close()
    assert set(state["answers"]) == set(arms)
    assert min(state["answers"].values()) > 4
    tokenizer = AutoTokenizer.from_pretrained(model)
    for arm, number, text in answers:
        name = arm.removeprefix("mixed:")
        ids = with_system([f"word {number}"], "be warm" if name == "prompt" else None, tokenizer)
        expected = generate(merged if name == "adapter" else plain, tokenizer, ids, max_tokens=8)[0].completion_ids
        # vLLM does not send the bytes of a character that the last token leaves unfinished.
        whole = tokenizer.decode(expected, skip_special_tokens=True)
        assert text.rstrip(" \N{REPLACEMENT CHARACTER}") == whole.rstrip(" \N{REPLACEMENT CHARACTER}"), arm


def _servers(launcher: int) -> list[int]:
    """The children of `steer serve`: the API server."""
    found = subprocess.run(["ps", "--ppid", str(launcher), "-o", "pid="], capture_output=True, text=True, check=True)
    return [int(word) for word in found.stdout.split()]
