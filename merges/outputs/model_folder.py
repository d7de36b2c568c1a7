"""The model folder that a merge writes: it appears complete or not at all, and an interrupted merge can be resumed.

Files are written in `.NAME.<digest>.partial` beside the output, where the digest is that of the plan. Each finished
shard is entered in a journal with its digest; the next run of the same plan reuses the shards whose digest matches.
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
from vectors.storage.files import canonical_json, digest_bytes, digest_file, write_atomically
from vectors.storage.folders import remove_unfinished, require_free_output, work_folder
from vectors.storage.runs import FORMER, RECORD
from vectors.weights import NAMES

JOURNAL = "progress.json"
PARTIAL = r"[0-9a-f]{16}\.partial"  # after the output's name


def partial_folder(plan: Plan, out: Path) -> Path:
    """The folder in which this plan's files for `out` are written until they are complete."""
    return out.absolute().parent / f".{out.name}.{plan.digest[7:23]}.partial"


def write_model(plan: Plan, out: Path, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Write the merged model to the folder `out`, resuming an interrupted run of the same plan. Returns the record.

    Raises OutputError, ModelError for inputs that changed meanwhile, and ArtifactError for values that are not finite
    or leave the range of the dtype.
    """
    folder = partial_folder(plan, out)
    require_free_output(out, plan.bytes, have=_finished_bytes(plan, folder))
    with work_folder(out, None, name=folder.name, keep=_worth_keeping, becomes_output=True):
        record = _fill(plan, folder, on_event)
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


def _fill(plan: Plan, folder: Path, on_event: OnEvent) -> dict[str, Any]:
    """Write all files of the model; the inputs are hashed in the background."""
    files = shards.names(len(plan.shards))
    seen = card.states(plan)
    finished = _journal(plan, folder)
    report, total, done = counter(on_event, "merging", "bytes"), plan.bytes, 0
    inputs = in_background(card.inputs, plan)
    outputs = {}
    for file, shard in zip(files, plan.shards, strict=True):
        path, expected = folder / file, len(shards.header(shard)) + sum(map(size, shard))
        # Hashed again: after a crash of the machine the journal may be on disk and the data not.
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
    """The contents of the files beside a model's weights that a copy needs too, such as its tokenizer, by name."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.name.startswith("LICENSE") or path.suffix in KEEP)
        and path.name not in SKIP
        and not path.name.endswith(".index.json")
    }


def side_files(plan: Plan) -> dict[str, bytes]:
    """The contents of the files beside the weights of the result, by name.

    Configuration, tokenizer, chat template and generation settings come from `plan.main`, with the changes that the
    recipe asks for; the index of the shards is new.
    """
    from merges.recipes.slices import stacked_config
    from merges.recipes.vocabulary import write

    main = plan.main
    assert main is not None
    files = companions(main.path)
    if plan.vocabulary is not None:
        files |= {
            name: content for name, content in companions(plan.vocabulary.main.path).items() if _is_tokenizer(name)
        }
    config = copy.deepcopy(main.config)
    kinds = Counter({job.dtype: 0 for job in plan.jobs if job.dtype in NAMES})
    for job in plan.jobs:
        if job.dtype in NAMES:
            kinds[job.dtype] += size(job)
    config = _with_dtype(
        config, NAMES[kinds.most_common(1)[0][0]] if kinds else "", add_key=plan.recipe.dtype != "auto"
    )
    if plan.recipe.slices:
        config = stacked_config(config, plan.recipe.slices, main.reference)
    if plan.vocabulary is not None:
        text = config.get("text_config")
        (text if isinstance(text, dict) else config)["vocab_size"] = plan.vocabulary.size
        files["tokenizer.json"] = write(plan.vocabulary, files["tokenizer.json"])
    if config != main.config:
        files["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    template = _template(plan, files)
    if template is not None:
        files[TEMPLATE] = template.encode()
    if len(plan.shards) > 1:
        files["model.safetensors.index.json"] = shards.index(plan.shards)
    return files


TEMPLATE = "chat_template.jinja"


def _template(plan: Plan, files: dict[str, bytes]) -> str | None:
    """The chat template to write: the recipe's, or where the base has none, the one that all inputs share."""
    requested = plan.recipe.chat_template
    if requested not in (None, "auto"):
        return NAMED.get(requested, requested)
    if requested is None and (TEMPLATE in files or b'"chat_template"' in files.get("tokenizer_config.json", b"")):
        return None
    templates = [_template_of(source.path) for source in plan.sources if source.kind == "model"]
    counts = Counter(template for template in templates if template)
    ranked = sorted(counts, key=lambda template: (-counts[template], template))
    return ranked[0] if ranked and (requested == "auto" or len(ranked) == 1) else None


def _template_of(folder: Path) -> str | None:
    try:
        if (folder / TEMPLATE).is_file():
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return template if isinstance(template, str) else None


def _is_tokenizer(name: str) -> bool:
    return name.startswith(("token", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece"))


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
        return dict(journal["outputs"]) if journal["inputs"] == card.states(plan) else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


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
    recomputed, done = {name: digest_bytes(content) for name, content in side_files(plan).items()}, 0
    for name, shard in zip(shards.names(len(plan.shards)), plan.shards, strict=True):
        state = hashlib.sha256()
        for piece in shards.pieces(shard, plan.pool):
            state.update(piece)
            done += len(piece)
            report(min(done, plan.bytes), plan.bytes)
        recomputed[name] = "sha256:" + state.hexdigest()
    differing = sorted(name for name in recomputed.keys() | stored.keys() if recomputed.get(name) != stored.get(name))
    return problems + [f"{name}: the recomputed file differs from the one in the record" for name in differing]
