"""What `make setup` installs: every package by its SHA-256, torch too."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def setup() -> ModuleType:
    specification = importlib.util.spec_from_file_location("set_up", REPOSITORY / "scripts" / "setup.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


PLATFORMS = [("manylinux", "x86_64"), ("manylinux", "aarch64"), ("macosx", "arm64")]


@pytest.mark.parametrize("python", ["cp311", "cp312", "cp313", "cp314"])
@pytest.mark.parametrize(("system", "machine"), PLATFORMS)
def test_the_wheel_of_torch_is_pinned(setup: ModuleType, python: str, system: str, machine: str) -> None:
    build = "" if system == "macosx" else r"\+cpu"
    expected = rf"torch=={re.escape(setup.TORCH)}{build} --hash=sha256:[0-9a-f]{{64}}\n"
    assert re.fullmatch(expected, setup.torch_requirement(python, system, machine))


@pytest.mark.parametrize("python", ["cp311", "cp312", "cp313", "cp314"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_wheel_of_triton_is_pinned_where_vllm_runs(setup: ModuleType, python: str, machine: str) -> None:
    expected = rf"triton=={re.escape(setup.TRITON)} --hash=sha256:[0-9a-f]{{64}}\n"
    assert re.fullmatch(expected, setup.pinned(setup.TRITON_WHEELS, python, "manylinux", machine))
    assert setup.pinned(setup.TRITON_WHEELS, python, "macosx", "arm64") is None


@pytest.mark.parametrize("wheels", ["TORCH_WHEELS", "TRITON_WHEELS"])
def test_no_two_platforms_share_a_wheel(setup: ModuleType, wheels: str) -> None:
    lines = getattr(setup, wheels).read_text().splitlines()
    assert len({line.split()[0] for line in lines}) == len({line.split()[1] for line in lines}) == len(lines)


@pytest.mark.parametrize(
    "other", [("cp310", "manylinux", "x86_64"), ("cp311", "manylinux", "ppc64le"), ("cp314t", "manylinux", "x86_64")]
)
def test_a_platform_without_a_pinned_wheel_is_refused(
    setup: ModuleType, capsys: pytest.CaptureFixture[str], other: tuple[str, str, str]
) -> None:
    with pytest.raises(SystemExit):
        setup.torch_requirement(*other)
    assert f"no wheel of torch {setup.TORCH} is pinned for {other[0]}" in capsys.readouterr().err


def test_this_platform_is_named_as_wheels_name_it(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "PYTHON", sys.executable)
    python, system, machine = setup.this_platform()
    assert python == f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert (system, machine) in PLATFORMS


def test_every_entry_of_the_lock_has_a_hash(setup: ModuleType) -> None:
    assert all("--hash=sha256:" in entry for entry in setup.packages())


def test_another_file_under_the_name_of_the_wheel_is_not_installed(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """pip itself reads the requirement, with the options that set-up passes."""
    monkeypatch.setattr(setup, "PYTHON", sys.executable)
    if setup.this_platform()[1] != "manylinux":
        pytest.skip("the wheel below is one for Linux")
    tag = next(
        line.split()[1].partition("-cp")[2] for line in setup.TORCH_WHEELS.read_text().splitlines()
        if f"+cpu-{setup.this_platform()[0]}" in line and line.endswith(f"{setup.this_platform()[2]}.whl")
    ).removesuffix(".whl")  # fmt: skip
    wheel = tmp_path / f"torch-{setup.TORCH}+cpu-cp{tag}.whl"
    folder = f"torch-{setup.TORCH}+cpu.dist-info"
    files = {
        f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {setup.TORCH}+cpu\n",
        f"{folder}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp{tag}\n",
    }
    digests = {n: base64.urlsafe_b64encode(hashlib.sha256(t.encode()).digest()).rstrip(b"=") for n, t in files.items()}
    files[f"{folder}/RECORD"] = "".join(f"{n},sha256={d.decode()},\n" for n, d in digests.items())
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    requirements = tmp_path / "group.txt"

    def install() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pip", "install", "--isolated", "--no-index", "--find-links", str(tmp_path)]
        command += ["--target", str(tmp_path / "installed"), *setup.EXACTLY, "-r", str(requirements)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    requirements.write_text(setup.torch_requirement(*setup.this_platform()))
    done = install()
    assert done.returncode
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "installed" / folder).exists()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    requirements.write_text(f"torch=={setup.TORCH}+cpu --hash=sha256:{digest}\n")  # the only thing that was wrong
    assert install().returncode == 0
