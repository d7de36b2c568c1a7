"""Makes the working folder that of a commit, without losing anything that is not in the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from steer.store import blobs, layout, refs
from steer.store.layout import Store
from steer.store.objects.model import Part, read_commit, read_composition, written_document
from steer.store.working import document, folder
from vectors.errors import ArtifactError, OutputError, SteerError
from vectors.storage.files import digest_file, write_atomically


def require_clean(store: Store) -> None:
    """Refuse to replace a working folder with changes that are in no commit. Raises OutputError."""
    if not store.file.exists():
        return
    try:
        status = folder.status(store)
    except SteerError as error:
        raise OutputError(
            f"{store.file} can't be read, so it can't be told whether it is committed: {error.problems[0]}",
            "mend it, or move it away",
        ) from error
    if status.difference:
        raise OutputError(
            f"{store.file} has changes that are in no commit", "commit them (steer commit), or steer checkout --force"
        )


class _File(NamedTuple):
    """A file that a checkout writes: its part, where it lies, and the digest of what lies there now, if anything."""

    part: Part
    target: Path
    now: str | None


def restore(store: Store, digest: str) -> list[str]:
    """Write `personality.yaml` and the files of a commit; returns the names of the files that were written.

    Raises OutputError for files that are not of the working folder.
    """
    files = _files(store, digest)
    problems = _problems(store, files, force=True)
    if problems:
        raise OutputError(problems, "take the parts by their digests: steer show has them")
    return _written(store, digest, files)


def _problems(store: Store, files: Sequence[_File], *, force: bool) -> list[str]:
    """The files that a checkout can't write, and without `force` those whose content is not in the store.

    A version may have been pulled from anywhere: it writes vectors inside of the working folder and nothing else.
    """
    problems = []
    for part, target, now in files:
        inside = target.resolve().relative_to(store.work.resolve()).parts if _is_inside(store, target) else ()
        if not inside or target.suffix != ".safetensors" or any(each.startswith(".") for each in inside):
            problems.append(
                f"{target}, the path of the part {part.name}, is no .safetensors file of the working folder"
            )
        elif now is not None and not force and not blobs.has(store, now):
            problems.append(f"{target} is in no commit and would be overwritten")
    return problems


def _written(store: Store, digest: str, files: Sequence[_File]) -> list[str]:
    """Write files of a commit and its `personality.yaml`; returns the names of these files."""
    names = []
    for part, target, _ in files:
        target.parent.mkdir(parents=True, exist_ok=True)
        blobs.take(store, part.digest, target)
        names.append(str(target.relative_to(store.work)))
    text = written_document(store, digest)
    # Last: the document names the files, so an interrupted checkout shows in steer status.
    write_atomically(store.file, text.encode())
    return names


def checkout(
    store: Store, digest: str, branch: str, command: str, *, create: bool = False, force: bool = False
) -> list[str]:
    """Switch to a branch (new with `create`) at a commit, and make the working folder that of the commit.

    Raises OutputError for changes that are in no commit, unless `force` is set.
    """
    ref = refs.branch(branch)
    if create and refs.target(store, ref) is not None:
        raise OutputError(f"the branch {branch} exists", f"switch to it: steer checkout {branch}")
    if force:
        names = restore(store, digest)
    else:
        require_clean(store)
        files = _files(store, digest)
        problems = _problems(store, files, force=False)
        if problems:
            raise OutputError(problems, "move them away, or steer checkout --force")
        names = _written(store, digest, files)
    refs.point(store, {ref: digest, refs.HEAD: branch} if create else {refs.HEAD: branch}, command)
    return names


def _files(store: Store, digest: str) -> list[_File]:
    """The files of a commit's parts in the working folder, without those that hold the part already."""
    parts = read_composition(store, read_commit(store, digest).composition).parts
    entries = document.parsed(written_document(store, digest), layout.FILE).parts
    if [part.name for part in parts] != [entry.name for entry in entries]:
        raise ArtifactError(f"{layout.FILE} of {digest} has other parts than its composition", "take another version")
    files = []
    for part, entry in zip(parts, entries, strict=True):
        if entry.digest is None:
            target = store.work / (entry.path or f"{entry.name}.safetensors")
            files.append(_File(part, target, digest_file(target) if target.is_file() else None))
    return [file for file in files if file.now != file.part.digest]


def _is_inside(store: Store, target: Path) -> bool:
    return target.resolve().is_relative_to(store.work.resolve())
