"""Files whose tests one worker runs, so that a server, an engine or a trained model is started once.

By files, since pytest-xdist 3.8 loses its own mark `xdist_group` under pytest 9.2 (its issue 1386). The groups begin
before all other tests.
"""

from __future__ import annotations

import re

ENGINES = (
    "answers", "applied", "compiled", "engine", "every_decoder", "gated_engine", "interruptions", "parity",
    "sectioned_engine", "together",
)  # fmt: skip
GROUPS = {
    "engines": [*(f"steer/serving/engine/test_{name}.py" for name in ENGINES), "steer/folding/test_fold_in_vllm.py"],
    "server": [
        f"steer/serving/http/test_{name}.py" for name in ("followed_versions", "server", "server_live", "server_stops")
    ],
    "experiments under load": ["steer/serving/http/test_experiments_live.py"],
    "processes of training": ["steer/training/test_processes.py", "steer/training/test_resuming.py"],
    "offline engines": ["steer/serving/offline/test_paired_answers.py"],
    "bundled model": ["steer/test_real_model.py"],
}


def group_of(nodeid: str) -> str:
    """The group of a test, which is the test itself unless its file stands in GROUPS.

    Engines with vLLM's V2 runner are processes of their own, and so are a group of their own.
    """
    file, _, test = nodeid.removeprefix("tests/").partition("::")
    group = next((group for group, files in GROUPS.items() if file in files), nodeid)
    return f"{group} on v2" if group == "engines" and re.search(r"[\[-]v2[-\]]", test) else group
