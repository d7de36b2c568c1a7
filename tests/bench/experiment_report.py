"""The report of an experiment on a large log, generated here: seconds and memory, in SQLite.

    python tests/bench/experiment_report.py [--answers 10000000] [--per-unit 4] [--rated 0.05] [--outside 0]
                                            [--folder FOLDER]

Answers to units of two arms, `--per-unit` each, with four metrics of the server, are written by SQLite itself, and so
is feedback about the share `--rated` of them; the first answer of the share `--outside` of the units is from before
they took part. Then all is added up, as a server does while it writes. A process of its own makes the report, three
times. A log of 10 million answers takes 7 GB of disk, and minutes to write.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "steer" / "experiments")]

FILE = """
name: large
salt: large-0123456789
arms: {control: {}, long: {system: "Answer at length."}}
metric: {name: thumbs, smallest_effect: 0.01}
secondary: [{name: response_tokens}, {name: latency}, {name: repetition}, {name: refusal}]
log: LOG
"""

ROWS = """
INSERT INTO exposures (id, experiment, version, arm, reason, stage, counted, at, unit, unit_source, conversation,
    response, digest, status, answers, prompt_tokens, cached_tokens, response_tokens, latency, stop, characters,
    repetition, refusal)
WITH RECURSIVE k(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM k WHERE i + 1 < {answers})
SELECT printf('%032x', i), 'large', 1,
    CASE WHEN (i / {each}) * 2654435761 % 1000 < 500 OR {outside} THEN 'control' ELSE 'long' END,
    CASE WHEN {outside} THEN 'outside' ELSE 'assigned' END, 0, NOT {outside},
    1.8e9 + i * 0.05, printf('%08x%024x', (i / {each}) * 2654435761 % 4294967296, i / {each}),
    'first message', printf('%08x%024x', (i / {each}) * 40503 % 4294967296, i / {each}),
    printf('chatcmpl-%016x%016x', i * 2654435761 % 4294967296, i),
    printf('sha256:%064x', 1), 200, 1, 30, 0, abs(random()) % 100 + 20, abs(random()) % 1000 / 1000.0, 'stop',
    abs(random()) % 400, abs(random()) % 100 / 1000.0, abs(random()) % 50 = 0
FROM k
"""

FEEDBACK = """
INSERT INTO feedback (id, experiment, version, response, metric, value, source, mark, at)
WITH RECURSIVE k(i) AS (SELECT 0 UNION ALL SELECT i + {step} FROM k WHERE i + {step} < {answers})
SELECT printf('f%032x', i), 'large', 1, printf('chatcmpl-%016x%016x', i * 2654435761 % 4294967296, i), 'thumbs',
    abs(random()) % 10 < 6, 'user', '', 1.8e9 + i * 0.05 FROM k
"""

INDEXES = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL AND tbl_name = 'exposures'"

REPORT = """
import json, re, sys, time
from pathlib import Path
from steer.experiments import document
from steer.experiments.reporting.report import report
from steer.experiments.storage.database import open_log
experiment = document.read(document.find(sys.argv[1]))
engine = open_log(experiment.log)
seconds = []
for _ in range(3):
    started = time.perf_counter()
    found = report(engine, experiment, 1)
    seconds.append(time.perf_counter() - started)
units = sum(arm["units"] for arm in found["arms"])
memory = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps({"seconds": seconds, "units": units, "MiB": memory, "decisions": found["decisions"]}))
"""


def main() -> None:
    """Generate the log, and time its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=10_000_000)
    parser.add_argument("--per-unit", type=int, default=4)
    parser.add_argument("--rated", type=float, default=0.05, help="share of the answers with feedback")
    parser.add_argument("--outside", type=float, default=0.0, help="share of the units with an answer from before")
    parser.add_argument("--folder", type=Path, help="where the log is made; a temporary folder by default")
    arguments = parser.parse_args()
    step = round(1 / arguments.rated) if arguments.rated else arguments.answers
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        found = measured(Path(name), arguments.answers, arguments.per_unit, step, arguments.outside)
    print(
        f"{arguments.answers:,} answers to {found['units']:,} units: {min(found['seconds']):.1f} s "
        f"({', '.join(f'{each:.1f}' for each in found['seconds'])}), {found['MiB']:.0f} MiB"
    )


def measured(folder: Path, answers: int, each: int, step: int, outside: float = 0.0) -> dict[str, object]:
    """What the process of the report prints."""
    from steer.experiments import document
    from steer.experiments.storage import figures, state
    from steer.experiments.storage.database import open_log

    earlier = f"(i % {each} = 0 AND (i / {each}) % 1000 < {1000 * outside:.0f})"
    log, file = folder / "large.db", folder / "large.yaml"
    file.write_text(FILE.replace("LOG", str(log)))
    experiment = document.read(file)
    engine = open_log(experiment.log)
    state.register(engine, experiment)
    engine.dispose()
    started = time.perf_counter()
    with sqlite3.connect(log, isolation_level=None) as connection:
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-400000"):
            connection.execute(f"PRAGMA {pragma}")
        indexes = connection.execute(INDEXES).fetchall()
        for name, _ in indexes:
            connection.execute(f"DROP INDEX {name}")
        connection.execute(ROWS.format(answers=answers, each=each, outside=earlier))
        connection.execute(FEEDBACK.format(answers=answers, step=step))
        for _, statement in indexes:
            connection.execute(statement)
    connection.close()
    written = time.perf_counter()
    print(f"written in {written - started:.0f} s, {log.stat().st_size / 1e9:.1f} GB", file=sys.stderr)
    engine = open_log(experiment.log)
    with figures.analysis(engine, "large", 1):
        print(f"added up in {time.perf_counter() - written:.0f} s", file=sys.stderr)
    engine.dispose()
    done = subprocess.run(
        [sys.executable, "-c", REPORT, str(file)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
