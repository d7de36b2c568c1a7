"""The structure of the project: imports point down, nothing imports in a circle, files stay small, docs stay true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import groups
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"vectors": 0, "probes": 1, "merges": 1, "steer": 2}
# Within a package: the rooms from the lowest to the highest. A room imports only those before it.
ROOMS = {
    "vectors": ["documents", "storage", "registry", "formats"],
    "probes": ["data", "models", "capture", "directions", "readouts", "internals"],
    "merges": ["engine", "methods", "inputs", "recipes", "outputs"],
    "steer": ["reports", "folding", "training", "evaluation", "store", "experiments", "serving", "doctor", "cli"],
    "steer/serving": ["engine", "http", "offline"],
}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = 400  # a longer file is two rooms
MODULES_OF_A_FOLDER = 12  # modules in a folder that lists no plugins


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


class _WithoutTypeChecking(ast.NodeTransformer):
    """Imports for annotations alone are none when the program runs."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse
        return self.generic_visit(node)


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(_WithoutTypeChecking().visit(ast.parse(path.read_text())))


@cache
def imported(path: Path) -> frozenset[str]:
    """Every module that a file imports, anywhere in it, by its full name where it is one of ours."""
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            named = {alias.name for alias in node.names} - {name.rsplit(".", 1)[1] for name in submodules}
            found |= submodules | ({node.module} if named else set())
    return frozenset(found)


def packages_imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def cycle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """The members of one circle of a graph, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_package_imports_only_those_below_it(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    above = {
        name
        for name in packages_imported(path)
        if name in PACKAGES and name != package and PACKAGES[name] >= PACKAGES[package]
    }
    assert above == set()


def test_no_two_files_import_each_other_directly_or_in_a_circle() -> None:
    graph = {
        module: {name for name in imported(path) if name in MODULES} - {module} for module, path in MODULES.items()
    }
    assert cycle_in(graph) == []


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=relative)
def test_the_rooms_of_a_folder_import_in_one_direction(folder: Path) -> None:
    prefix = module_of(folder / "__init__.py")
    depth = len(prefix.split("."))

    def child(module: str) -> str | None:
        """The file or folder of a module. Plugins stand above the folder that lists them, their contract in it."""
        if not module.startswith(prefix + "."):
            return None
        name = module.split(".")[depth]
        lists = MODULES.get(f"{prefix}.{name}")
        contract = module in (f"{prefix}.{name}", f"{prefix}.{name}._protocol")
        plugin = not contract and lists is not None and re.search(r"\bdiscover(_as)?\(", lists.read_text()) is not None
        return f"{name}: plugins" if plugin else name

    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        here = child(module)
        if here is not None:
            graph.setdefault(here, set()).update({there for name in imported(path) if (there := child(name))} - {here})
    assert cycle_in(graph) == []


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_stand_in_the_order_that_is_drawn(package: str) -> None:
    order = ROOMS[package]
    for path in sorted((ROOT / package).rglob("*.py")):
        room = path.relative_to(ROOT / package).parts[0]
        if room not in order:
            continue
        prefix = package.replace("/", ".")
        above = {f"{prefix}.{name}" for name in order[order.index(room) + 1 :]}
        assert not {name for name in imported(path) if ".".join(name.split(".")[: prefix.count(".") + 2]) in above}, (
            path
        )


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_below_the_workbench_prints_or_knows_the_command_line(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] == "steer":
        return
    assert not {"click", "rich", "vllm", "fastapi"} & packages_imported(path)
    calls = [node for node in nodes(path) if isinstance(node, ast.Call)]
    assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)


def test_no_file_has_grown_past_400_lines() -> None:
    assert [relative(path) for path in FILES if len(path.read_text().splitlines()) > LINES] == []


def test_no_folder_has_more_files_than_can_be_read_at_once() -> None:
    """Folders of plugins (one method per file) may be longer."""
    crowded = []
    for folder in {path.parent for path in FILES}:
        entries = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
        if len(entries) > MODULES_OF_A_FOLDER and folder.name not in ("methods", "commands"):
            crowded.append((relative(folder), len(entries)))
    assert crowded == []


# The rooms that make files and folders appear whole or not at all; everything else writes through them.
WRITERS = {"vectors/storage/files.py", "vectors/storage/folders.py", "vectors/storage/locks.py"}
WRITING = {
    "open", "write_text", "write_bytes", "touch", "rename", "move", "copy2", "copyfile", "copytree",
    "mkstemp", "mkdtemp", "TemporaryDirectory", "NamedTemporaryFile", "save_pretrained", "save_file",
}  # fmt: skip
MAY_WRITE = {
    ("vectors/storage/links.py", "open"): "to read, without waiting for a pipe and without following a link",
    ("vectors/storage/bundled.py", "save_pretrained"): "in a temporary folder",
    ("vectors/storage/bundled.py", "replace"): "a temporary folder takes its name in the cache, under a lock",
    ("steer/training/student.py", "save_pretrained"): "in the work folder",
    ("steer/training/result.py", "save_pretrained"): "in the work folder",
    ("steer/serving/launch.py", "open"): "a log grows while the server runs",
    ("steer/serving/launch.py", "mkstemp"): "the log of a server that died stays after its temporary folder",
    ("steer/serving/launch.py", "move"): "the log of a server that died stays after its temporary folder",
    ("steer/experiments/storage/database.py", "touch"): "a log begins as an empty file; no other connection makes one",
    ("steer/experiments/storage/journal.py", "open"): "a journal grows while the server runs; a lock says whose it is",
    ("steer/experiments/storage/journal.py", "rename"): "a file of a journal gets its name under its lock",
    ("steer/cli/__init__.py", "open"): "the null device, where the reader of a pipe has gone",
}


def writes(call: ast.Call) -> str | None:
    """The name of the called function, if it makes, replaces or moves a file or folder."""
    function = call.func
    if isinstance(function, ast.Name):
        name, owner, arguments = function.id, "", call.args[1:]
    elif isinstance(function, ast.Attribute):
        name, owner, arguments = function.attr, ast.unparse(function.value), call.args
    else:
        return None
    if name == "open" and owner != "os":
        modes = [*arguments[:1], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        given = "".join(str(mode.value) for mode in modes if isinstance(mode, ast.Constant))
        return name if set("wxa+") & set(given) else None
    if name == "replace":  # also a method of texts, of two arguments, and a function of dataclasses
        return name if owner == "os" or (owner and len(call.args) == 1 and not call.keywords) else None
    if name == "copy":  # also a method of lists
        return name if owner == "shutil" else None
    return name if name in WRITING else None


def writes_in(path: Path) -> set[str]:
    return {name for node in nodes(path) if isinstance(node, ast.Call) and (name := writes(node))}


def test_files_and_folders_are_written_in_one_way() -> None:
    found = {(relative(path), name) for path in FILES if relative(path) not in WRITERS for name in writes_in(path)}
    assert found == set(MAY_WRITE)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("open(path, 'w')", "open"),
        ("path.open(mode='xb')", "open"),
        ("path.write_text('')", "write_text"),
        ("os.replace(a, b)", "replace"),
        ("path.replace(other)", "replace"),
        ("tempfile.mkdtemp()", "mkdtemp"),
    ],
)
def test_another_way_of_writing_is_noticed(tmp_path: Path, text: str, name: str) -> None:
    reading = "open(path), path.open('rb'), text.replace('a', 'b'), replace(a, b=1), found.copy(), Vector.open(path)\n"
    (tmp_path / "a.py").write_text(reading)
    assert writes_in(tmp_path / "a.py") == set()
    (tmp_path / "a.py").write_text(reading + text)
    assert writes_in(tmp_path / "a.py") == {name}


def test_nothing_unpickles() -> None:
    for path in FILES:
        text = path.read_text()
        assert not {"dill", "joblib"} & packages_imported(path), path
        assert not re.search(r"pickle\.(loads?|Unpickler)\b|from pickle import .*(load|Unpickler)", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_public_name_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "the file"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    missing = [
        node.name
        for node in tree.body
        if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    protocols = [node for node in classes if any(isinstance(b, ast.Name) and b.id == "Protocol" for b in node.bases)]
    # What a protocol of the same file says of its methods is said of all that have them.
    contract = {node.name for p in protocols for node in p.body if isinstance(node, kinds) and ast.get_docstring(node)}
    missing += [
        f"{owner.name}.{node.name}"
        for owner in classes
        for node in owner.body
        if isinstance(node, kinds)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
        and node.name not in contract
    ]
    assert missing == []


@pytest.mark.parametrize("page", DOCS, ids=relative)
def test_docs_name_only_files_that_are_there(page: Path) -> None:
    text = page.read_text()
    prefix = r"(?<![\w/.-])((?:vectors|probes|merges|steer|tests|examples|scripts|docs)/[\w/.-]*\w/?)"
    paths = {match.rstrip("/") for match in re.findall(prefix, text)}
    made = re.compile(r"examples/|_build|\.(safetensors|gguf|html|json)$")  # what commands write
    made_by_the_reader = set(re.findall(r"\bas `([\w/]+\.py)`", text))
    missing = [path for path in sorted(paths - made_by_the_reader) if not (ROOT / path).exists()]
    assert [path for path in missing if not made.search(path)] == []
    names = set(re.findall(r"\b((?:vectors|probes|merges|steer)(?:\.[a-z_]+)+)\b", text))
    groups = {
        "steer.safetensors",
        *re.findall(r"`(steer\.[a-z_]+(?:_methods|_formats|_routes|optimisers|scores))`", text),
    }
    for name in sorted(names - groups):
        package, *rest = name.split(".")
        if name in MODULES or (package == "steer" and len(rest) == 1):
            continue  # a module, or a name of the Python interface
        parent, attribute = name.rsplit(".", 1)
        assert parent in MODULES or parent.rsplit(".", 1)[0] in MODULES, f"{name} in {relative(page)}"
        if parent in MODULES:
            assert re.search(rf"\b{attribute}\b", MODULES[parent].read_text()), f"{name} in {relative(page)}"


def test_the_drawn_tree_is_the_tree() -> None:
    """Every room, and every file that stands in a package itself, is drawn in docs/architecture.md."""
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```text")[1].split("```")[0]
    drawn = set(re.findall(r"[\w]+(?:/|\.py)", tree))
    for package in PACKAGES:
        for entry in (ROOT / package).iterdir():
            if entry.is_dir() and entry.name != "__pycache__":
                assert f"{entry.name}/" in drawn, relative(entry)
            elif entry.suffix == ".py" and not entry.name.startswith("__"):
                assert entry.name in drawn, relative(entry)
    there = (
        {path.name for path in FILES} | {f"{path.parent.name}/" for path in FILES} | {"tests/", "bench/", "examples/"}
    )
    assert drawn - there == set()


def test_tests_mirror_the_rooms() -> None:
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        room = path.parent.relative_to(ROOT / "tests")
        elsewhere = room.parts[:1] in ((), ("bench",), ("hostile",))
        assert elsewhere or (ROOT / room).is_dir(), relative(path)


def test_every_test_file_has_a_name_of_its_own() -> None:
    """pytest imports them by their base names."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_importing_steer_and_its_command_line_loads_nothing_heavy() -> None:
    script = (
        "import sys, steer, steer.cli\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_had_and_is_listed_in_order() -> None:
    import steer

    assert steer.__all__ == sorted(steer.__all__)
    assert set(steer._homes()) == set(steer.__all__)
    for name in steer.__all__:
        assert getattr(steer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'wrong'"):
        steer.wrong  # noqa: B018


def test_every_command_has_help_and_stands_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    from steer.cli import root, run

    readme = (ROOT / "README.md").read_text()
    for name in root.list_commands(None):  # type: ignore[arg-type]
        assert f"steer {name}" in readme
        assert run([name, "--help"]) == 0
        assert "Usage: steer " + name in capsys.readouterr().out


def test_tests_of_a_group_stand_in_files_that_are_there_and_others_are_their_own_group() -> None:
    files = [file for group in groups.GROUPS.values() for file in group]
    assert len(files) == len(set(files))
    for file in files:
        assert (ROOT / "tests" / file).is_file()
    assert {groups.group_of(f"tests/{file}::test_a[b-c]") for file in files} == set(groups.GROUPS)
    assert groups.group_of("tests/test_house.py::test_a[b@c::d]") == "tests/test_house.py::test_a[b@c::d]"


@pytest.mark.parametrize(
    "module", ["steer.cli", "probes.models.loading", "vectors", "merges.dare", "test_house", "pico"]
)
def test_a_warning_of_our_own_code_fails_a_test(module: str) -> None:
    with pytest.raises(DeprecationWarning, match="old"):
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module)


@pytest.mark.parametrize("module", ["torch.jit", "vectorstore.api", "steering", "numpy"])
def test_a_warning_of_another_package_does_not(module: str) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module)
    assert len(seen) == 1
