"""Every block of code in the documentation runs as it stands, page by page, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from docs_pages import PAGES, ROOT, blocks_of, require_same, run, run_command
from torch import nn

import curvdiag.cli
from curvdiag import CurvatureMonitor, Objective

# Blocks that stand behind `<!-- not run: why -->`. A new one is a promise less that is kept: think twice.
NOT_RUN = {
    "docs/cwgd.md": 1,
    "docs/geometry.md": 1,
    "docs/how-to/report.md": 1,
    "docs/lpnorm.md": 1,
    "docs/noise.md": 1,
}
# Libraries that only the benchmarks install.
PEERS = ("hessian_eigenthings", "curvlinops")

TASK = """
import torch
from curvdiag import Objective
def objective():
    batch = torch.randn(16, 4), torch.randint(3, (16,))
    return Objective(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), batch)
"""


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with torch.random.fork_rng(devices=[]):
        yield


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.filterwarnings("default::curvdiag.errors.CurvdiagWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=name_of)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(page):
    names, printed, missing = {"__name__": "__main__"}, "", []
    for block in blocks_of(page):
        if block.language != "text" and not block.why:
            try:
                printed = run(block, names, page)
            except ModuleNotFoundError as error:
                if error.name not in PEERS:
                    raise
                missing.append(error.name)
        elif block.follows and not block.why:
            require_same(block.code, printed)
    if missing:
        pytest.skip(f"all blocks ran but those with {', '.join(missing)}: `make bench` installs them")


def test_the_commands_of_the_readme_run():
    """Its blocks of Python are run by test_readme.py; its commands find what such a script leaves."""
    model = nn.Linear(4, 3)
    batch = torch.randn(16, 4), torch.randint(3, (16,))
    with CurvatureMonitor(Objective(model, nn.CrossEntropyLoss(), batch), "run.db", steps=4) as monitor:
        monitor.measure()
    Path("ckpts").mkdir()
    torch.save(model.state_dict(), "ckpts/step1.pt")
    Path("task.py").write_text(TASK)
    commands = [command for block in blocks_of(ROOT / "README.md") if not block.why for command in block.commands]
    assert commands
    for command in commands:
        run_command(re.sub(r"\bTASK\b", "task.py:objective", command).replace("RUN.db", "run.db"))


def test_no_more_blocks_are_left_out_than_are_known():
    left_out = {
        name_of(page): sum(bool(block.why) for block in blocks_of(page)) for page in [*PAGES, ROOT / "README.md"]
    }
    assert {name: count for name, count in left_out.items() if count} == NOT_RUN


def test_every_fence_is_seen():
    for page in [*PAGES, ROOT / "README.md"]:
        fences = re.findall(r"^ *```", page.read_text(), flags=re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of(page)), page


def test_every_command_and_option_that_is_named_exists():
    known = {one.name or one.callback.__name__ for one in curvdiag.cli.app.registered_commands}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    seen = set()
    for page in [*PAGES, ROOT / "README.md"]:
        text = page.read_text()
        inline = re.findall(r"`([^`\n]+)`", text)
        lines = [line.removeprefix("$ ") for block in blocks_of(page) for line in block.code.splitlines()]
        for line in [*inline, *lines]:
            if found := re.match(r"curvdiag ([a-z]+)", line):
                assert found[1] in known, f"{page}: {line}"
                seen.add(found[1])
            if found := re.match(r"make ([a-z-]+)", line):
                assert found[1] in targets, f"{page}: {line}"
    assert seen == known


def test_every_picture_is_shown_somewhere_and_remade_by_make_figures():
    shown = "".join(page.read_text() for page in [*PAGES, ROOT / "README.md"])
    recipe = re.search(r"^figures:.*?\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    makers = {"benchmarks.png": "benchmarks/figure.py"}
    for picture in sorted((ROOT / "figures").glob("*.png")):
        assert f"figures/{picture.name})" in shown, picture.name
        made = makers.get(picture.name, picture.name), f"reproduce {picture.stem} --out figures"
        assert any(one in recipe for one in made), picture.name
