"""The house rules that a machine can hold: who may import whom, what stays unloaded, what is never written.

Floors are those of ARCHITECTURE.md section 1. An import inside a function or under TYPE_CHECKING is an
import too.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "draft", "verify", "kernels", "perf")

FLOORS = {
    "engine.server": 4,
    "engine.cli": 4,
    "engine.step": 3,
    "engine.decoding": 3,
    "engine.scheduler": 3,
    "engine.build": 3,
    "engine.canary": 3,
    "engine.warmup": 3,
    "engine.memory": 3,  # of build: sizes target and head together, so it knows the heads of draft
    "draft": 2,
    "verify": 2,
    "engine.core": 1,
    "engine.roles": 1,
    "engine.clock": 1,
    "engine.config": 1,
    "engine.errors": 1,
    "engine.nn": 1,
    "engine.models": 1,
    "engine.checkpoint": 1,
    "engine.text": 1,
    "engine.pages": 1,
    "engine.prefix": 1,
    "engine.kvcache": 1,
    "engine.rows": 1,
    "engine.checks": 1,
    "engine.edits": 1,
    "engine.logprobs": 1,
    "engine.penalties": 1,
    "engine.sampler": 1,
    "engine.batches": 1,
    "engine.budget": 1,
    "engine.parallel": 1,
    "engine.graphs": 1,
    "engine.grammar": 1,
    "kernels": 0,
}
STRANGERS = {"draft": "verify", "verify": "draft"}  # same floor, yet never each other
# The benchmarks of ``haast bench`` are the one door from the product to perf/.
DOOR = "engine.cli.bench_"
CORE_MAY_IMPORT = {"torch"}
KERNELS_MAY_IMPORT = {"torch", "kernels", "triton", "flashinfer"}  # the last two: see ONLY_IN
ONLY_IN = {
    "triton": ("kernels.triton",),
    "flashinfer": ("kernels.flashinfer",),
    "matplotlib": ("perf.plot",),
    "transformers": ("perf.peers",),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(packages: tuple[str, ...] = PACKAGES) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import; ``from package import module`` names the module."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if base.split(".")[0] in PACKAGES and exists(inner) else base


def room(module: str) -> str:
    """The room of a module of ours: its package for all but engine, where it is the second name."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "engine" else parts[0]


def complaints(path: Path, module: str, imported: str) -> Iterator[str]:
    """What is wrong with one import, if anything."""
    top, here = imported.split(".")[0], room(module)
    if top in ONLY_IN and not any(f"{module}.".startswith(f"{home}.") for home in ONLY_IN[top]):
        yield f"{top} may be imported by {', '.join(ONLY_IN[top])} only"
    if top == "tests":
        yield "nothing imports tests"
    if here == "perf":
        return
    if top == "perf" and not module.startswith(DOOR):
        yield "nothing imports perf"
    if module == "engine.core" and top not in CORE_MAY_IMPORT | set(sys.stdlib_module_names):
        yield "engine.core imports torch only"
    if here == "kernels" and top not in KERNELS_MAY_IMPORT | set(sys.stdlib_module_names):
        yield "kernels import torch only"
    if top not in ("engine", "draft", "verify", "kernels") or imported == "engine" or module == "engine":
        return
    there = room(imported)
    if there not in FLOORS or here not in FLOORS:
        stranger = there if there not in FLOORS else here
        yield f"{stranger} has no floor: give it one in ARCHITECTURE.md section 1 and in this test"
    elif FLOORS[there] > FLOORS[here]:
        yield f"{here} (floor {FLOORS[here]}) imports up from {there} (floor {FLOORS[there]})"
    elif STRANGERS.get(here) == there:
        yield f"{here} and {there} never import each other"


def test_imports_go_down() -> None:
    found = []
    for path in sources():
        for line, imported in imports(path, parsed(path)):
            found += [
                f"{path.relative_to(ROOT)}:{line}: imports {imported}: {complaint}"
                for complaint in complaints(path, module_name(path), imported)
            ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "imported", "complaint"),
    [
        ("kernels.ref", "engine.core", "kernels import torch only"),
        ("engine.sampler", "draft.tree", "imports up"),
        ("draft.tree", "verify.accept", "never import each other"),
        ("engine.core", "numpy", "torch only"),
        ("engine.step", "perf.provenance", "nothing imports perf"),
        ("engine.cli.chat", "perf.provenance", "nothing imports perf"),
        ("engine.nn.linear", "tests.conftest", "nothing imports tests"),
        ("engine.text.chat", "transformers", "perf.peers only"),
        ("draft.train.data", "engine.step", "imports up"),
        ("engine.new_room", "engine.core", "has no floor"),
    ],
)
def test_the_import_rules_bite(module: str, imported: str, complaint: str) -> None:
    assert any(complaint in said for said in complaints(ROOT, module, imported))


def test_relative_imports_are_resolved() -> None:
    path = ROOT / "engine" / "text" / "chat.py"
    tree = ast.parse("from . import tokenizer\nfrom ..step import Engine\nfrom engine import core\n")
    found = [name for _, name in imports(path, tree)]
    assert found == ["engine.text.tokenizer", "engine.step", "engine.core"]


BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
BANNED_CALLS = {"eval", "exec", "print", "__import__"}


BANNED_FUNCTIONS = {
    *("torch.load", "np.load", "numpy.load", "os.system", "os.popen"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
}
SECRETS = {"api_key", "api_keys", "secret", "password", "digest"}


def name_of(node: ast.expr) -> str:
    """The last name of an expression like ``options.api_key``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def forbidden(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that must not stand in a package."""
    is_edge = path.is_relative_to(ROOT / "engine" / "server")
    for line, imported in imports(path, tree):
        if imported.split(".")[0] in BANNED_MODULES:
            yield line, f"import {imported}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and is_edge:
            yield node.lineno, "assert where input is checked: it is gone with python -O"
        if isinstance(node, ast.Compare) and any(
            isinstance(op, ast.Eq | ast.NotEq | ast.In) for op in node.ops
        ):
            sides = {name_of(side) for side in (node.left, *node.comparators)}
            if sides & SECRETS:
                yield node.lineno, f"{', '.join(sides & SECRETS)} compared by other than compare_digest"
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
            yield node.lineno, f"{node.func.id}()"
        name = ast.unparse(node.func)
        if name in BANNED_FUNCTIONS:
            yield node.lineno, f"{name}()"
        for keyword in node.keywords:
            if keyword.arg == "shell" and ast.unparse(keyword.value) != "False":
                yield node.lineno, "shell=True"
            if keyword.arg == "trust_remote_code":
                yield node.lineno, "trust_remote_code"


def test_nothing_dangerous_or_noisy_is_written() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in sources()
        for line, what in forbidden(path, parsed(path))
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load('x')",
        "eval('1')",
        "exec('1')",
        "print('x')",
        "subprocess.run('ls', shell=True)",
        "os.system('ls')",
        "load(x, trust_remote_code=True)",
        "yaml.load(x)",
        "assert call.n < 8",
        "options.api_key == given",
        "given in options.api_keys",
    ],
)
def test_the_gate_bites(line: str) -> None:
    assert list(forbidden(ROOT / "engine" / "server" / "x.py", ast.parse(line)))


def test_harmless_namesakes_pass() -> None:
    code = "model.eval()\nconsole.print('x')\nsafetensors.torch.load_file('x')\nrun(['ls'], shell=False)\n"
    code += "yaml.safe_load(x)\nassert pages\nlen(keys) == 1\n"
    assert not list(forbidden(ROOT / "engine" / "x.py", ast.parse(code)))


HEAVY = ("triton", "flashinfer", "transformers", "matplotlib", "perf", "tests")


def test_optional_packages_stay_unloaded() -> None:
    code = (
        "import importlib, sys, torch\nbefore = set(sys.modules)\n"
        "for module in ('engine.build', 'engine.cli.main', 'engine.server.app'):\n"
        "    importlib.import_module(module)\n"
        f"    heavy = [name for name in {HEAVY!r} if name in sys.modules and name not in before]\n"
        "    assert not heavy, f'{module} loaded {heavy}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
