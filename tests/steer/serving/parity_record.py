"""The record of what parity tests have measured, from which the table of docs/serve.md is made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "engine" / "parity.json"


def record(name: str, **entry: Any) -> None:
    """Write the result of a pico model, where STEER_RECORD_PARITY=1 asks for it."""
    if os.environ.get("STEER_RECORD_PARITY") != "1":
        return
    entries = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    entries[name] = entry
    RECORD.write_text(json.dumps(dict(sorted(entries.items())), indent=2, ensure_ascii=False) + "\n")
