"""The record of what parity tests have measured, from which the table of docs/serve.md is made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "engine" / "parity.json"


def record(name: str, runner: str, **entry: Any) -> None:
    """Write the result of a pico model, where STEER_RECORD_PARITY=1 asks for it.

    That of the V2 runner stands beside the other, without what is the same in both.
    """
    if os.environ.get("STEER_RECORD_PARITY") != "1":
        return
    entries = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    before = entries.get(name, {})
    if runner == "v2":
        same = {key for key in ("block", "form", "dtype") if entry.get(key) == before.get(key)}
        entry = {**before, "v2": {key: value for key, value in entry.items() if key not in same}}
    elif "v2" in before:
        entry["v2"] = before["v2"]
    entries[name] = entry
    RECORD.write_text(json.dumps(dict(sorted(entries.items())), indent=2, ensure_ascii=False) + "\n")
