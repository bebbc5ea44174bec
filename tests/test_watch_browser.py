"""The served page follows a run that another process writes, keeps what the user chose, and says when it is alone."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browser, complaints, requests, wait_until
from report_runs import HOSTILE

from curvdiag.record import RunStore
from curvdiag.report.server import PageServer, make_server

__all__ = ["browser"]

WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from report_runs import HOSTILE, record
from curvdiag.record import RunStore
with RunStore(sys.argv[1]) as store:
    run = None
    for line in sys.stdin:  # a step, or the end
        run = run or store.new_run(HOSTILE)
        record(run, int(line), layers=("a", "b"), only=("train/", "curv/hessian"))
        print("recorded", flush=True)
"""


class Writer:
    """Another process that trains: it records a measurement when told a step."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", WRITER, str(path), str(Path(__file__).parent)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def record(self, step: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(step, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "recorded\n"


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    RunStore(tmp_path / "run.db").close()
    return tmp_path / "run.db"


@pytest.fixture
def writer(run_file: Path) -> Iterator[Writer]:
    made = Writer(run_file)
    yield made
    made.process.kill()
    made.process.communicate()


def start(path: Path, port: int = 0) -> PageServer:
    made = make_server(path, port)
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return made


def stop(server: PageServer) -> None:
    server.shutdown()
    server.server_close()


def test_a_run_is_followed_from_its_first_measurement_on_and_the_slider_stays(
    browser: Any, run_file: Path, writer: Writer
) -> None:
    def ask(script: str) -> Any:
        return browser.execute_script(f"return {script}")

    def shown() -> str:
        return str(ask("document.getElementById('where')?.textContent || ''"))

    server = start(run_file)
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(f"http://127.0.0.1:{server.server_port}/")
    wait_until(lambda: "waits for the first" in ask("document.getElementById('status').textContent"))

    writer.record(0)
    wait_until(lambda: shown().startswith("step 0,"))
    assert ask("document.querySelector('h1').textContent") == HOSTILE
    assert ask("document.getElementById('status').hidden")
    for step in (20, 40, 60):
        writer.record(step)
    wait_until(lambda: shown().startswith("step 60,"))  # at its end the slider follows
    assert ask("document.getElementById('time').max") == "3"

    ask("document.getElementById('time').focus()")
    browser.execute_script("time.value = 1; document.getElementById('time').dispatchEvent(new Event('input'))")
    browser.execute_script("document.querySelector('#trace details').open = true")
    assert shown().startswith("step 20,")
    heatmap = ask("document.getElementById('chart-heatmap').dataset.mark = 'the same'")
    writer.record(80)
    wait_until(lambda: ask("document.getElementById('time').max") == "4")
    assert shown().startswith("step 20,")  # where the user put it
    assert ask("document.activeElement.id") == "time"
    wait_until(lambda: len(ask("document.getElementById('chart-heatmap').data[0].x")) == 5)
    assert ask("document.getElementById('chart-heatmap').dataset.mark") == heatmap
    wait_until(lambda: ask("document.querySelectorAll('#trace tbody tr').length") == 5)
    assert ask("document.querySelector('#trace details').open")

    port = server.server_port
    assert complaints(browser) == []
    assert {one.split("?")[0] for one in requests(browser) if not one.startswith("data:")} == {
        f"http://127.0.0.1:{port}/",
        f"http://127.0.0.1:{port}/data",
    }

    stop(server)
    wait_until(lambda: "connection is lost" in ask("document.getElementById('status').textContent"))
    assert not ask("document.getElementById('status').hidden")
    assert shown().startswith("step 20,")
    writer.record(100)
    server = start(run_file, port)
    wait_until(lambda: ask("document.getElementById('time').max") == "5")
    wait_until(lambda: ask("document.getElementById('status').hidden"))
    assert shown().startswith("step 20,")
    stop(server)
