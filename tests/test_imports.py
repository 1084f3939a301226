"""Imports go down the floors of docs/architecture.md, not in circles, and what answers HTTP or schedules has no JAX."""

import ast
import graphlib
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"qwen_jax": ROOT / "qwen_jax", "qwen_kernels": ROOT / "kernels" / "qwen_kernels"}
# From the top down. Packages of one floor do not import each other.
FLOORS = (("cli", "harness"), ("cluster",), ("serving", "tuning"), ("engine",), ("training", "evaluation"),
          ("model", "checkpoint", "parallel"), ("quantization",), ("config", "private_folder"), ("kernels",),
          ("structs", "sockets", "atomic", "contents", "xla_flags"), ("errors",))
FLOOR = {package: len(FLOORS) - floor for floor, packages in enumerate(FLOORS) for package in packages}
# Imports that stay although they go up or across, with the reason.
EXCEPTIONS = {("checkpoint", "model"): "weights are read into the model's tree and checked against its shapes",
              ("checkpoint", "parallel"): "a tensor is placed on its devices as it is read, before the next one is"}
MAX_ENGINE_ROOMS = 11
HEAVY = ("jax", "flax", "llguidance", "orbax", "transformers")


@pytest.mark.parametrize("module", ["qwen_jax.serving.http.app", "qwen_jax.serving.server",
                                    "qwen_jax.cluster.composition", "qwen_jax.cluster.ray_serve.gateway",
                                    "qwen_jax.engine.scheduling.scheduler", "qwen_jax.cli"])
def test_a_process_without_a_model_has_no_jax(module):
    if "ray_serve" in module:
        pytest.importorskip("ray")
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_a_model_with_a_tokenizer_file_needs_no_torch():
    """Which is installed here, and takes two seconds to import: of every start of a server or a command."""
    pytest.importorskip("torch")
    code = ("import sys; from qwen_jax.checkpoint import load_model, load_tokenizer, resolve; source = "
            "resolve('bundled'); load_model(source); load_tokenizer(source); sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def modules():
    """Every module of the project as its path and its dotted name."""
    for name, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree, whole):
    """Pairs of a line and a module that is imported; ``whole``: also inside functions. Not for type checkers only."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif whole or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)


NAMES = {name for _, name in modules()}
TREES = {path: ast.parse(path.read_text()) for path, _ in modules()}


def module_of(name):
    """The project's module in an imported name such as ``qwen_jax.errors.UserError``; None for other projects."""
    while name and name not in NAMES:
        name = name.rpartition(".")[0]
    return name or None


def package_of(module):
    """The name of a module's package in `FLOORS`; None for qwen_jax itself, which only passes names on."""
    top, _, rest = module.partition(".")
    if top == "qwen_kernels":
        return "kernels"
    first = rest.partition(".")[0]
    return "cli" if first.startswith("cli") else first or None


def room_of(module):
    """The package of a module, or within the engine the room: ``engine.core``."""
    parts = module.split(".")
    return ".".join(parts[1:3]) if parts[1:2] == ["engine"] else package_of(module)


def edges(group, whole):
    """For pairs of different groups, the places where the first one imports the second one."""
    found = defaultdict(list)
    for path, name in modules():
        for line, imported in imports(TREES[path], whole):
            target = module_of(imported)
            if target and group(name) and group(target) and group(name) != group(target):
                found[group(name), group(target)].append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    return found


def test_every_package_has_a_floor():
    assert {package_of(name) for _, name in modules()} - {None} <= set(FLOOR)


def test_imports_go_down_the_floors():
    wrong = [place for (above, below), places in edges(package_of, whole=True).items()
             if FLOOR[above] <= FLOOR[below] and (above, below) not in EXCEPTIONS for place in places]
    assert not wrong, "\n".join(wrong)


def test_exceptions_are_there():
    assert set(EXCEPTIONS) <= set(edges(package_of, whole=True))


def test_packages_and_rooms_of_the_engine_have_no_circles():
    found, graph = edges(room_of, whole=False), defaultdict(set)
    for above, below in found:
        graph[above].add(below)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
        pytest.fail("\n".join(place for pair in zip(circle[1:], circle) for place in found[pair]), pytrace=False)


def test_the_engine_has_few_rooms():
    rooms = [path for path in (ROOT / "qwen_jax" / "engine").iterdir()
             if path.name not in ("__init__.py", "__pycache__") and (path.is_dir() or path.suffix == ".py")]
    assert len(rooms) <= MAX_ENGINE_ROOMS, sorted(path.name for path in rooms)
