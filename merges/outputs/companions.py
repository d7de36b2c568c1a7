"""The files beside a model's weights (its companions), which a copy of the model needs too.

Everything that is not weights is copied: configurations, tokenizers, templates, settings of processors, code, licences,
in subfolders too. Left out, by name and with a reason, are other weights, training state, logs, caches, and whatever
is not a file of the folder, such as a link that leaves it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from vectors.errors import ModelError
from vectors.storage import links
from vectors.storage.files import digest_bytes, digest_pieces, new_file, write_atomically
from vectors.storage.locks import LOCK_SUFFIX, SUFFIX
from vectors.storage.runs import FORMER, RECORD

INDEX = "model.safetensors.index.json"  # written anew where there are several shards
MOST = 10_000  # files; a model folder has a few dozen
LISTED = 100  # names in a model card
DEEPEST = 8  # folders within folders
PIECE = 1 << 20  # bytes that are copied at once

_OF_TRAINING = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt"})
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|hdf5|keras|msgpack|ot|gguf|ggml|ggjt|onnx|onnx_data|pb|tflite|mlmodel|"
    r"mlpackage|engine|plan|nemo|mar|npz|dduf|llamafile|distcp)(\.(data-.*|index|meta|part.*))?/?",
    re.IGNORECASE | re.DOTALL,
)  # fmt: skip
_INDEX = re.compile(r".*\.index(\.[\w-]+)?\.json", re.IGNORECASE | re.DOTALL)
_PICKLE = re.compile(r".*\.(pkl|pickle|joblib|dill)", re.IGNORECASE | re.DOTALL)
_TRAINING = re.compile(
    r"trainer_state\.json|(all|train|eval|test|predict)_results\.json|zero_to_fp32\.py|latest|"
    r"checkpoint-\d+/|global_step\d+/"
)
_LOG = re.compile(r".*\.log|events\.out\.tfevents\..*|nohup\.out|(runs|logs|wandb|mlruns)/", re.IGNORECASE | re.DOTALL)
_CACHE = re.compile(r"\..*|__pycache__/|.*\.(lock|incomplete|tmp|pyc)", re.DOTALL)
# What runs of steer are writing in the folder, such as this one.
_WORK = re.compile(rf"\..*(\.work|\.bake|\.[0-9a-f]{{16}}\.partial|{SUFFIX}|{LOCK_SUFFIX})", re.DOTALL)
_RECORD = (RECORD, *FORMER, "report.html", "curves.svg")
_KINDS = (
    (_CACHE, "a cache, or hidden"), (_TRAINING, "training state"), (_LOG, "a log"), (_INDEX, "an index of weights"),
    (_WEIGHTS, "other weights"), (_PICKLE, "a pickle, which can run code when it is read"),
)  # fmt: skip
_CODE = (".py", ".pyx", ".ipynb", ".sh", ".so", ".dylib", ".dll", ".cu", ".cpp", ".js")
_TEMPLATES = ("chat_template", "additional_chat_templates/")
_TOKENS = (
    "token", "special_tokens", "added_tokens", "vocab", "merges", "spiece", "sentencepiece",
)  # fmt: skip
_TOKEN_SUFFIXES = (".model", ".tiktoken", ".bpe", ".spm")
_QUIET = {reason for _, reason in _KINDS} | {
    "replaced by the card of the output", "the record of the base", "another model",
}  # fmt: skip


class Companion(NamedTuple):
    """A file beside a model's weights: the model's folder, and its name in it with `/` between folders."""

    folder: Path
    name: str

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.name

    def pieces(self) -> Iterator[bytes]:
        """The content, piece by piece. Raises ModelError for a file that is not the folder's, and OSError."""
        with links.opened(self.folder, self.path) as file:
            while piece := file.read(PIECE):
                yield piece


Content = bytes | Companion  # of a file beside the weights of an output: new, or copied


class Companions(NamedTuple):
    """The files to copy by name, and the reasons of those that are left out by name (a folder's ends in `/`)."""

    folder: Path
    files: Mapping[str, Companion]
    left_out: Mapping[str, str]
    linked: tuple[str, ...] = ()  # the weights that are read through a link which leaves the folder

    @property
    def size(self) -> int:
        """The bytes of the files to copy."""
        return sum(file.path.stat().st_size for file in self.files.values())

    def notes(self) -> list[str]:
        """What a user must know before the output is used, a sentence each."""
        lines = [
            f"{self.folder / name} is not in the output: it is {reason}"
            for name, reason in self.left_out.items()
            if reason not in _QUIET
        ]
        lines += [f"{self.folder / name} is read through a link that leaves the folder" for name in self.linked]
        modules = [name for name in self.files if _WEIGHTS.fullmatch(name)]
        lines += [f"{self.folder / name} is copied to the output as it is, not merged" for name in modules]
        code = [name for name in self.files if is_code(name)]
        if code:
            lines.append(f"the output holds code of {self.folder}, which trust_remote_code runs: {', '.join(code)}")
        return lines


def is_code(name: str) -> bool:
    """Whether a file holds code."""
    return name.lower().endswith(_CODE)


def is_tokenizer(name: str) -> bool:
    """Whether a companion is part of the tokenizer; chat templates are not."""
    return name.startswith(_TOKENS) or (name.endswith(_TOKEN_SUFFIXES) and "/" not in name)


def is_template(name: str) -> bool:
    """Whether a companion is a chat template."""
    return name.startswith(_TEMPLATES)


def companions(folder: Path, weights: Collection[Path] = ()) -> Companions:
    """The companions in a model's folder; `weights` are the files that the output replaces.

    Raises ModelError when the configuration or the tokenizer is not the folder's (such as a link that leaves it), since
    the output would lack what it can't be loaded without; and for a folder of more than `MOST` files.
    """
    replaced = {path.name for path in weights if path.parent == folder} | {INDEX}
    modules = _module_folders(folder)
    files: dict[str, Companion] = {}
    left_out: dict[str, str] = {}
    for name, path in _walk(folder, modules, left_out):
        if name in replaced:
            continue
        reason = _left_out(name, modules) or links.fault_of(folder, path)
        if reason is None and not _is_text(name):
            name, reason = repr(name), "a name that is not UTF-8"
        if reason is None:
            files[name] = Companion(folder, name)
        else:
            left_out[name] = reason
    if unmerged := _modules_without_safetensors(modules, files, left_out):
        raise ModelError(
            [f"{folder / name} holds the weights of a module, and not as safetensors" for name in unmerged],
            "the output would lack them: save the module as safetensors first, as SentenceTransformer(...).save(...) "
            "does, or use a revision that has them",
        )
    problems = [
        f"{folder / name} can't be copied: it is {reason}"
        for name, reason in left_out.items()
        if reason not in _QUIET and (name == "config.json" or is_tokenizer(name) or is_template(name))
    ]
    if problems:
        raise ModelError(problems, "replace it by a copy of the file that is meant: cp -L")
    linked = tuple(sorted(path.name for path in weights if links.fault_of(path.parent, path) == links.LEAVES))
    return Companions(folder, dict(sorted(files.items())), dict(sorted(left_out.items())), linked)


def card_lines(beside: Companions) -> list[str]:
    """The lines of a model card (Markdown) about code in the output, module weights, and what was left out."""
    lines: list[str] = []
    code = [name for name in beside.files if is_code(name)]
    if code:
        lines += ["## Code", "", "Copied from the base, and run by whoever loads this folder with `trust_remote_code`:"]
        lines += ["", *(f"- {_cell(name)}" for name in code), ""]
    modules = [name for name in beside.files if _WEIGHTS.fullmatch(name)]
    if modules:
        lines += ["Weights of further modules, copied from the base as they are:", ""]
        lines += [*(f"- {_cell(name)}" for name in modules), ""]
    if beside.linked:
        lines += ["Weights of the base that were read through a link which leaves its folder:", ""]
        lines += [*(f"- {_cell(name)}" for name in beside.linked), ""]
    if beside.left_out:
        lines += ["## Left out", "", "Of the files in the base's folder, these are not here:", ""]
        lines += ["| file | reason |", "|---|---|"]
        listed = list(beside.left_out.items())
        lines += [f"| {_cell(name)} | {reason} |" for name, reason in listed[:LISTED]]
        if len(listed) > LISTED:
            lines.append(f"| and {len(listed) - LISTED} more | |")
        lines.append("")
    return lines


def in_markdown(name: str) -> str:
    """A file name as it can stand in a Markdown table: control characters are visible, and nothing ends the cell."""
    visible = name if name.isprintable() else name.encode("unicode_escape", "surrogatepass").decode()
    return visible.replace("`", "'").replace("|", "\\|").replace("<", "&lt;")


def _cell(name: str) -> str:
    return f"`{in_markdown(name)}`"


def pieces(content: Content) -> Iterator[bytes]:
    """The bytes of a companion, or of a new file. Raises ModelError, OSError."""
    return iter((content,)) if isinstance(content, bytes) else content.pieces()


def read(content: Content) -> bytes:
    """All bytes of a companion, or of a new file. Raises ModelError, OSError."""
    return b"".join(pieces(content))


def digest(content: Content) -> str:
    """The digest of a companion, or of a new file. Raises ModelError, OSError."""
    return digest_pieces(pieces(content))


def write_all(files: Mapping[str, Content], out: Path) -> dict[str, str]:
    """Write files into an output folder; returns their digests by name. Raises ModelError, OutputError.

    A copy is readable by no more people than the original is.
    """
    digests = {}
    for name, content in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            write_atomically(path, content)
            digests[name] = digest_bytes(content)
            continue
        with new_file(path, mode=stat.S_IMODE(content.path.stat().st_mode) | stat.S_IWUSR) as file:
            digests[name] = digest_pieces(_written(content.pieces(), file))
    return digests


def _written(pieces_: Iterator[bytes], file: IO[bytes]) -> Iterator[bytes]:
    for piece in pieces_:
        file.write(piece)
        yield piece


def _walk(folder: Path, modules: Collection[str], left_out: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """Every file of a folder and its subfolders, with its name; folders that are left out are added to `left_out`."""
    waiting, count = [""], 0
    while waiting:
        prefix = waiting.pop()
        try:
            entries = sorted(os.scandir(folder / prefix), key=lambda entry: entry.name)
        except OSError as error:
            if not prefix:
                raise ModelError(f"{folder} can't be read: {error.strerror}", "allow it: chmod u+rx") from error
            left_out[prefix] = "not readable"
            continue
        names = {entry.name for entry in entries}
        if prefix and prefix[:-1] not in modules and "config.json" in names and any(map(_WEIGHTS.fullmatch, names)):
            left_out[prefix] = "another model"
            continue
        for entry in entries:
            name = prefix + entry.name
            if _WORK.fullmatch(entry.name):
                continue
            count += 1
            if count > MOST:
                raise ModelError(
                    f"{folder} holds more than {MOST} files", "name a folder that holds the model and nothing else"
                )
            if not entry.is_dir(follow_symlinks=False):
                yield name, folder / name
            elif reason := _left_out(name + "/", ()):
                left_out[name + "/"] = reason
            elif name.count("/") >= DEEPEST:
                left_out[name + "/"] = f"more than {DEEPEST} folders deep"
            else:
                waiting.append(name + "/")


def _left_out(name: str, modules: Collection[str]) -> str | None:
    """Why a file or folder (whose name ends in `/`) is left out for its name; None if it is copied."""
    last = re.sub(r".*/(?=.)", "", name, flags=re.DOTALL)
    if name == "README.md":
        return "replaced by the card of the output"
    if name in _RECORD:
        return "the record of the base"
    if name == "adapter_config.json":
        return "other weights"
    if name.rpartition("/")[0] in modules and last.endswith(".safetensors"):
        return None
    return next((reason for kind, reason in _KINDS if kind.fullmatch(last)), None)


def _modules_without_safetensors(
    modules: Collection[str], files: Collection[str], left_out: Collection[str]
) -> list[str]:
    """The weights of modules that are left out while the output has none of that module."""
    present = {name.rpartition("/")[0] for name in files if name.endswith(".safetensors")}
    return sorted(
        name
        for name in left_out
        if _WEIGHTS.fullmatch(name)
        and name.rpartition("/")[2] not in _OF_TRAINING
        and name.rpartition("/")[0] in modules
        and name.rpartition("/")[0] not in present
    )


def _module_folders(folder: Path) -> set[str]:
    """The folders of modules that follow the transformer, such as `1_Pooling`, which modules.json lists."""
    try:
        with links.opened(folder, folder / "modules.json") as file:
            listed = json.loads(file.read(PIECE))
        return {entry["path"].rstrip("/") for entry in listed if entry["path"]}
    except (ModelError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
