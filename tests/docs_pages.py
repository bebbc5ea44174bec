"""The code of the documentation: fenced blocks of a Markdown page, and how they are run."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from curvdiag.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+?) -->\n+)?(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<code>.*?)^(?P=indent)```$",
    flags=re.DOTALL | re.MULTILINE,
)
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*curvdiag |torchrun ")
SHELLS = ("console", "bash", "sh", "")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file that it is to be written to, and why it is not run, if it is not.

    ``follows`` is true where nothing stands between it and the block before: a text there is what that block prints.
    """

    language: str
    code: str
    line: int
    title: str = ""
    why: str = ""
    follows: bool = False

    @property
    def commands(self) -> list[str]:
        """The lines of a shell that call curvdiag, or start processes."""
        lines = [line.strip().removeprefix("$ ") for line in self.code.splitlines()]
        return [line for line in lines if COMMAND.match(line)] if self.language in SHELLS else []


def blocks_of(page: Path) -> list[Block]:
    text, found_so_far, end = page.read_text(), [], 0
    for found in FENCE.finditer(text):
        code = re.sub(rf"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
        line = text.count("\n", 0, found.start("indent")) + 1
        follows = end > 0 and not text[end : found.start()].strip()
        found_so_far.append(Block(found["language"], code, line, found["title"] or "", found["why"] or "", follows))
        end = found.end()
    return found_so_far


def run_command(line: str) -> None:
    """Run one line, in this process or in those of torchrun; it has to end well."""
    if line.startswith("torchrun "):
        run_on_ranks(shlex.split(line, comments=True)[1:])
        return
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line, comments=True)[1:])
    assert ended.value.code in (None, 0), line


def run_on_ranks(arguments: list[str]) -> None:
    """Run ``torchrun`` in the present folder, with this checkout, and print what the processes print."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    run_again = functools.partial(
        subprocess.run,
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    done = run_again()
    if "terminate called without an active exception" in done.stderr:  # gloo, after the script's last line
        done = run_again()
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    print(done.stdout, end="")


def run(block: Block, names: dict[str, Any], page: Path) -> str:
    """What a block prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if block.title:
            Path(block.title).write_text(block.code)
        elif block.language == "python":
            # Line numbers of an error are then those of the page.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        for command in block.commands:
            run_command(command)
    return printed.getvalue()


def require_same(shown: str, printed: str) -> None:
    """What a page shows is what its code prints: the same words, and numbers within a twentieth."""
    shown_words, printed_words = shown.split(), printed.split()
    assert len(shown_words) == len(printed_words), printed
    for mine, real in zip(shown_words, printed_words, strict=True):
        if number(mine) is None or number(real) is None:
            assert mine == real, printed
        else:
            assert number(mine) == pytest.approx(number(real), rel=0.05, abs=1e-4), printed


def number(word: str) -> float | None:
    try:
        return float(word.strip("(),;").replace(",", ""))
    except ValueError:
        return None
