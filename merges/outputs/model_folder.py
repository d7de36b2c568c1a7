"""The model folder that a merge writes: it appears complete or not at all, and an interrupted merge can be resumed.

Files are written in `.NAME.<digest>.partial` beside the output, where the digest is that of the plan. Each finished
shard is entered in a journal with its digest; the next run of the same plan reuses the shards whose digest matches.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merges.engine.pool import in_background
from merges.inputs.heads import is_head, untied
from merges.outputs import card, shards
from merges.outputs.companions import (
    Companion,
    Companions,
    Content,
    card_lines,
    companions,
    digest,
    is_template,
    is_tokenizer,
    read,
    write_all,
)
from merges.recipes.chat_templates import NAMED
from merges.recipes.layout import size
from merges.recipes.plan import Plan
from vectors.errors import ArtifactError, ModelError
from vectors.events import Event, OnEvent, counter, ignore
from vectors.storage.files import canonical_json, digest_file, write_atomically
from vectors.storage.folders import hidden_name, remove_unfinished, require_free_output, work_folder
from vectors.weights import NAMES

JOURNAL = "progress.json"
PARTIAL = r"[0-9a-f]{16}\.partial"  # after the output's name


def partial_folder(plan: Plan, out: Path) -> Path:
    """The folder in which this plan's files for `out` are written until they are complete."""
    return out.absolute().with_name(hidden_name(out, f"{plan.digest[7:23]}.partial"))


def write_model(plan: Plan, out: Path, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Write the merged model to the folder `out`, resuming an interrupted run of the same plan. Returns the record.

    Raises OutputError, ModelError for inputs that changed meanwhile, and ArtifactError for values that are not finite
    or leave the range of the dtype.
    """
    folder = partial_folder(plan, out)
    beside = companions_of(plan)
    for note in beside.notes():
        on_event(Event("merging", message=note))
    require_free_output(out, plan.bytes + beside.size, have=_finished_bytes(plan, folder))
    with work_folder(out, None, name=folder.name, keep=_worth_keeping, becomes_output=True):
        record = _fill(plan, folder, beside, on_event)
        (folder / JOURNAL).unlink(missing_ok=True)
    remove_unfinished(out, PARTIAL)  # left by interrupted runs of other plans for this output
    return record


def _worth_keeping(folder: Path, error: BaseException) -> bool:
    """Whether a run can be resumed: not after an error in the inputs, which would only recur; after an interrupt, only
    if a shard is finished.
    """
    if not isinstance(error, Exception):  # Ctrl-C or SIGTERM
        return (folder / JOURNAL).is_file()
    return not isinstance(error, ArtifactError | ModelError)


def _fill(plan: Plan, folder: Path, beside: Companions, on_event: OnEvent) -> dict[str, Any]:
    """Write all files of the model; the inputs are hashed in the background."""
    files = shards.names(len(plan.shards))
    states_before = card.states(plan)
    finished = _journal(plan, folder)
    report, total, done = counter(on_event, "merging", "bytes"), sum(map(shards.file_size, plan.shards)), 0
    inputs = in_background(card.inputs, plan)
    outputs = {}
    for file, shard in zip(files, plan.shards, strict=True):
        path, expected = folder / file, shards.file_size(shard)
        # Hashed again: after a crash of the machine the journal may be on disk and the data not.
        if (
            file in finished
            and path.is_file()
            and path.stat().st_size == expected
            and digest_file(path) == finished[file]
        ):
            outputs[file] = finished[file]
            done += expected
            continue

        def show(written: int, before: int = done) -> None:
            report(before + written, total)

        outputs[file] = shards.write(path, shards.pieces(shard, plan.pool), show)
        done += expected
        journal = {"inputs": states_before, "outputs": outputs}
        write_atomically(folder / JOURNAL, canonical_json(journal).encode())
    for extra in folder.iterdir():
        if extra.name not in (*files, JOURNAL):
            shutil.rmtree(extra) if extra.is_dir() and not extra.is_symlink() else extra.unlink()
    outputs |= write_all(side_files(plan, beside), folder)
    record = card.record(plan, inputs.result(), outputs, beside.left_out)
    now = card.states(plan)
    changed = [
        f"{path} was changed while it was being merged"
        for path, state in states_before.items()
        if now.get(path) != state
    ]
    if changed:
        raise ModelError(changed, "run it again when nothing writes to the inputs")
    card.run_record(plan, record).write(folder)
    write_atomically(folder / "README.md", card.text(plan, record, card_lines(beside)).encode())
    return record


def companions_of(plan: Plan) -> Companions:
    """The files beside the weights that are copied from the base (or first model), and those left out.

    With a vocabulary of another model, tokenizer files are those of that model. Raises ModelError.
    """
    main = plan.main
    assert main is not None
    beside = companions(main.path, main.files)
    if plan.vocabulary is None or plan.vocabulary.main is main:
        return beside
    owner = plan.vocabulary.main
    other = companions(owner.path, owner.files)
    templates = any(is_template(name) for name in other.files)
    files = {
        name: file for name, file in beside.files.items()
        if not is_tokenizer(name) and not (templates and is_template(name))
    }  # fmt: skip
    files |= {name: file for name, file in other.files.items() if is_tokenizer(name) or is_template(name)}
    return beside._replace(files=dict(sorted(files.items())))


def side_files(plan: Plan, beside: Companions | None = None) -> dict[str, Content]:
    """The files beside the weights of the result, by name: companions of the base, and those that are new.

    Configuration, tokenizer, chat template and generation settings come from `plan.main`, with the changes that the
    recipe asks for; the index of the shards is new.
    """
    from merges.recipes.stacked_config import stacked_config
    from merges.recipes.vocabulary import write

    main = plan.main
    assert main is not None
    files: dict[str, Content] = dict((beside or companions_of(plan)).files)
    config = copy.deepcopy(main.config)
    kinds = Counter({job.dtype: 0 for job in plan.jobs if job.dtype in NAMES})
    for job in plan.jobs:
        if job.dtype in NAMES:
            kinds[job.dtype] += size(job)
    config = _with_dtype(
        config, NAMES[kinds.most_common(1)[0][0]] if kinds else "", add_key=plan.recipe.dtype != "auto"
    )
    if plan.recipe.slices:
        config = stacked_config(config, plan.recipe.slices, main.reference)[0]
    # Only plain weights are merged: what quantised the base is left from another copy of it.
    config.pop("quantization_config", None)
    if main.tied and any(is_head(job.name) for job in plan.jobs):
        config = untied(config)
    if plan.vocabulary is not None:
        text = config.get("text_config")
        (text if isinstance(text, dict) else config)["vocab_size"] = plan.vocabulary.size
        files["tokenizer.json"] = write(plan.vocabulary, read(files["tokenizer.json"]))
    if config != main.config:
        files["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    template = _template(plan, files)
    if template is not None:
        files[TEMPLATE] = template.encode()
    if len(plan.shards) > 1:
        files["model.safetensors.index.json"] = shards.index(plan.shards)
    return files


TEMPLATE = "chat_template.jinja"


def _template(plan: Plan, files: Mapping[str, Content]) -> str | None:
    """The chat template to write: the recipe's, or where the base has none, the one that all inputs share."""
    requested = plan.recipe.chat_template
    if requested not in (None, "auto"):
        return NAMED.get(requested, requested)
    if requested is None and (TEMPLATE in files or b'"chat_template"' in read(files.get("tokenizer_config.json", b""))):
        return None
    templates = [_template_of(source.path) for source in plan.sources if source.kind == "model"]
    counts = Counter(template for template in templates if template)
    ranked = sorted(counts, key=lambda template: (-counts[template], template))
    return ranked[0] if ranked and (requested == "auto" or len(ranked) == 1) else None


def _template_of(folder: Path) -> str | None:
    """The chat template of an input; None without one, and for a file that is not the folder's."""
    try:
        if (folder / TEMPLATE).is_file():
            return read(Companion(folder, TEMPLATE)).decode()
        template = json.loads(read(Companion(folder, "tokenizer_config.json"))).get("chat_template")
    except (ModelError, OSError, ValueError, AttributeError, RecursionError):
        return None
    return template if isinstance(template, str) else None


def _with_dtype(config: dict[str, Any], dtype: str, *, add_key: bool) -> dict[str, Any]:
    """The configuration with the dtype of the weights, under the key it uses; `add_key` adds a missing one."""
    texts = [config] + ([config["text_config"]] if isinstance(config.get("text_config"), dict) else [])
    for text in texts:
        keys = [key for key in ("dtype", "torch_dtype") if key in text]
        text |= dict.fromkeys(keys or (["dtype"] if add_key and text is config else []), dtype)
    return config


def _journal(plan: Plan, folder: Path) -> dict[str, str]:
    """The finished shards of an interrupted run and their digests; none if the inputs have changed since."""
    try:
        journal = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        outputs = journal["outputs"] if journal["inputs"] == card.states(plan) else {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    good = isinstance(outputs, dict) and all(
        isinstance(digest, str) and os.path.basename(name) == name for name, digest in outputs.items()
    )
    return dict(outputs) if good else {}


def _finished_bytes(plan: Plan, folder: Path) -> int:
    """The bytes that an interrupted run has written already."""
    if not os.path.isdir(folder):  # pathlib raises for a name that is too long
        return 0
    return sum((folder / name).stat().st_size for name in _journal(plan, folder) if (folder / name).is_file())


def verify(plan: Plan, out: Path, record: dict[str, Any], *, on_event: OnEvent = ignore) -> list[str]:
    """Compute the merge again and compare it, and the files in `out`, with the record; returns the differences."""
    stored = record["outputs"]
    problems = [f"{name} is missing" for name in stored if not (out / name).is_file()]
    problems += [
        f"{name} is not what was written: its digest differs from the record's"
        for name, digest in stored.items()
        if (out / name).is_file() and digest_file(out / name) != digest
    ]
    extra = {p.name for p in out.glob("*.safetensors")} - set(stored)
    problems += [f"{name} is not a file of this merge" for name in sorted(extra)]
    now = {entry["name"]: entry["files"] for entry in card.inputs(plan)}
    for before in record["inputs"]:
        digests = now.get(before["name"], {})
        # Compared by digest: a file may have been renamed.
        changed = [name for name, digest in before["files"].items() if digest not in digests.values()]
        problems += [f"the input {before['name']} has changed: {name}" for name in changed]
    report = counter(on_event, "verifying", "bytes")
    # A file that the base has got since is no fault of the output.
    recomputed = {name: digest(content) for name, content in side_files(plan).items() if name in stored}
    done, total = 0, sum(map(shards.file_size, plan.shards))
    for name, shard in zip(shards.names(len(plan.shards)), plan.shards, strict=True):
        state = hashlib.sha256()
        for piece in shards.pieces(shard, plan.pool):
            state.update(piece)
            done += len(piece)
            report(done, total)
        recomputed[name] = "sha256:" + state.hexdigest()
    differing = sorted(name for name in recomputed.keys() | stored.keys() if recomputed.get(name) != stored.get(name))
    return problems + [f"{name}: the recomputed file differs from the one in the record" for name in differing]
