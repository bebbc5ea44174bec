"""Free memory is what the tightest limit leaves, and sizes are written for readers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from curvdiag import memory
from curvdiag.memory import _container_available, free_bytes, human_bytes

GB = 10**9
Tree = Callable[..., int | None]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """What a fake tree of control groups leaves: ``{folder: (limit, use, droppable)}`` and lines of membership."""

    def available(groups: dict[str, tuple[object, int, int]], *lines: str) -> int | None:
        root = tmp_path / "cgroup"
        for folder, (limit, use, droppable) in groups.items():
            group = root / folder
            group.mkdir(parents=True, exist_ok=True)
            old = folder.startswith("memory")
            (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(f"{limit}\n")
            (group / ("memory.usage_in_bytes" if old else "memory.current")).write_text(f"{use}\n")
            key = "total_inactive_file" if old else "inactive_file"
            (group / "memory.stat").write_text(f"anon {use}\n{key} {droppable}\nslab 5\n")
        (tmp_path / "membership").write_text("".join(f"{line}\n" for line in lines))
        return _container_available(tmp_path / "membership", root)

    return available


def test_a_container_with_its_own_namespace_has_its_limit_at_the_root(tree: Tree) -> None:
    assert tree({"": (8 * GB, 5 * GB, 2 * GB)}, "0::/") == 5 * GB


@pytest.mark.parametrize(
    ("job", "step", "left"),
    [((4 * GB, GB, 0), ("max", GB, 0), 3 * GB), ((64 * GB, GB, 0), (2 * GB, GB, GB // 2), 3 * GB // 2)],
)
def test_without_a_namespace_the_tightest_limit_along_the_path_holds(
    tree: Tree, job: tuple[object, int, int], step: tuple[object, int, int], left: int
) -> None:
    groups = {
        "system.slice": (100 * GB, 10 * GB, 0),
        "system.slice/job_7": job,
        "system.slice/job_7/step_0": step,
        "system.slice/job_8": (1000, 1000, 0),  # another's
    }
    assert tree(groups, "0::/system.slice/job_7/step_0") == left


def test_version_1_names_the_memory_controllers_path_on_a_line_of_its_own(tree: Tree) -> None:
    groups = {
        "memory": (1 << 63, 9 * GB, 0),
        "memory/slurm/job_7": (6 * GB, 2 * GB, GB),
        "memory/slurm": (50 * GB, 9 * GB, 0),
        "memory/other": (1000, 1000, 0),
    }
    lines = ("5:cpuset:/other", "4:memory:/slurm/job_7", "1:name=systemd:/other", "0::/")
    assert tree(groups, *lines) == 5 * GB


def test_both_versions_at_once_count(tree: Tree) -> None:
    groups = {"memory/a": (6 * GB, GB, 0), "unified/b": (3 * GB, GB, 0)}
    assert tree(groups, "4:memory:/a", "0::/b") == 2 * GB
    assert tree({"memory/a": (2 * GB, GB, 0)}, "4:memory:/a", "0::/b") == GB


def test_a_path_that_is_not_there_leaves_the_root(tree: Tree) -> None:
    # A container of version 1 sees its own group at the root, and the host's path of it.
    groups = {"memory": (4 * GB, GB, 0)}
    assert tree(groups, "4:memory:/docker/abc", "0::/") == 3 * GB
    assert tree(groups, "4:memory:/../../outside") == 3 * GB
    assert tree(groups) == 3 * GB
    assert tree(groups, "what is this") == 3 * GB


def test_no_limit_is_none_and_an_exceeded_one_leaves_nothing(tree: Tree, tmp_path: Path) -> None:
    assert tree({"": ("max", GB, 0), "a": ("max", GB, 0)}, "0::/a") is None
    assert tree({"a": (GB, 2 * GB, 0)}, "0::/a") == 0
    assert _container_available(tmp_path / "missing", tmp_path / "nowhere") is None


def test_free_bytes_of_the_cpu_is_the_least_of_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_bytes("cpu") < total
    for system, container, free in ((7, 5, 5), (5, 7, 5), (None, 7, 7), (7, None, 7), (7, 0, 0), (None, None, 4 << 30)):
        monkeypatch.setattr(memory, "_system_available", lambda n=system: n)
        monkeypatch.setattr(memory, "_container_available", lambda n=container: n)
        assert free_bytes("cpu") == free


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1 KB"),
        (1536, "1.54 KB"),
        (999_400, "999 KB"),
        (999_900, "1 MB"),
        (4 * 11_173_962**2, "499 TB"),
        (4.2e15, "4.2 PB"),
        (1.2345e18, "1,234 PB"),
    ],
)
def test_sizes_have_three_digits_and_the_unit_that_fits(count: float, text: str) -> None:
    assert human_bytes(count) == text
