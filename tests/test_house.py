"""What no other tool checks: the C core, its exports, dtypes of tensors, and the README."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess

import pytest
from helpers.data import ROOT

import ptqkit._core as _core

C_FILES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".c", ".h", ".inc"))


def relative(path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_core_is_free_of_python():
    assert len(C_FILES) > 30
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


# Without dtype= these take the caller's torch.set_default_dtype, some only for Python floats.
FACTORIES = "arange empty eye full linspace logspace normal ones rand randn tensor zeros".split()


def factories_without_dtype(source: str) -> list[int]:
    """Lines of a Python source that make a tensor whose dtype is the caller's default."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, named = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
        if name.startswith("torch.") and name[6:] in FACTORIES and "dtype" not in named:
            found.append(node.lineno)
        if name in ("torch.Tensor", "torch.FloatTensor", "torch.get_default_dtype"):
            found.append(node.lineno)
    return found


def test_every_tensor_factory_names_its_dtype():
    assert factories_without_dtype("torch.full(\n(3,), 1.0)\ntorch.ones(2, dtype=d)") == [1]
    paths = sorted((ROOT / "ptqkit").rglob("*.py"))
    assert len(paths) > 100
    for path in paths:
        assert factories_without_dtype(path.read_text(encoding="utf-8")) == [], relative(path)


@pytest.mark.parametrize("mark", ["setup", "tests"])
def test_readme_has_the_commands_that_the_checks_run(mark):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^<!-- {mark} -->\n```sh\n(.+?)\n```$", text, re.M | re.S)
    assert found and "\n" not in found[1], "one command, in a block of its own"


@pytest.mark.parametrize("folder", ["ptqkit", "csrc", "tests", "benchmarks", "docs", "."])
def test_no_machine_is_named(folder):
    pattern = re.compile(r"(?<![\w.~])/(home|root|work|tmp|opt|usr|Users)/\w")
    endings = {".py", ".pyi", ".c", ".h", ".inc", ".md", ".toml", ".txt"}
    found = (ROOT / folder).glob("*" if folder == "." else "**/*")
    paths = [path for path in found if path.suffix in endings]
    assert paths
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not pattern.search(line), f"{relative(path)}:{number}: {line.strip()}"


def test_changelog_and_citation_have_the_version():
    text = (ROOT / "ptqkit" / "_version.py").read_text(encoding="utf-8")
    version = re.search(r"__version__ = \"(.+)\"", text)
    assert version and f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
