"""Which room may import which: one way, and without circles."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nearid_personalize"

# A room may import those of lower floors, and its own
FLOORS = (
    ("errors", "lazy"),
    ("attention", "batches", "hub", "names"),
    ("files", "losses", "metrics"),
    ("images",),
    ("encoder", "report"),
    ("single_file",),
    ("loading",),
    ("data",),
    ("miniworld",),
    ("scorer",),
    ("floors",),
    ("driftmap", "embedding", "gate", "guard", "photos", "preferences", "rewards"),
    ("evaluation", "verification"),
    ("gallery",),
    ("bulk",),
    ("lora",),
    ("training",),
    ("distractors", "service"),
    ("commands",),
    ("demo",),
    ("cli", "train_head", "train_lora"),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# What finds the packaged models: it looks for a folder, and imports nothing but `errors`
NAMED_MODELS = "miniworld"
PURE = (
    "losses",
    "metrics",
    "scorer.calibration",
    "scorer.ranking",
    "gallery.open_set",
    "guard.plan",
    "guard.policy",
    "guard.profile",
    "guard.race",
    "guard.replays",
)


def module_of(path: Path) -> str:
    """`guard/race.py` -> `guard.race`; a package's `__init__` bears the package's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def runtime_imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """All imports but those for the type checker alone."""
    found, stack = [], [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        stack.extend(ast.iter_child_nodes(node))
    return found


def imports_of(module: str) -> set[str]:
    """Modules of this package that a module imports, at its top or inside a function."""
    path = MODULES[module]
    package = ["nearid_personalize", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in runtime_imports(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("nearid_personalize."):
                inside = name.removeprefix("nearid_personalize.")
                found.add(inside if inside in MODULES else inside.rpartition(".")[0])
    return {name for name in found if name}


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_run_one_way(module):
    room = module.split(".")[0]
    for other in imports_of(module):
        other_room = other.split(".")[0]
        if other_room in (room, NAMED_MODELS):
            continue
        assert FLOOR_OF[other_room] < FLOOR_OF[room], f"{module} imports {other}"


def test_there_is_no_circle():
    graph = {module: imports_of(module) for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", PURE)
def test_pure_rooms_import_torch_and_numpy_alone(module):
    for node in runtime_imports(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for name in names:
            root = name.split(".")[0]
            assert root in {"torch", "numpy", "nearid_personalize"} or root in sys.stdlib_module_names, (
                f"{module} imports {name}"
            )
