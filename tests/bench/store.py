"""How fast a store with a long history answers, above the start of the command: log, status, names.

python tests/bench/store.py --commits 10000

The store has a branch with that many commits, a tag at every hundredth, and ten vectors of 10 GB each: sparse files,
under digests that are not theirs. A command that read one again would take seconds, or find it damaged.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from steer.store import blobs, creation, names, refs
from steer.store.layout import Store
from steer.store.objects.model import STEERING, Commit, Part, Personality
from steer.store.objects.writing import put_commit, put_composition
from steer.store.working import document

PARTS, SIZE = 10, 10 * 10**9  # 100 GB in all
ROUNDS = 7
AIM = 0.2  # seconds above the start


def sparse_vector(store: Store, number: int) -> Part:
    """A blob of 10 GB that takes no room: the header of a steering vector, and a hole."""
    digest = f"sha256:{number:064x}"
    elements = (SIZE - 4096) // 4
    metadata = {"schema": 1, "kind": "steering-vector", "base": {"name": "pico"}, "apply": [0]}
    header = {
        "__metadata__": {"steer": json.dumps(metadata)},
        "layer.0": {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]},
    }
    content = json.dumps(header).encode()
    path = blobs.path_of(store, digest)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + 4 * elements)
    return Part(f"part{number}", digest, path.stat().st_size, STEERING)


def build(work: Path, commits: int) -> Store:
    """A store of so many commits, each of which changes one strength; the last is that of personality.yaml."""
    os.fsync = lambda _: None  # type: ignore[assignment]  # what is measured is reading
    store = creation.create(work, "tone")
    parts = [sparse_vector(store, number) for number in range(PARTS)]
    branch, tip = refs.branch("tone"), None
    for i in range(commits):
        now = tuple(
            Part(part.name, part.digest, part.size, STEERING, 1.0 + (i // PARTS + (i % PARTS >= n)) / 10_000)
            for n, part in enumerate(parts)
        )
        composition = put_composition(store, Personality("pico", parts=now))
        before = () if tip is None else (tip,)
        made = Commit("", composition, before, f"Change {i}", "Ana", 1e9 + i, "steer commit", {})
        targets: dict[refs.Ref, str | None] = {branch: put_commit(store, made)}
        if i % 100 == 0:
            targets[refs.tag("tone", f"v{i}")] = targets[branch]
        refs.point(store, targets, "steer commit", expected={branch: tip})
        tip = targets[branch]
    entries = "".join(f"- {{name: {p.name}, digest: '{p.digest}', strength: {p.strength!r}}}\n" for p in now)
    document.write(store.file, f"base: pico\nparts:\n{entries}")
    return store


def seconds(work: Path, *arguments: str) -> float:
    """The median processor time of a command, which other processes of the machine do not change."""
    found = []
    # Compiled modules are kept, as in an installation.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(work.parent / "compiled")
    for _ in range(ROUNDS):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "steer", *arguments],
            cwd=work,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        after = os.times()
        found.append(after.children_user - before.children_user + after.children_system - before.children_system)
        if done.returncode:
            sys.exit(f"{arguments}: {done.stderr}")
    return statistics.median(found)


def main() -> None:
    """Build the store and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--commits", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="Where to make the store, or where it is.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.folder or Path(temporary)) / "tone"
        if not work.exists():
            work.mkdir(parents=True)
            start = time.perf_counter()
            build(work, arguments.commits)
            print(f"built in {time.perf_counter() - start:.0f} s", flush=True)
        store = Store(work / ".steer", work)
        tip = names.resolve(store, "tone")
        middle = f"tone~{arguments.commits // 2}"
        base = seconds(work, "--version")
        print(f"{'the start alone':34} {base:.3f} s")
        for words in (
            ["log"], ["log", "tone:v100", "-n", "5"], ["status"], ["show", "tone:v100"], ["show", tip[7:15]],
            ["show", middle], ["diff", "tone~1", "tone"], ["blame", "part9"], ["log", "--moves"],
        ):  # fmt: skip
            taken = seconds(work, *words) - base
            print(f"{'steer ' + ' '.join(words):34} {taken:+.3f} s{'' if taken < AIM else f'  over {AIM}'}", flush=True)


if __name__ == "__main__":
    main()
