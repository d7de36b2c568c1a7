"""What the plugin wraps in vLLM is on record for each version; the newest vLLM is read, and its changes are named."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

from steer.serving.engine.plugin import JOINED_METHODS, SUPPORTED

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import vllm_changes

SOURCE = '''
class Scheduler:
    def schedule(self, throttle: bool = False):
        """Words."""
        return 1  # a comment

    def add_request(self, request):
        pass
'''


def wheel(folder: Path, source: str, version: str = "9.1.0") -> Path:
    file = folder / f"vllm-{version}-cp38-abi3-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("vllm/v1/core/sched/scheduler.py", source)
    return file


def test_the_record_has_every_wrapped_method_of_every_supported_version() -> None:
    record = json.loads(vllm_changes.RECORD.read_text())
    assert {version.rpartition(".")[0] for version in record} == set(SUPPORTED)
    for found in record.values():
        assert {f"{module}:{owner}.{name}" for module, owner, name in JOINED_METHODS} <= set(found)
        assert len(found) == len(vllm_changes.METHODS)


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ("# a comment", "# another", None),
        ('"""Words."""', '"""Other words."""', None),
        ("return 1", "return 2", "Scheduler.schedule has another body"),
        ("throttle: bool = False", "throttle=True", "Scheduler.schedule has another signature"),
        ("def add_request", "def take_request", "Scheduler.add_request is gone"),
        ("class Scheduler", "class Other", "Scheduler.schedule is gone"),
    ],
)
def test_a_change_of_signature_or_body_is_named_and_one_of_words_is_not(
    before: str, after: str, change: str | None, tmp_path: Path
) -> None:
    version, known = vllm_changes.methods_of(wheel(tmp_path, SOURCE))
    _, found = vllm_changes.methods_of(wheel(tmp_path, SOURCE.replace(before, after)))
    assert version == "9.1.0"
    lines = vllm_changes.changes_between(known, found)
    assert any(change in line for line in lines) if change else lines == []


@pytest.mark.slow
def test_the_newest_vllm_has_not_changed_what_the_plugin_wraps_or_a_warning_names_it() -> None:
    try:
        version, known, changes = vllm_changes.newest()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the newest vLLM can't be fetched here: {error.stderr[-200:]}")
    if changes:  # a warning of our own modules would fail the test
        text = f"vLLM {version} differs from {known}: {'; '.join(changes)}"
        warnings.warn_explicit(text, UserWarning, str(vllm_changes.RECORD), 1, module="vllm")
