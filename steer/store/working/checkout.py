"""Makes the working folder that of a commit, without losing anything that is not in the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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


def problems_of_files(store: Store, digest: str, *, force: bool = False) -> list[str]:
    """The files that a checkout can't write, and without `force` those whose content is not in the store.

    A version may have been pulled from anywhere: it writes vectors inside of the working folder and nothing else.
    """
    problems = []
    for part, target in _targets(store, digest):
        now = digest_file(target) if target.is_file() else None
        if now == part.digest:
            continue
        inside = target.resolve().relative_to(store.work.resolve()).parts if _is_inside(store, target) else ()
        if not inside or target.suffix != ".safetensors" or any(each.startswith(".") for each in inside):
            problems.append(
                f"{target}, the path of the part {part.name}, is no .safetensors file of the working folder"
            )
        elif now is not None and not force and not blobs.has(store, now):
            problems.append(f"{target} is in no commit and would be overwritten")
    return problems


def restore(store: Store, digest: str) -> list[str]:
    """Write `personality.yaml` and the files of a commit; returns the names of the files that were written.

    Raises OutputError for files that are not of the working folder.
    """
    problems = problems_of_files(store, digest, force=True)
    if problems:
        raise OutputError(problems, "take the parts by their digests: steer show has them")
    names = []
    for part, target in _targets(store, digest):
        if target.is_file() and digest_file(target) == part.digest:
            continue
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
    if not force:
        require_clean(store)
        problems = problems_of_files(store, digest)
        if problems:
            raise OutputError(problems, "move them away, or steer checkout --force")
    names = restore(store, digest)
    refs.point(store, {ref: digest, refs.HEAD: branch} if create else {refs.HEAD: branch}, command)
    return names


def _targets(store: Store, digest: str) -> Iterator[tuple[Part, Path]]:
    """The parts of a commit that lie in files of the working folder, with these files."""
    parts = read_composition(store, read_commit(store, digest).composition).parts
    entries = document.parsed(written_document(store, digest), layout.FILE).parts
    if [part.name for part in parts] != [entry.name for entry in entries]:
        raise ArtifactError(f"{layout.FILE} of {digest} has other parts than its composition", "take another version")
    for part, entry in zip(parts, entries, strict=True):
        if entry.digest is None:
            yield part, store.work / (entry.path or f"{entry.name}.safetensors")


def _is_inside(store: Store, target: Path) -> bool:
    return target.resolve().is_relative_to(store.work.resolve())
