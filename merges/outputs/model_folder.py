"""The folder that a merge makes: it appears whole or not at all, and a killed merge goes on where it was.

Work happens beside the output in `.NAME.<digest>.partial`, named by what the bytes follow from. A finished shard is
noted in a journal with its digest; the next run of the same plan takes those whose digest still holds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from merges.engine.pool import in_background
from merges.outputs import card, shards
from merges.recipes.chat_templates import NAMED
from merges.recipes.layout import size
from merges.recipes.plan import Plan
from vectors.errors import ArtifactError, ModelError
from vectors.events import OnEvent, counter, ignore
from vectors.files import canonical_json, digest_bytes, digest_file, write_atomically
from vectors.folders import remove_unfinished, require_free_output, work_folder
from vectors.runs import FORMER, RECORD
from vectors.weights import NAMES

JOURNAL = "progress.json"
PARTIAL = r"[0-9a-f]{16}\.partial"  # behind the output's name


def partial_folder(plan: Plan, out: Path) -> Path:
    """Where the work for this output happens."""
    return out.absolute().parent / f".{out.name}.{plan.digest[7:23]}.partial"


def write_model(plan: Plan, out: Path, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Make the folder; returns its record. Raises OutputError, and ArtifactError for values that can't be merged."""
    folder = partial_folder(plan, out)
    require_free_output(out, plan.bytes, have=_finished_bytes(plan, folder))
    with work_folder(out, None, name=folder.name, keep=_worth_keeping, becomes_output=True):
        record = _fill(plan, folder, on_event)
        (folder / JOURNAL).unlink(missing_ok=True)
    remove_unfinished(out, PARTIAL)  # what other plans for this output have left
    return record


def _worth_keeping(folder: Path, error: BaseException) -> bool:
    """What the inputs forbid won't go better next time; what was interrupted may, if a shard is finished."""
    if not isinstance(error, Exception):  # Ctrl-C or SIGTERM
        return (folder / JOURNAL).is_file()
    return not isinstance(error, ArtifactError | ModelError)


def _fill(plan: Plan, folder: Path, on_event: OnEvent) -> dict[str, Any]:
    """Everything that belongs into the folder. Inputs are hashed meanwhile."""
    files = shards.names(len(plan.shards))
    seen = card.states(plan)
    finished = _journal(plan, folder)
    report, total, done = counter(on_event, "merging", "bytes"), plan.bytes, 0
    inputs = in_background(card.inputs, plan)
    outputs = {}
    for file, shard in zip(files, plan.shards, strict=True):
        path, expected = folder / file, len(shards.header(shard)) + sum(map(size, shard))
        # Hashed anew, not from memory: a journal may outlive the data in a crash of the machine.
        if (
            file in finished
            and path.is_file()
            and path.stat().st_size == expected
            and digest_file(path) == finished[file]
        ):
            outputs[file] = finished[file]
            done += sum(map(size, shard))
            continue

        def show(written: int, before: int = done) -> None:
            report(before + written, total)

        outputs[file] = shards.write(path, shards.pieces(shard, plan.pool), show)
        done += sum(map(size, shard))
        journal = {"inputs": seen, "outputs": outputs}
        write_atomically(folder / JOURNAL, canonical_json(journal).encode())
    for extra in folder.iterdir():
        if extra.name not in (*files, JOURNAL):
            extra.unlink()
    beside = side_files(plan)
    for name, content in beside.items():
        write_atomically(folder / name, content)
        outputs[name] = digest_bytes(content)
    record = card.record(plan, inputs.result(), outputs)
    now = card.states(plan)
    changed = [
        f"{path} was changed while it was being merged" for path, state in seen.items() if now.get(path) != state
    ]
    if changed:
        raise ModelError(changed, "run it again when nothing writes to the inputs")
    card.run_record(plan, record).write(folder)
    write_atomically(folder / "README.md", card.text(plan, record).encode())
    return record


KEEP = (".json", ".model", ".jinja", ".txt", ".py")
SKIP = (
    "adapter_config.json",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    RECORD,
    *FORMER,
)


def companions(folder: Path) -> dict[str, bytes]:
    """What stands beside the weights of a model and belongs to any copy of it, by file name."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.name.startswith("LICENSE") or path.suffix in KEEP)
        and path.name not in SKIP
        and not path.name.endswith(".index.json")
    }


def side_files(plan: Plan) -> dict[str, bytes]:
    """Configuration, tokenizer, chat template, generation settings and index, of the model that it descends from."""
    from merges.recipes.slices import stacked_config
    from merges.recipes.vocabulary import write

    main = plan.main
    assert main is not None
    found = companions(main.path)
    if plan.vocabulary is not None:
        found |= {
            name: content for name, content in companions(plan.vocabulary.main.path).items() if _is_tokenizer(name)
        }
    config = copy.deepcopy(main.config)
    kinds = Counter({job.dtype: 0 for job in plan.jobs if job.dtype in NAMES})
    for job in plan.jobs:
        if job.dtype in NAMES:
            kinds[job.dtype] += size(job)
    config = _with_dtype(config, NAMES[kinds.most_common(1)[0][0]] if kinds else "", asked=plan.recipe.dtype != "auto")
    if plan.recipe.slices:
        config = stacked_config(config, plan.recipe.slices, main.reference)
    if plan.vocabulary is not None:
        text = config.get("text_config")
        (text if isinstance(text, dict) else config)["vocab_size"] = plan.vocabulary.size
        found["tokenizer.json"] = write(plan.vocabulary, found["tokenizer.json"])
    if config != main.config:
        found["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    template = _template(plan, found)
    if template is not None:
        found[TEMPLATE] = template.encode()
    if len(plan.shards) > 1:
        found["model.safetensors.index.json"] = shards.index(plan.shards)
    return found


TEMPLATE = "chat_template.jinja"


def _template(plan: Plan, found: dict[str, bytes]) -> str | None:
    """The chat template to write: what the recipe asks for, or what the inputs agree on where the base has none."""
    asked = plan.recipe.chat_template
    if asked not in (None, "auto"):
        return NAMED.get(asked, asked)
    if asked is None and (TEMPLATE in found or b'"chat_template"' in found.get("tokenizer_config.json", b"")):
        return None
    theirs = [_own_template(source.path) for source in plan.sources if source.kind == "model"]
    counts = Counter(template for template in theirs if template)
    ranked = sorted(counts, key=lambda template: (-counts[template], template))
    return ranked[0] if ranked and (asked == "auto" or len(ranked) == 1) else None


def _own_template(folder: Path) -> str | None:
    try:
        if (folder / TEMPLATE).is_file():
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def _is_tokenizer(name: str) -> bool:
    return name.startswith(("token", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece"))


def _with_dtype(config: dict[str, Any], dtype: str, *, asked: bool) -> dict[str, Any]:
    """The configuration with the dtype of the weights, under whichever key it has; a key is added only if asked for."""
    texts = [config] + ([config["text_config"]] if isinstance(config.get("text_config"), dict) else [])
    for text in texts:
        keys = [key for key in ("dtype", "torch_dtype") if key in text]
        text |= dict.fromkeys(keys or (["dtype"] if asked and text is config else []), dtype)
    return config


def _journal(plan: Plan, folder: Path) -> dict[str, str]:
    """The finished shards of an earlier try and their digests, if it read the same inputs as they are now."""
    try:
        found = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        return dict(found["outputs"]) if found["inputs"] == card.states(plan) else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _finished_bytes(plan: Plan, folder: Path) -> int:
    """What an earlier try has written already."""
    if not os.path.isdir(folder):  # pathlib raises for a name that is too long
        return 0
    return sum((folder / name).stat().st_size for name in _journal(plan, folder) if (folder / name).is_file())


def verify(plan: Plan, out: Path, record: dict[str, Any], *, on_event: OnEvent = ignore) -> list[str]:
    """Compute the merge again, compare it and every file with what is there; everything that differs, in words."""
    stored = record["outputs"]
    problems = [f"{name} is missing" for name in stored if not (out / name).is_file()]
    problems += [
        f"{name} is not what was written: its digest differs from the record's"
        for name, digest in stored.items()
        if (out / name).is_file() and digest_file(out / name) != digest
    ]
    extra = {p.name for p in out.glob("*.safetensors")} - set(stored)
    problems += [f"{name} does not belong to the merge" for name in sorted(extra)]
    now = {entry["name"]: entry["files"] for entry in card.inputs(plan)}
    for before in record["inputs"]:
        own = now.get(before["name"], {})
        # By their content: a file may have another name now.
        changed = [name for name, digest in before["files"].items() if digest not in own.values()]
        problems += [f"the input {before['name']} has changed: {name}" for name in changed]
    report = counter(on_event, "verifying", "bytes")
    again, done = {name: digest_bytes(content) for name, content in side_files(plan).items()}, 0
    for name, shard in zip(shards.names(len(plan.shards)), plan.shards, strict=True):
        state = hashlib.sha256()
        for piece in shards.pieces(shard, plan.pool):
            state.update(piece)
            done += len(piece)
            report(min(done, plan.bytes), plan.bytes)
        again[name] = "sha256:" + state.hexdigest()
    differing = sorted(name for name in again.keys() | stored.keys() if again.get(name) != stored.get(name))
    return problems + [f"{name}: the recipe gives another one than the record says" for name in differing]
