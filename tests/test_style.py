"""What the source has to keep: layers, lengths, exports, and no trace of a machine."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import ptqkit
import ptqkit._core as _core

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sorted(p for p in ROOT.glob("ptqkit/**/*.py"))
C_FILES = sorted(p for p in ROOT.glob("csrc/**/*") if p.suffix in (".c", ".h", ".inc"))
TEXTS = [
    *PYTHON,
    *C_FILES,
    *ROOT.glob("tests/*.py"),
    *ROOT.glob("benchmarks/*.py"),
    *ROOT.glob("*.md"),
    *ROOT.glob("*.py"),
    ROOT / "pyproject.toml",
]

# Lines at which a review has to agree, and at which it has to stop.
PYTHON_FUNCTION, PYTHON_FILE = 60, 350
C_FUNCTION, C_FILE = 100, 500
# Longer for a reason; may shrink, and then the entry goes.
LONGER: dict[str, int] = {}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its first to its last, the docstring and signature left out."""
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        if len(node.body) == 1:
            return 0
        first = node.body[1]
    return (node.end_lineno or 0) - first.lineno + 1


def python_functions() -> Iterator[tuple[str, int]]:
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{relative(path)}:{node.name}", body_lines(node)


def c_functions() -> Iterator[tuple[str, int]]:
    """Functions by layout: a line that starts a definition, and the brace that ends it."""
    for path in C_FILES:
        start, name = 0, ""
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = re.match(r"[A-Za-z_][\w\s*()]*?\b([A-Za-z_]\w*)\(", line)
            if found and not line.rstrip().endswith(";"):
                start, name = number, found[1]
            if line == "}" and start:
                yield f"{relative(path)}:{name}", number - start + 1
                start = 0


def test_function_lengths(record_property):
    lengths = [*python_functions()]
    assert len(lengths) > 100
    long = {name: n for name, n in lengths if n > PYTHON_FUNCTION // 2}
    record_property("functions over half the limit", long)
    over = {name: n for name, n in lengths if n > PYTHON_FUNCTION}
    in_c = [*c_functions()]
    assert len(in_c) > 30
    over |= {name: n for name, n in in_c if n > C_FUNCTION}
    assert not over


def test_file_lengths():
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON + C_FILES}
    limits = {path: PYTHON_FILE if path.suffix == ".py" else C_FILE for path in sizes}
    limits |= {ROOT / name: limit for name, limit in LONGER.items()}
    over = {relative(path): n for path, n in sizes.items() if n > limits[path]}
    assert not over
    assert all(sizes[ROOT / name] > PYTHON_FILE for name in LONGER), "no longer an exception"


def test_core_is_free_of_python():
    for path in C_FILES:
        text = path.read_text(encoding="utf-8")
        if path.parent.name in ("core", "kernels"):
            assert not re.search(r"#\s*include\s*[<\"](Python\.h|numpy/)", text), relative(path)
        if relative(path) != "csrc/core/threads.c":
            assert not re.search(r"#\s*pragma\s+omp\s+(?!simd)", text), relative(path)


def test_only_the_module_is_exported():
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    command = [nm, "-D", "--defined-only", "--format=posix", str(_core.__file__)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[0] for line in listed.splitlines() if line.strip()}
    assert names - {"_init", "_fini"} == {"PyInit__core"}


def test_public_things_have_docstrings():
    missing = []
    for path in PYTHON:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), relative(path)
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
                if ast.get_docstring(node) is None:
                    missing.append(f"{relative(path)}:{node.name}")
    assert not missing


def test_modules_postpone_annotations():
    for path in PYTHON:
        text = path.read_text(encoding="utf-8")
        if "def " in text:
            assert "from __future__ import annotations" in text, relative(path)


def test_no_machine_is_named():
    pattern = re.compile(r"(?<![\w.~])/(home|root|work|tmp|opt|usr|Users)/\w")
    for path in TEXTS:
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not pattern.search(line), f"{relative(path)}:{number}: {line.strip()}"


def test_version_is_stated_once():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{ptqkit.__version__}"' in text
    assert f"## {ptqkit.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("mark", ["setup", "tests"])
def test_readme_has_the_commands_that_the_checks_run(mark):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^<!-- {mark} -->\n```sh\n(.+?)\n```$", text, re.M | re.S)
    assert found and "\n" not in found[1], "one command, in a block of its own"
