"""A store survives a kill at every write, many processes at once, and flipped bits; and what it holds is never lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from personalities import commit, new_store

from steer.store import blobs, combine, gc, layout, referrers, refs
from steer.store.history.walk import walk
from steer.store.layout import Store
from steer.store.objects.model import read_commit, read_composition
from steer.store.objects.writing import put_composition
from steer.store.using.promote import promote
from steer.store.verify import verify
from steer.store.working import parts
from steer.store.working.checkout import checkout
from vectors.errors import ArtifactError, OutputError, SteerError, UsageError

WRITES = ("replace", "fsync", "unlink", "utime", "mkdir")


def killed_at(write: int, work: Callable[[], object]) -> bool:
    """Run `work` in a process that is killed before its `write`-th write; returns whether it was killed."""
    child = os.fork()
    if child == 0:
        left = write

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        for name in WRITES:
            setattr(os, name, counted(getattr(os, name)))
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.slow
@pytest.mark.parametrize(
    "operation", ["commit", "tag", "promote", "attach", "checkout", "merge", "revert", "undo", "gc"]
)
def test_a_kill_at_any_write_leaves_a_whole_store_and_no_lost_version(tmp_path, operation):
    begun = new_store(tmp_path / "begun")
    first = commit(begun, "Warm", warm=1.2)
    checkout(begun, first, "other", "", create=True)
    other = commit(begun, "Calm", calm=0.5)
    checkout(begun, first, "tone", "")
    second = commit(begun, "Less", warm=0.8)
    before = {str(ref): digest for ref, digest in refs.every(begun).items()}

    def work(store: Store) -> Callable[[], object]:
        return {
            "commit": lambda: commit(store, "Formal", formal=-0.4),
            "tag": lambda: refs.point(
                store, {refs.tag("tone", "v1"): first, refs.alias("tone", "champion"): second}, "x"
            ),
            "promote": lambda: promote(store, "other", "champion", ""),
            # What bisect and eval do with an evaluation.
            "attach": lambda: referrers.attach(
                store, read_commit(store, second).composition, referrers.EVALUATION, {"report.json": b"{}"}
            ),
            "checkout": lambda: checkout(store, other, "other", ""),
            "merge": lambda: combine.merge_commit(store, other, "other", "", ""),
            "revert": lambda: combine.revert(store, second, "", ""),
            "undo": lambda: refs.undo(store, ""),
            "gc": lambda: gc.collect(store, days=0, fresh=-1),
        }[operation]

    write = 0
    while True:
        copy = tmp_path / f"copy-{write}"
        shutil.copytree(begun.work, copy)
        store = Store(copy / layout.FOLDER, copy)
        killed = killed_at(write, work(store))
        now = {str(ref): digest for ref, digest in refs.every(store).items()}
        reached = {each.digest for tip in now.values() for each in walk(store, [tip])}
        assert {first, other} <= reached
        if operation != "undo":
            assert second in reached
            assert set(before) <= set(now)
        # Whoever changes the store next completes what was begun, or begins it anew.
        refs.point(store, {refs.tag("tone", "after"): first}, "x", force=True)
        found = verify(store)
        assert not found.problems, (write, found.problems)
        with contextlib.suppress(SteerError):  # such as "nothing has changed", where it was done before the kill
            work(store)()
        assert not verify(store).problems
        assert not list(store.root.rglob("*.steer-tmp"))
        shutil.rmtree(copy)
        if not killed:
            break
        write += 1
    assert write > (0 if operation == "gc" else 3)


def test_eight_processes_that_commit_at_once_lose_nothing(tmp_path):
    store = new_store(tmp_path / "tone")
    commit(store, "Begin", warm=1.0)
    children = []
    for i in range(8):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for j in range(4):
                    refs_moved = False
                    while not refs_moved:
                        with contextlib.suppress(OutputError):  # another process was first: look again, commit again
                            personality, _ = parts.read(store)
                            from steer.store.working import folder

                            tip = refs.target(store, refs.branch("tone"))
                            made = put_composition(store, personality)
                            folder.record(store, made, "", f"{i}.{j}", "x", (str(tip),), {refs.branch("tone"): tip})
                            refs_moved = True
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    tip = refs.target(store, refs.branch("tone"))
    messages = [each.message for each in walk(store, [str(tip)])]
    assert sorted(messages) == sorted(["Begin", *(f"{i}.{j}" for i in range(8) for j in range(4))])
    assert len(refs.entries(store)) == 34  # with that of the creation
    assert not verify(store).problems


def test_a_flipped_bit_anywhere_is_noticed_and_named(tmp_path):
    store = new_store(tmp_path / "tone")
    first = commit(store, "Warm", warm=1.2)
    refs.point(store, {refs.tag("tone", "v1"): first}, "x")
    commit(store, "Less", warm=0.8)
    assert not verify(store).problems
    for path in sorted(store.root.rglob("*")):
        # A cache, which is not believed for what it names; and the index, which is written again from the names.
        if not path.is_file() or path.name in ("files.json", "index.json"):
            continue
        content = path.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            damaged = bytearray(content)
            damaged[place] ^= 4
            path.chmod(0o644)
            path.write_bytes(damaged)
            try:
                layout.find(store.work)
                problems: list[str] = list(verify(store).problems)
            except ArtifactError as error:
                problems = error.problems
            assert problems, (path, place)
            named = path.name if path.parent == store.blobs else ""
            assert not named or any(named in problem for problem in problems), (path, place, problems)
        path.write_bytes(content)
    assert not verify(store).problems


def test_gc_removes_only_what_nothing_leads_to(tmp_path):
    store = new_store(tmp_path / "tone")
    commit(store, "Warm", warm=1.2)
    lost = commit(store, "Lost", formal=3.0)
    refs.undo(store, "")
    kept = set(blobs.every(store))
    assert gc.collect(store, days=30, fresh=-1).sizes == {}  # the record of moves still leads to it
    preview = gc.unreachable(store, days=0, fresh=-1)
    assert lost in preview.sizes
    assert set(blobs.every(store)) == kept
    assert gc.unreachable(store, days=0).sizes == {}  # fresh
    removed = gc.collect(store, days=0, fresh=-1)
    assert removed.sizes == preview.sizes
    assert not verify(store).problems
    assert not blobs.has(store, lost)


def test_gc_removes_nothing_where_a_damaged_version_hides_what_it_leads_to(tmp_path):
    store = new_store(tmp_path / "tone")
    commit(store, "Warm", warm=1.2)
    tip = commit(store, "Less", warm=0.8)
    path = blobs.path_of(store, tip)
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content.replace(b"layers", b"lavers"))
    there = set(blobs.every(store))
    with pytest.raises(ArtifactError, match="damaged"):
        gc.collect(store, days=0, fresh=-1)
    assert set(blobs.every(store)) == there


def test_a_full_disk_refuses_cleanly(tmp_path):
    store = new_store(tmp_path / "tone")
    first = commit(store, "Warm", warm=1.2)
    big = tmp_path / "tone" / "formal.safetensors"

    def work() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(OutputError, match="can't be written"):
            commit(store, "Formal", formal=-0.4)

    assert big.stat().st_size > 300
    assert not killed_at(10**9, work)
    assert refs.target(store, refs.branch("tone")) == first
    assert not verify(store).problems


class Operations(RuleBasedStateMachine):
    """Any sequence of operations keeps what a store promises."""

    folder: Path

    @initialize()
    def begin(self) -> None:
        self.folder = Path(os.environ["STORE_TESTS"]) / os.urandom(6).hex()
        self.store = new_store(self.folder)
        self.commits = {commit(self.store, "Begin", warm=1.0)}
        self.compositions: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.removed: set[str] = set()
        self._remember()

    def _remember(self) -> None:
        for digest in self.commits:
            self.compositions.setdefault(digest, read_commit(self.store, digest).composition)

    @rule(name=st.sampled_from(["warm", "formal", "calm"]), strength=st.integers(-3, 3))
    def change(self, name: str, strength: int) -> None:
        with contextlib.suppress(SteerError):
            self.commits.add(commit(self.store, f"{name} {strength}", **{name: float(strength)}))
            self._remember()

    @rule(name=st.sampled_from(["warm", "formal", "calm"]))
    def remove(self, name: str) -> None:
        with contextlib.suppress(SteerError):
            self.commits.add(commit(self.store, f"without {name}", **{name: None}))
            self._remember()

    @rule(label=st.sampled_from(["v1", "v2"]))
    def tag(self, label: str) -> None:
        tip = refs.target(self.store, refs.branch(refs.current(self.store)))
        if label in self.tags and self.tags[label] != tip:
            with pytest.raises(OutputError):
                refs.point(self.store, {refs.tag("tone", label): tip}, "tag")
        else:
            refs.point(self.store, {refs.tag("tone", label): tip}, "tag")
            self.tags[label] = str(tip)

    @rule(branch=st.sampled_from(["tone", "other"]))
    def switch(self, branch: str) -> None:
        tip = refs.target(self.store, refs.branch(branch))
        here = refs.target(self.store, refs.branch(refs.current(self.store)))
        with contextlib.suppress(SteerError):
            checkout(self.store, str(tip or here), branch, "", create=tip is None)

    @rule(branch=st.sampled_from(["tone", "other"]), take=st.sampled_from([None, "ours", "theirs"]))
    def merge(self, branch: str, take: str | None) -> None:
        tip = refs.target(self.store, refs.branch(branch))
        with contextlib.suppress(SteerError):
            result = combine.merge_commit(self.store, str(tip), branch, "", "", take=take) if tip else None
            if result and result.commit:
                self.commits.add(result.commit.digest)
                self._remember()

    @rule()
    def revert(self) -> None:
        tip = refs.target(self.store, refs.branch(refs.current(self.store)))
        with contextlib.suppress(SteerError):
            self.commits.add(combine.revert(self.store, str(tip), "", "").digest)
            self._remember()

    @rule()
    def collect(self) -> None:
        reachable = gc.marks(self.store)
        gc.collect(self.store, fresh=-1)
        assert reachable <= set(blobs.every(self.store))

    @invariant()
    def names_lead_to_versions_and_tags_have_not_moved(self) -> None:
        if not hasattr(self, "store"):
            return
        for ref, digest in refs.every(self.store).items():
            commit_ = read_commit(self.store, digest)
            # Made again from what it says, a composition is the same to the byte.
            assert put_composition(self.store, read_composition(self.store, commit_.composition)) == commit_.composition
            if ref.kind == "tag":
                assert self.tags[ref.label] == digest
        for digest, composition in self.compositions.items():
            assert read_commit(self.store, digest).composition == composition

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        assert not verify(self.store).problems
        while any(each.undoes is None for each in refs.entries(self.store)):
            try:
                refs.undo(self.store, "undo")
            except UsageError:  # none is left but that of the creation
                break
        assert refs.every(self.store) == {}
        assert refs.current(self.store) == "tone"
        shutil.rmtree(self.folder)


@pytest.mark.slow
def test_any_sequence_of_operations_keeps_the_invariants(tmp_path, monkeypatch):
    monkeypatch.setenv("STORE_TESTS", str(tmp_path))
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Operations,
        settings=settings(
            max_examples=12, stateful_step_count=12, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
