"""Makes the working folder that of a commit, without losing anything that is not in the store."""

from __future__ import annotations

from collections.abc import Iterator

from steer.store import blobs, layout, refs
from steer.store.layout import Store
from steer.store.objects.model import Part, read_commit, read_composition, written_document
from steer.store.working import document, folder
from steer.store.working.document import Entry
from vectors.errors import OutputError, SteerError
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


def problems_of_files(store: Store, digest: str) -> list[str]:
    """The files that a checkout would overwrite although their content is not in the store."""
    written = document.parsed(written_document(store, digest), "personality.yaml")
    problems = []
    for part, entry in zip(
        read_composition(store, read_commit(store, digest).composition).parts, written.parts, strict=True
    ):
        target = store.work / (entry.path or f"{entry.name}.safetensors")
        if entry.digest is None and target.is_file():
            now = digest_file(target)
            if now != part.digest and not blobs.has(store, now):
                problems.append(f"{target} is in no commit and would be overwritten")
    return problems


def restore(store: Store, digest: str) -> list[str]:
    """Write `personality.yaml` and the files of a commit; returns the names of the files that were written."""
    text = written_document(store, digest)
    written = document.parsed(text, "personality.yaml")
    names = []
    for part, entry in zip(
        read_composition(store, read_commit(store, digest).composition).parts, written.parts, strict=True
    ):
        target = store.work / (entry.path or f"{entry.name}.safetensors")
        if entry.digest is not None or (target.is_file() and digest_file(target) == part.digest):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        blobs.take(store, part.digest, target)
        names.append(str(target.relative_to(store.work)))
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


def _parts(store: Store, digest: str) -> Iterator[tuple[Part, Entry]]:
    """The parts of a commit, each with its entry in the document."""
    parts = read_composition(store, read_commit(store, digest).composition).parts
    return zip(parts, document.parsed(written_document(store, digest), layout.FILE).parts, strict=True)
