"""Running a script on several ranks, with gloo, under torchrun; what each of them saved."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

HEAD = """
import datetime, os, sys, warnings
import torch
import torch.distributed as dist

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds={timeout}))
rank, world = dist.get_rank(), dist.get_world_size()
folder = {folder!r}
saved = {{}}
"""

TAIL = """
torch.save(saved, os.path.join(folder, f"saved-{rank}.pt"))
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # gloo now and then aborts a process whose mesh or model holds a group while the interpreter is taken apart
"""


def launch(script: str, world: int, folder: Path, *, timeout: float = 60, limit: float = 280) -> list[dict[str, Any]]:
    """Run ``script`` on ``world`` ranks and return what each has put into its dictionary ``saved``.

    The script knows ``rank``, ``world``, ``folder``, ``saved``, ``torch``, ``dist``, ``os``, ``sys`` and ``warnings``,
    and can import the modules of ``tests``.

    Args:
        folder: Where the script and what it saves are put; ``tmp_path``.
        timeout: Of the process group, in seconds.
        limit: Seconds after which a run that hangs is ended.

    Raises:
        AssertionError: A rank ended with an error; with what it printed.
    """
    done = started(script, world, folder, timeout=timeout, limit=limit)
    assert done.returncode == 0, done.stdout[-6000:]
    return [torch.load(folder / f"saved-{rank}.pt", weights_only=False) for rank in range(world)]


def started(
    script: str, world: int, folder: Path, *, timeout: float = 60, limit: float = 280
) -> subprocess.CompletedProcess[str]:
    """The finished run of ``script``, whatever its end was; output and errors together in ``stdout``."""
    here = Path(__file__).parent
    file = folder / "script.py"
    head = HEAD.format(folder=str(folder), timeout=timeout)
    file.write_text(head + textwrap.dedent(script) + TAIL)
    paths = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", str(file)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
        check=False,
    )
