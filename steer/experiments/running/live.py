"""A running experiment, as the front end of a server uses it: which arm a request gets, and what became of it.

`begin` opens the log; afterwards nothing that a request calls waits for the database. A thread follows the state in the
log, so that a stop reaches every server within a second, and decides the steps of the ramp.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from steer.experiments.assignment import ASSIGNED, Decision, Identity, assign, hashed
from steer.experiments.running import counted
from steer.experiments.running.adaptive import Adaptive
from steer.experiments.running.conversations import Answered, Begun, Conversations
from steer.experiments.running.counted import Counted
from steer.experiments.running.guardrails import Guard, described
from steer.experiments.running.judges import Judging
from steer.experiments.running.questions import require_keys
from steer.experiments.running.readouts import Read
from steer.experiments.specification import Arm, Experiment
from steer.experiments.storage import state
from steer.experiments.storage.database import open_log
from steer.experiments.storage.journal import journal_of
from steer.experiments.storage.state import State
from steer.experiments.storage.writer import Writer, recover
from vectors.errors import SteerError

_log = logging.getLogger("steer")

CHECK = 0.4  # seconds between two checks of the guardrails, which take a millisecond of the server's each
POLL = 0.4  # seconds between two readings of the state
ADAPT = 1.0  # seconds between two attempts to begin the next epoch of weights
STEP = 2.0  # seconds between two decisions about the ramp
SHARE = 3.0  # seconds between two readings of what other servers have answered
SOON = 30.0  # seconds that such a reading goes back: few answers take longer to reach the log
GATHER = 60.0  # seconds between two readings that go back so far that none is missed
LATE = 300.0  # seconds that an answer may take to reach the log, to count for the guardrails of other servers
FORCED, STOPPED, CONTINUED = "forced", "stopped", "continued"
SAME, FIRST = "conversation", "first message"  # sources of a unit that is the conversation itself


class Live:
    """A running experiment of one server. `poll` follows the log; `start` and `end` run it in a thread.

    `read` reads answers for judges that are probes.
    """

    def __init__(self, experiment: Experiment, engine: Engine, folder: Path, read: Read | None = None) -> None:
        self.experiment, self.engine = experiment, engine
        self.identity, self.numbers = secrets.token_hex(10), itertools.count()
        self.version = state.register(engine, experiment)
        damaged: list[int] = []
        recover(engine, folder, damaged.append)
        # A file that takes the place of the log must know this version: its rows would be those of another one there.
        self.writer = Writer(engine, folder, lambda: state.is_registered(engine, experiment, self.version))
        if damaged:
            self._note(state.DROPPED, count=sum(damaged), reason="lines of a killed server that can't be read")
        self.judging = Judging(experiment, self.writer, read, self._unscored) if experiment.judges else None
        self.conversations = Conversations()
        self.conversations.restore(engine, experiment.name, self.identity)
        self.lock = threading.Lock()  # of the state and the guard
        self.state = state.state_of(engine, experiment.name, self.version)
        self.guard = self._guard()
        self.counted = Counted()
        self.count()
        self.weight_version: str | None = None  # of the served weights, set by the server
        self.warned: set[tuple[str, str]] = set()
        self.reported = 0  # rows dropped, as the log knows
        self.stepped = self.checked = self.shared = 0.0
        self.held = -1  # the latest stage of which the log says why its ramp is held
        self.gathered = time.monotonic()
        self.ending = threading.Event()
        adapts = experiment.allocation is not None
        self.adaptive = Adaptive(engine, experiment, self.version) if adapts else None
        self.threads: list[threading.Thread] = []

    @property
    def coverage(self) -> float:
        """The share of the units that take part now."""
        return self.experiment.steps[min(self.state.stage, len(self.experiment.steps) - 1)]

    @property
    def ramping(self) -> bool:
        """Whether the coverage is still below the full one; answers of this time do not count."""
        return self.state.stage < len(self.experiment.steps) - 1

    def decide(self, identity: Identity, forced: str | None = None) -> Decision:
        """The arm of a request. Raises KeyError for a forced arm that there is none of."""
        experiment = self.experiment
        unit = hashed(experiment.salt, identity.unit)
        conversation = hashed(experiment.salt, identity.conversation, "conversation")
        continued = self.conversations.of_response(identity.previous) if identity.previous else None
        if continued is not None:
            conversation, unit = continued.conversation, continued.unit if identity.source == SAME else unit
        with self.lock:
            now, coverage, ramping = self.state, self.coverage, self.ramping

        def decision(arm: Arm, reason: str, counted: bool = False, epoch: int | None = None) -> Decision:
            return Decision(arm, reason, self.version, now.stage, counted, unit, identity.source, conversation, epoch)

        if forced is not None:
            arm = experiment.arm(forced)
            if arm is None:
                raise KeyError(forced)
            return decision(arm, FORCED)
        begun = None if identity.begins else self.conversations.find(conversation, unit)
        if begun is None and not identity.begins:
            # A request without its unit's id goes on with what the conversation began as, and one that has it now,
            # with what began without. Neither counts: the arm is not that of the unit.
            alone = identity.source in (SAME, FIRST)
            begun = self.conversations.find(
                conversation, None if alone else hashed(experiment.salt, identity.conversation)
            )
        if begun is not None:
            arm = experiment.arm(begun.arm)
            if arm is not None and arm.digest == begun.digest:
                self.conversations.put(conversation, begun._replace(at=time.time()))
                same = (begun.version, begun.stage, begun.unit) == (self.version, now.stage, unit)
                if same and begun.reason == ASSIGNED:
                    return decision(arm, ASSIGNED, not ramping, begun.epoch)
                reason = begun.reason if same or begun.reason != ASSIGNED else CONTINUED
                return decision(arm, reason, epoch=begun.epoch)
        epoch = None
        if now.stopped:
            arm, reason = experiment.control, STOPPED
        else:
            if self.adaptive is None:
                assigned = assign(experiment, identity.unit, coverage)
            else:
                assigned, epoch = self.adaptive.assign(identity.unit, unit, coverage)
            found = experiment.arm(assigned.arm)
            assert found is not None
            arm, reason = found, assigned.reason
        kept = Begun(arm.name, arm.digest, reason, self.version, now.stage, time.time(), unit, epoch)
        self.conversations.put(conversation, kept)
        return decision(arm, reason, reason == ASSIGNED and not ramping, epoch)

    def record(self, decision: Decision, measured: Mapping[str, Any], texts: tuple[str, str] = ("", "")) -> bool:
        """Record an answer; whether the row is on disk. `measured` are the columns that `decide` does not know.

        `texts` are the prompt and the answer, for judges.
        """
        row = {
            "id": self.new_id(),
            "experiment": self.experiment.name,
            "version": decision.version,
            "arm": decision.arm.name,
            "reason": decision.reason,
            "stage": decision.stage,
            "counted": decision.counted,
            "unit": decision.unit,
            "unit_source": decision.source,
            "conversation": decision.conversation,
            "digest": decision.arm.digest,
            "epoch": decision.epoch,
            **measured,
        }
        if row.get("response"):
            answered = Answered(decision.conversation, decision.unit, decision.version)
            self.conversations.answered(row["response"], answered)
            if self.judging is not None and row["status"] == 200 and decision.reason == ASSIGNED:
                self.judging.offer(row["response"], decision.version, *texts)
        if decision.reason == ASSIGNED:
            with self.lock:  # before it is in the log, where it could be another server's
                if self.counted.add(row["id"]) and decision.stage == self.state.stage:
                    self.guard.add(row)
        on_disk = self.writer.add("exposures", row) == "disk"
        if decision.reason == ASSIGNED:
            self._check()
        return on_disk

    def new_id(self) -> str:
        """The id of an answer, in 32 hexadecimal digits: 80 random bits of this server, and a number.

        Ids that rise are appended to the index of the log, where random ones would be spread over all of it.
        """
        return f"{self.identity}{next(self.numbers):012x}"

    def check(self) -> None:
        """Stop the experiment, or note a warning, where an arm is surely outside of a guardrail."""
        self.checked = time.monotonic()
        with self.lock:
            breaches = [] if self.state.stopped else self.guard.breaches()
        for breach in breaches:
            key = breach.guardrail, breach.arm
            if self.experiment.on_breach == "stop":
                self.stop(described(breach))
            elif key not in self.warned:
                self.warned.add(key)
                self._note(state.WARNED, reason=described(breach))

    def _check(self) -> None:
        """Check where it is time: after an answer, and in the thread, so that other servers' answers count too."""
        if time.monotonic() - self.checked >= CHECK:
            self.check()

    def start(self) -> None:
        """Follow the log in a thread, until `end`; another one adapts weights, for which it may read for seconds."""
        jobs: list[tuple[Any, ...]] = [(POLL, self._check, self.poll)]
        if self.adaptive is not None:
            jobs.append((ADAPT, self.adapt))
        self.threads = [
            threading.Thread(target=self._repeat, args=job, name="steer-experiment", daemon=True) for job in jobs
        ]
        for thread in self.threads:
            thread.start()

    def end(self) -> None:
        """End the threads, and write what waits; what can't be written stays in the journal."""
        self.ending.set()
        for thread in self.threads:
            thread.join(1.0)  # a daemon, which may be waiting for a database that is away
        if self.judging is not None:
            self.judging.end()
        self.writer.close(2.0)
        self.engine.dispose()

    def summary(self) -> dict[str, Any]:
        """The state of the experiment and of its log, as JSON values; no units, and no texts."""
        log, judging = self.writer.state(), self.judging
        with self.lock:
            answers = {name: arm.answers for name, arm in self.guard.arms.items()}
            now = self.state
        return {
            "version": self.version,
            "digest": self.experiment.digest,
            "stage": now.stage,
            "coverage": self.coverage,
            "ramping": self.ramping,
            "stopped": now.stopped or None,
            "epoch": None if self.adaptive is None else self.adaptive.epoch._asdict(),
            "answers": answers,
            "log": {"waiting": log.waiting, "dropped": log.dropped, "away": log.away or None},
            "weight_version": self.weight_version,
            "judges": None if judging is None else judging.state(),
        }

    def _repeat(self, seconds: float, *steps: Callable[[], None]) -> None:
        """Take the steps every so many seconds until the end; one that fails is tried again the next time."""
        while not self.ending.wait(seconds):
            for step in steps:
                try:
                    step()
                except (SQLAlchemyError, SteerError):
                    pass  # while the database is away, state and weights stay as they are
                except Exception:  # the thread must go on: it is also what stops an experiment
                    _log.exception("experiment %s: a check failed, and is tried again", self.experiment.name)

    def adapt(self) -> None:
        """Begin the next epoch of adaptive weights where it is time, after the ramp. Raises SQLAlchemyError."""
        with self.lock:
            idle = self.ramping or bool(self.state.stopped)
        if self.adaptive is not None and not idle:
            self.adaptive.adapt()

    def poll(self) -> None:
        """Read the state in the log, and take the next step of the ramp where it is time. Raises SQLAlchemyError."""
        if self.adaptive is not None:
            self.adaptive.follow()
        latest = state.state_of(self.engine, self.experiment.name, self.version)
        with self.lock:
            now = self.state
            # A stop by a guardrail may not have reached the log yet.
            merged = State(max(now.stage, latest.stage), now.stopped or latest.stopped)
            changed = merged != now
        if changed:
            # First, so that no conversation that another server has begun changes its arm.
            self._gather()
            self._set(merged)
        moment = time.monotonic()
        if moment - self.gathered > GATHER:
            self._gather()
        elif moment - self.shared > SHARE:
            self.count(time.time() - SOON)
            self.shared = moment
        dropped = self.writer.dropped
        if dropped > self.reported:
            self._note(state.DROPPED, count=dropped - self.reported)
            self.reported = dropped
        if self.ramping and not self.state.stopped and time.monotonic() - self.stepped > STEP:
            self.stepped = time.monotonic()
            with self.lock:
                unsure = self.guard.unsure(self.experiment.ramp_responses)
            if unsure and self.held != self.state.stage:  # once a stage: why it takes longer than its answers
                self.held = self.state.stage
                names = ", ".join(f"{guardrail} ({arm})" for arm, guardrail in unsure)
                self._note(state.HELD, reason=f"at coverage {self.coverage:g}, not surely inside yet: {names}")
            if unsure == []:
                stage = self.state.stage + 1
                self._note(
                    state.STAGE, stage=stage, reason=f"every arm is inside of every guardrail at {self.coverage:g}"
                )
                self._set(self.state._replace(stage=stage))

    def _gather(self) -> None:
        """Read everything that other servers have answered since this was last done. Raises SQLAlchemyError."""
        now = time.monotonic()
        seconds = now - self.gathered + LATE
        self.conversations.restore(self.engine, self.experiment.name, self.identity, seconds)
        self.count(time.time() - seconds)
        self.gathered = self.shared = now

    def stop(self, reason: str) -> None:
        """Send new conversations to the control from now on, and note it in the log."""
        with self.lock:
            if self.state.stopped:
                return
            self.state = self.state._replace(stopped=reason)
        self._note(state.STOPPED, reason=reason)

    def _note(self, kind: str, **more: Any) -> None:
        self.writer.add("events", state.event(self.experiment.name, self.version, kind, **more))

    def _unscored(self, reason: str, count: int) -> None:
        self._note(state.UNSCORED, reason=reason, count=count)

    def _set(self, new: State) -> None:
        with self.lock:
            if new.stage != self.state.stage:
                self.guard = self._guard()
            self.state = new

    def _guard(self) -> Guard:
        names = tuple(arm.name for arm in self.experiment.arms if arm.weight > 0 or arm.plain)
        return Guard(self.experiment.control.name, names, self.experiment.guardrails)

    def count(self, since: float = 0.0) -> None:
        """Let the guard count other servers' answers of this stage in the log, from `since` on, that it has not yet.

        Raises SQLAlchemyError.
        """
        with self.lock:
            stage = self.state.stage
        for row in counted.in_log(self.engine, self.experiment.name, self.version, stage, since, self.identity):
            with self.lock:
                if self.counted.add(row["id"]) and stage == self.state.stage:
                    self.guard.add(row)


def journal_folder(experiment: Experiment) -> Path:
    """Where the rows of a running experiment wait for its log."""
    return journal_of(experiment.file, experiment.name)


def begin(experiment: Experiment, read: Read | None = None) -> Live:
    """Open the log of an experiment, and take into it what killed servers have left. Raises LogError, and
    UsageError for the key of a judge that can't be sent."""
    require_keys(experiment)
    engine = open_log(experiment.log)
    try:
        return Live(experiment, engine, journal_folder(experiment), read)
    except BaseException:
        engine.dispose()
        raise
