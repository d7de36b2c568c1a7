"""The folder that a merge makes: it appears whole or not at all, and a killed merge goes on where it was.

Work happens beside the output in `.NAME.<digest>.partial`, named by what the bytes follow from. A finished shard is
noted in a journal with its digest; the next run of the same plan takes those whose digest still holds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from merges import card, shards
from merges.planning import Plan, check_output
from merges.shards import size
from vectors.errors import OutputError
from vectors.files import canonical_json, permissions, write_atomically

JOURNAL = "progress.json"
Progress = Callable[[int, int], None]


def partial_folder(plan: Plan, out: Path) -> Path:
    """Where the work for this output happens."""
    return out.absolute().parent / f".{out.name}.{plan.digest[7:23]}.partial"


def write_model(plan: Plan, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Make the folder; returns its record. Raises OutputError, and ArtifactError for values that can't be merged."""
    from filelock import FileLock, Timeout

    folder = partial_folder(plan, out)
    check_output(out, plan.bytes, have=_finished_bytes(folder))
    try:
        folder.mkdir(exist_ok=True, mode=permissions(0o777))
        with FileLock(folder / ".lock", timeout=0):
            record = _fill(plan, folder, progress)
            (folder / JOURNAL).unlink(missing_ok=True)
            shards.flush(folder)
            if os.path.lexists(out):
                raise OutputError(f"the output {out} exists now", "choose another --out; the finished shards are kept")
        (folder / ".lock").unlink(missing_ok=True)
        os.rename(folder, out)
        shards.flush(out.absolute().parent)
    except Timeout:
        raise OutputError(f"another process is making {out}", "wait for it") from None
    except OSError as error:
        hint = (
            "free some space and run it again: finished shards are kept"
            if error.errno == 28
            else "choose another --out"
        )
        raise OutputError(f"{out} can't be written: {error.strerror}", hint) from error
    return record


def _fill(plan: Plan, folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Everything that belongs into the folder. Inputs are hashed meanwhile."""
    files = shards.names(len(plan.shards))
    finished = _journal(folder)
    total, done = plan.bytes, 0
    with ThreadPoolExecutor(1, thread_name_prefix="merge-hash") as hasher:
        inputs = hasher.submit(card.inputs, plan)
        outputs = {}
        for file, shard in zip(files, plan.shards, strict=True):
            path, expected = folder / file, len(shards.header(shard)) + sum(map(size, shard))
            if file in finished and path.is_file() and path.stat().st_size == expected:
                # Hashed anew: a journal may outlive the data in a crash of the machine.
                with path.open("rb") as again:
                    if "sha256:" + hashlib.file_digest(again, "sha256").hexdigest() == finished[file]:
                        outputs[file] = finished[file]
                        done += sum(map(size, shard))
                        continue

            def show(written: int, before: int = done) -> None:
                if progress:
                    progress(before + written, total)

            outputs[file] = shards.write(path, shards.pieces(shard, plan.pool), show)
            done += sum(map(size, shard))
            write_atomically(folder / JOURNAL, canonical_json(outputs).encode())
        for extra in folder.iterdir():
            if extra.name not in (*files, JOURNAL, ".lock"):
                extra.unlink()
        for name, content in side_files(plan).items():
            write_atomically(folder / name, content)
            outputs[name] = "sha256:" + hashlib.sha256(content).hexdigest()
        if len(files) > 1:
            content = shards.index(plan.shards)
            write_atomically(folder / "model.safetensors.index.json", content)
            outputs["model.safetensors.index.json"] = "sha256:" + hashlib.sha256(content).hexdigest()
        record = card.record(plan, inputs.result(), outputs)
    write_atomically(folder / card.RECORD, (canonical_json(record) + "\n").encode())
    write_atomically(folder / "README.md", card.text(plan, record).encode())
    return record


KEEP = (".json", ".model", ".jinja", ".txt", ".py")
SKIP = (
    "adapter_config.json",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "report.json",
)


def companions(folder: Path) -> dict[str, bytes]:
    """What stands beside the weights of a model and belongs to any copy of it, by file name."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.name.startswith("LICENSE") or path.suffix in KEEP)
        and path.name not in (*SKIP, card.RECORD)
        and not path.name.endswith(".index.json")
    }


def side_files(plan: Plan) -> dict[str, bytes]:
    """Configuration, tokenizer, chat template and generation settings of the model that the result descends from."""
    from merges.slices import stacked_config
    from merges.vocabulary import write

    main = plan.main
    assert main is not None
    found = companions(main.path)
    if plan.vocabulary is not None:
        found |= {
            name: content for name, content in companions(plan.vocabulary.main.path).items() if _is_tokenizer(name)
        }
    config = dict(main.config)
    if plan.recipe.dtype != "auto":
        config = _with_dtype(config, plan.recipe.dtype)
    if plan.recipe.slices:
        config = stacked_config(config, plan.recipe.slices, main.reference)
    if plan.vocabulary is not None:
        text = config.get("text_config")
        (text if isinstance(text, dict) else config)["vocab_size"] = len(plan.vocabulary.tokens)
        found["tokenizer.json"] = write(plan.vocabulary, found["tokenizer.json"])
    if config != main.config:
        found["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return found


def _is_tokenizer(name: str) -> bool:
    return name.startswith(("token", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece"))


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with its dtype, under whichever key it has, changed."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    changed = config | dict.fromkeys(keys, dtype)
    if isinstance(config.get("text_config"), dict):
        text = config["text_config"]
        changed["text_config"] = text | {key: dtype for key in ("dtype", "torch_dtype") if key in text}
    return changed


def _journal(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _finished_bytes(folder: Path) -> int:
    """What an earlier try has written already."""
    if not folder.is_dir():
        return 0
    return sum((folder / name).stat().st_size for name in _journal(folder) if (folder / name).is_file())


def verify(plan: Plan, out: Path, record: dict[str, Any], progress: Progress | None = None) -> list[str]:
    """Compute the merge again, compare it and every file with what is there; everything that differs, in words."""
    problems = []
    stored = record["outputs"]
    for name, digest in stored.items():
        path = out / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        else:
            # Not from memory: the point is to look at the bytes.
            with path.open("rb") as file:
                if "sha256:" + hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    problems.append(f"{name} is not what was written: its digest differs from the record's")
    extra = {p.name for p in out.glob("*.safetensors")} - set(stored)
    problems += [f"{name} does not belong to the merge" for name in sorted(extra)]
    now = card.inputs(plan)
    for before, after in zip(record["inputs"], now, strict=True):
        for name, digest in before["files"].items():
            if after["files"].get(name) != digest:
                problems.append(f"the input {before['name']} has changed: {name}")
    files, done = shards.names(len(plan.shards)), 0
    for name, shard in zip(files, plan.shards, strict=True):
        state = hashlib.sha256()
        for piece in shards.pieces(shard, plan.pool):
            state.update(piece)
            done += len(piece)
            if progress:
                progress(min(done, plan.bytes), plan.bytes)
        if stored.get(name) != "sha256:" + state.hexdigest():
            problems.append(f"{name}: the recipe gives other bytes than the record says")
    return problems
