"""The house rules that a machine can check: who imports whom, and what documents may say."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import keras
import pytest

import keras_rq

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "keras_rq"

# From the top of the house to the bottom: a room imports from rooms before it, or from itself.
ROOMS = (
    "numerics",
    "backend",
    "quantizers",
    "ops",
    "shorthand",
    "policy",
    "presets",
    "layers",
    "training",
    "inference",
    "export",
    "reports",
    "callbacks",
    "distillation",
    "api",
    "demo",
    "cli",
    "__main__",
    "__init__",
)
# The rooms that use the package as its users do, through its public names.
GUESTS = ("demo", "cli")

FRAMEWORKS = {
    "ai_edge_litert",
    "flatbuffers",
    "jax",
    "jaxlib",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorflow",
    "tf_keras",
    "torch",
}
FRAMEWORK_ROOMS = ("backend", "export")
BACKEND_NAMES = {"tensorflow", "jax", "torch"}
NAMELESS_ROOMS = ("numerics", "quantizers", "ops", "policy", "layers")

SOURCES = sorted(PACKAGE.rglob("*.py"))
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "*.toml", "Makefile", ".ci/*", "*/**/*.md", "*/**/*.py", "*/**/*.ipynb")
    for path in ROOT.glob(pattern)
    if path.is_file() and not {".venv", "build", "dist"} & set(path.relative_to(ROOT).parts)
)
MACHINE_PATH = re.compile(r"(?<![\w.:/~-])/(work|root|home|tmp|opt|mnt|Users|private)/\w")
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)")


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module a file imports, at whatever depth, as `(line, dotted name)`."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            names = (arg.value for arg in node.args if isinstance(arg, ast.Constant))
            yield from ((node.lineno, str(name)) for name in names)


def _imported_room(module: str) -> str | None:
    """The room a module of this package belongs to; `__init__` for the package itself."""
    parts = module.split(".")
    if parts[0] != "keras_rq":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"


@pytest.mark.once
@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_rooms_import_only_from_rooms_above(path: Path) -> None:
    room = _room(path)
    assert room in ROOMS, f"{_name(path)} is in a room that is not in the house: {ROOMS}"
    allowed = set(ROOMS[: ROOMS.index(room) + 1]) | ({"__init__"} if room in GUESTS else set())
    wrong = [
        f"{_name(path)}:{line} imports {module}"
        for line, module in _imports(path)
        if (imported := _imported_room(module)) is not None and imported not in allowed
    ]
    assert not wrong, f"{room} may import from {sorted(allowed, key=ROOMS.index)}; {wrong}"


@pytest.mark.once
@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_frameworks_are_imported_in_backend_and_export_only(path: Path) -> None:
    if _room(path) in FRAMEWORK_ROOMS:
        return
    wrong = [
        f"{_name(path)}:{line} imports {module}"
        for line, module in _imports(path)
        if module.split(".")[0] in FRAMEWORKS
    ]
    assert not wrong


@pytest.mark.once
@pytest.mark.parametrize("path", [p for p in SOURCES if _room(p) in NAMELESS_ROOMS], ids=_name)
def test_mathematics_and_layers_do_not_ask_which_backend_runs(path: Path) -> None:
    wrong = [
        f"{_name(path)}:{node.lineno} says {node.value!r}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in BACKEND_NAMES
    ]
    assert not wrong


@pytest.mark.once
@pytest.mark.parametrize("path", [p for p in SOURCES if _room(p) == "numerics"], ids=_name)
def test_numerics_needs_keras_and_numpy_only(path: Path) -> None:
    allowed = {"keras", "numpy", "keras_rq", *sys.stdlib_module_names}
    wrong = [module for _, module in _imports(path) if module.split(".")[0] not in allowed]
    assert not wrong


IMPORT_PROBE = """
import json, sys
import keras
roots = lambda: {name.partition(".")[0] for name in sys.modules}
surface = lambda: {
    f"{owner.__name__}.{name}": id(value)
    for owner in (keras.Model, keras.layers.Layer, keras.layers.Dense, keras.Sequential)
    for name, value in vars(owner).items()
}
modules, names = roots(), surface()
import keras_rq
changed = sorted(n for n in surface().keys() | names.keys() if surface().get(n) != names.get(n))
print(json.dumps({"modules": sorted(roots() - modules), "changed": changed}))
"""


def test_importing_the_package_imports_no_framework_and_changes_one_name() -> None:
    probe = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
        cwd=ROOT,
        check=True,
    )
    found = json.loads(probe.stdout.splitlines()[-1])
    optional = FRAMEWORKS | {"matplotlib", "sklearn"}
    assert not optional & set(found["modules"])
    assert found["changed"] == ["Model.quantize"]


@pytest.mark.once
@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_no_file_names_a_path_of_one_machine(path: Path) -> None:
    found = [
        f"{_name(path)}:{number}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not found


@pytest.mark.once
@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.suffix == ".md"], ids=_name)
def test_links_within_the_repository_lead_somewhere(path: Path) -> None:
    broken = [link for link in LINK.findall(path.read_text()) if not (path.parent / link).exists()]
    assert not broken


@pytest.mark.once
def test_the_readme_uses_names_that_exist() -> None:
    for dotted in set(re.findall(r"\brq((?:\.\w+)+)", (ROOT / "README.md").read_text())):
        found = keras_rq
        for name in dotted.strip(".").split("."):
            assert hasattr(found, name), f"README.md says rq{dotted}"
            found = getattr(found, name)
