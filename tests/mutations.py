"""Change the code in one place, and see whether a test notices; again and again.

Examples:
  cd tests && ../.venv/bin/python -m mutations numerics/requantize.py numerics/exact_sums.py
  cd tests && ../.venv/bin/python -m mutations ops/norms.py --sample 15 \
      --tests tests/capture/test_norms.py tests/targets/test_whole.py

Prints every change that the test file of the same name does not notice, and how many it did. What
cannot alter a result is among them: judge what is printed. Tests run in the order in which they are
named, to the first that fails: name the fast ones first.
"""

import os

os.environ.update(
    CI="true",
    JAX_PLATFORMS="cpu",
    JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",  # of what a change leaves as it was
)

import argparse
import ast
import compileall
import copy
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import ai_edge_litert.interpreter  # what tests need, imported once
import ai_edge_litert.schema_py_generated  # noqa: F401
import flax.linen  # noqa: F401
import jax
import onnx  # noqa: F401
import onnxruntime  # noqa: F401
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "simqat_jax"
SECONDS = 300
"""Of the processor: what takes longer has been noticed, it runs in circles."""

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
NAMES = {
    "maximum": "minimum",
    "minimum": "maximum",
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "round": "floor",
    "floor": "ceil",
    "ceil": "floor",
    "sqrt": "square",
    "rsqrt": "square",
}
FIRST_ARGUMENT = {"abs", "sign", "copysign", "clip", "stop_gradient", "rounded_product"}
"""Calls that may be left out, so that their first argument stands for them."""


def changes(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], ast.AST]]]:
    """Yield what may be changed about a node, and how, on a copy of it."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
        yield "operator", _with("op", OPERATORS[type(node.op)]())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield "comparison", _with("ops", [OPERATORS[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.UnaryOp):
        yield "without operator", _field("operand")
    if isinstance(node, ast.IfExp | ast.If):
        yield "condition", _with("test", ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", _with("value", not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "constant", _with("value", node.value + 1 if node.value in (0, 1) else node.value * 2)
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in NAMES:
            func = copy.deepcopy(node.func)
            setattr(func, "attr" if isinstance(func, ast.Attribute) else "id", NAMES[name])
            yield "function", _with("func", func)
        if name in FIRST_ARGUMENT and node.args:
            yield "without call", lambda n: getattr(n, "args")[0]  # noqa: B009
        if name == "where" and len(node.args) == 3:
            yield "branches", _with("args", [node.args[0], node.args[2], node.args[1]])


def _field(field: str) -> Callable[[ast.AST], ast.AST]:
    return lambda node: getattr(node, field)


def _with(field: str, value: object) -> Callable[[ast.AST], ast.AST]:
    def change(node: ast.AST) -> ast.AST:
        setattr(node, field, value)
        return node

    return change


class Mutant(NamedTuple):
    """A change: the place of a node in the walk of a source's tree, and which of its changes."""

    place: int
    number: int

    def of(self, source: str) -> tuple[str, str]:
        """Return the change in words, and the source with it."""
        tree = ast.parse(source)
        target = list(ast.walk(tree))[self.place]
        before, line = ast.unparse(target).splitlines()[0], getattr(target, "lineno", 0)
        what, change = list(changes(target))[self.number]
        result = change(copy.deepcopy(target))
        changed = _Replaced(target, result).visit(tree)
        after = ast.unparse(ast.fix_missing_locations(result)).splitlines()[0]
        return f"line {line}, {what}: {before}  ->  {after}", ast.unparse(changed)


def mutants(source: str) -> list[Mutant]:
    """Return all changes of a source."""
    tree = ast.parse(source)
    without = _annotations(tree) | _checks(tree)
    nodes = ((place, n) for place, n in enumerate(ast.walk(tree)) if n not in without)
    return [Mutant(place, k) for place, n in nodes for k, _ in enumerate(changes(n))]


def _annotations(tree: ast.AST) -> set[ast.AST]:
    """Return what says types: `int & None` would stop every import, and show nothing."""
    found = (
        getattr(node, field, None) for node in ast.walk(tree) for field in ("annotation", "returns")
    )
    return {part for node in found if node is not None for part in ast.walk(node)}


def _checks(tree: ast.AST) -> set[ast.AST]:
    """Return what only checks, and alters no result: assertions, `zip(strict=)`, dataclasses."""
    nodes = list(ast.walk(tree))
    flags = ("strict", "frozen", "kw_only")
    values = (n.value for n in nodes if isinstance(n, ast.keyword) and n.arg in flags)
    asserted = (n for n in nodes if isinstance(n, ast.Assert))
    return {part for node in (*values, *asserted) for part in ast.walk(node)}


class _Replaced(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def noticed(folder: Path, name: str, sources: list[str], tests: list[str]) -> Iterator[bool]:
    """Yield for each source of a file whether a test fails with it, in the package in a folder.

    A process tries one after the other, with what JAX has compiled. Where one ends it, another
    goes on behind that.
    """
    tried = 0
    while tried < len(sources):
        read, write = os.pipe()
        if os.fork() == 0:
            _try(folder, name, sources[tried:], tests, write)
        os.close(write)
        while answer := os.read(read, 1):
            tried += 1
            yield answer == b"1"
        os.close(read)
        os.wait()
        if tried < len(sources):
            tried += 1
            yield True


def _try(folder: Path, name: str, sources: list[str], tests: list[str], answers: int) -> NoReturn:
    """Write "1" for each source with which a test fails, "0" for others."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    os.chdir(ROOT)
    sys.path.insert(0, str(folder))
    kept = set(sys.modules)
    for source in sources:
        (folder / PACKAGE / name).write_text(source)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        fails = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
        os.write(answers, b"1" if fails else b"0")
        for module in set(sys.modules) - kept:
            origin = getattr(sys.modules[module], "__file__", None) or ""
            if origin.startswith((str(folder), str(ROOT / "tests"))):
                del sys.modules[module]
    os._exit(0)


def _sample(all_of: list[Mutant], count: int | None, seed: int) -> list[Mutant]:
    if count is None or count >= len(all_of):
        return all_of
    places = random.Random(seed).sample(range(len(all_of)), count)
    return [all_of[place] for place in sorted(places)]


def main() -> None:
    """Change each file named in all ways, one at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="in simqat_jax/")
    parser.add_argument("--tests", nargs="+", help="by default the one of the file's name")
    parser.add_argument("--sample", type=int, help="try so many changes of a file, by chance")
    parser.add_argument("--seed", type=int, default=0, help="of that chance")
    arguments = parser.parse_args()
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
        package = Path(folder) / PACKAGE
        shutil.copytree(ROOT / PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(package, quiet=1)
        for name in arguments.files:
            tests = arguments.tests or [f"tests/{Path(name).parent}/test_{Path(name).name}"]
            source = (ROOT / PACKAGE / name).read_text()
            for stale in (package / name).parent.glob(f"__pycache__/{Path(name).stem}.*"):
                stale.unlink()  # Python tells a file's age in seconds
            tried = [
                m.of(source) for m in _sample(mutants(source), arguments.sample, arguments.seed)
            ]
            sources, found = [source, *(changed for _, changed in tried), source], 0
            results = noticed(Path(folder), name, sources, tests)
            if next(results):
                sys.exit(f"{tests} fail as it is.")
            for what, _ in tried:
                if next(results):
                    found += 1
                else:
                    print(f"{name}: {what}", flush=True)
            if next(results):
                sys.exit(f"{tests} fail behind changes as it is: they leave something behind.")
            print(f"{name}: {found} of {len(tried)} changes noticed", flush=True)


if __name__ == "__main__":
    main()
