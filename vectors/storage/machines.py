"""Which machine made a temporary file, for file systems on which a lock is seen by one machine alone.

A lock of `flock` is held in a machine's kernel. A local disk belongs to one machine, so every user sees the lock. Of
network mounts, NFS (unless mounted with local_lock), CephFS, GPFS and Lustre with `flock` share locks; many others do
not, and a temporary file of another machine then looks as if its process had died.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
from pathlib import Path

DAYS = 7  # for which another machine's temporary file counts as in use, where its lock can't be seen

_LOCAL = {
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs", "tmpfs", "ramfs", "overlay",
    "rootfs", "vfat", "exfat", "ntfs3",
}  # fmt: skip
_SHARING = {"ceph", "gpfs", "gfs2", "ocfs2"}


@functools.cache
def tag() -> str:
    """Eight hexadecimal digits for this machine since it was started; containers on one machine share them."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def name() -> str:
    """The machine's name, for messages: one word."""
    return re.sub(r"[^\w.-]", "-", platform.node())[:64] or "unknown"


def shows_locks(path: str | Path) -> bool:
    """Whether every user of the file system of `path` sees the locks on it. False where that is not known."""
    kind, options = _mount(path)
    if kind in ("nfs", "nfs4"):
        return not {"local_lock=all", "local_lock=flock", "nolock"} & set(options)
    if kind == "lustre":
        return "flock" in options
    return kind in _LOCAL | _SHARING


def _mount(path: str | Path) -> tuple[str, list[str]]:
    """The type and the options of the file system of `path`: of the longest mount point that contains it (Linux)."""
    real, longest, mount = os.path.realpath(path), "", ("", [""])
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.rstrip("\n").partition(" - ")
            point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split(" ")[4])
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(longest):
                kind, _, options = (after.split(" ") + [""] * 3)[:3]
                longest, mount = point, (kind, [*before.split(" ")[5].split(","), *options.split(",")])
    return mount
