"""Completion of the command line in shells."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from ptqkit.cli import main


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_script_knows_commands_and_options(shell, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", shell])
    text = capsys.readouterr().out
    assert ended.value.code in (0, None)
    for word in ("quantize", "diagnose", "group-size", "compressed-tensors"):
        assert word in text


def test_bash_completes_options_choices_and_files(capsys, tmp_path):
    pytest.importorskip("shtab")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    (tmp_path / "train.txt").write_text("text", encoding="utf-8")

    def completions(*words: str) -> list[str]:
        typed = " ".join(f"'{word}'" for word in words)
        ask = f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _shtab_ptqkit"
        program = f"{script}\n{ask}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        run = subprocess.run([bash, "-c", program], capture_output=True, text=True, cwd=tmp_path)
        return run.stdout.split()

    assert completions("ptqkit", "qua") == ["quantize"]
    assert "--symmetric" in completions("ptqkit", "quantize", "--sym")
    assert completions("ptqkit", "quantize", "--grid", "he") == ["hessian"]
    assert completions("ptqkit", "quantize", "--calibration", "tr") == ["train.txt"]


def test_without_the_package_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 2 and "ptqkit[completion]" in capsys.readouterr().err
