"""The server answers for one run file, to its own page on this machine, and only in reading."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_runs import HOSTILE, full, small

from curvdiag.errors import ArgumentError
from curvdiag.record import RunStore
from curvdiag.report import bundle
from curvdiag.report.server import PageServer, make_server


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return small(tmp_path / "run.db", "first", HOSTILE)


@pytest.fixture
def server(run_file: Path) -> Iterator[PageServer]:
    with make_server(run_file, 0) as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield made
        made.shutdown()


class Answer:
    def __init__(self, server: PageServer, path: str = "/", method: str = "GET", host: str | None = None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        connection.request(method, path, headers={} if host is None else {"Host": host})
        found = connection.getresponse()
        self.status, self.headers, self.body = found.status, dict(found.getheaders()), found.read()
        connection.close()

    @property
    def json(self) -> dict:  # type: ignore[type-arg]
        return dict(json.loads(self.body))


def test_the_page_is_the_reports_with_its_own_policy(server: PageServer) -> None:
    page = Answer(server)
    assert page.status == 200
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert policy.endswith("connect-src 'self'; frame-ancestors 'none'")
    assert "unsafe-inline' 'sha" not in policy
    assert len(re.findall(rb"<script>", page.body)) == policy.count("'sha256-")
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["X-Frame-Options"] == "DENY"
    assert page.headers["Cache-Control"] == "no-store"
    assert page.headers["Referrer-Policy"] == "no-referrer"
    assert page.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in page.headers


def test_the_data_are_those_of_the_report_for_the_run_asked_for(server: PageServer, run_file: Path) -> None:
    with RunStore(run_file, readonly=True) as store:
        wanted = bundle(store, 1)["held"]["1"]
    latest, first = Answer(server, "/data").json, Answer(server, "/data?run=1").json
    assert latest["data"]["chosen"] == 2
    assert first["data"]["held"] == {"1": wanted}
    assert [one["name"] for one in first["data"]["runs"]] == ["first", HOSTILE]
    assert b"<" not in Answer(server, "/data").body


def test_what_a_page_has_is_not_sent_again_and_what_is_new_is(server: PageServer, run_file: Path) -> None:
    version = Answer(server, "/data").json["version"]
    assert Answer(server, f"/data?have={version}").json == {"version": version}
    with RunStore(run_file) as store:
        run = store.resume()
        run.record(30, {"train/loss": 0.5})
        added = Answer(server, f"/data?have={version}").json
        assert added["data"]["held"]["2"]["measurements"] == 4
        run.record(30, {"val/accuracy": 0.5}, keep=True)  # beside what is there
        beside = Answer(server, f"/data?have={added['version']}").json
    assert "val/accuracy" in [one["name"] for one in beside["data"]["held"]["2"]["scalars"]]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "localhost:1", "[::1]:{port}", " "]
)
def test_a_foreign_name_for_this_machine_is_refused(server: PageServer, host: str) -> None:
    for path in ("/", "/data", "/else"):
        found = Answer(server, path, host=host.format(port=server.server_port))
        assert found.status == 403
        assert b"script" not in found.body


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LocalHost"])
def test_its_own_names_are_answered(server: PageServer, name: str) -> None:
    assert Answer(server, host=f"{name}:{server.server_port}").status == 200


def test_a_request_without_a_host_is_refused(server: PageServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b" 403 " in connection.makefile("rb").readline()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_it_only_reads(server: PageServer, method: str) -> None:
    found = Answer(server, "/data", method)
    assert found.status == 405
    assert found.headers["Allow"] == "GET, HEAD"
    assert "Content-Security-Policy" in found.headers


def test_head_is_get_without_the_body(server: PageServer) -> None:
    for path in ("/", "/data", "/else"):
        get, head = Answer(server, path), Answer(server, path, "HEAD")
        assert head.status == get.status
        assert head.body == b""
        assert head.headers["Content-Length"] == get.headers["Content-Length"] == str(len(get.body))


@pytest.mark.parametrize(
    "path", ["/run.db", "/../run.db", "/..%2frun.db", "//etc/passwd", "/data/", "/index.html", "/page.js"]
)
def test_there_is_nothing_but_the_page(server: PageServer, path: str) -> None:
    found = Answer(server, path)
    assert found.status == 404
    assert b"root" not in found.body
    assert b"SQLite" not in found.body


def test_no_question_names_another_file_or_run(server: PageServer) -> None:
    for query in ("run=/etc/passwd", "run=1%20OR%201=1", "file=/etc/passwd", "run=" + "9" * 400):
        assert Answer(server, f"/data?{query}").json["data"]["chosen"] == 2


def test_a_file_that_goes_away_is_an_error_of_the_page_alone(server: PageServer, run_file: Path) -> None:
    moved = run_file.rename(run_file.with_name("moved.db"))
    lost = Answer(server, "/data")
    assert lost.status == 503
    assert "run.db" in lost.json["error"]
    moved.rename(run_file)
    assert Answer(server, "/data").status == 200


def test_a_file_without_a_measurement_is_waited_for(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run.db") as store, make_server(tmp_path / "run.db", 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        empty = Answer(server, "/data").json
        assert (empty["data"]["chosen"], empty["data"]["held"]) == (None, {})
        store.new_run("a").record(0, {"train/loss": 1.0})
        assert Answer(server, f"/data?have={empty['version']}").json["data"]["chosen"] == 1
        server.shutdown()


def test_it_listens_to_this_machine_alone_and_only_reads_the_file(server: PageServer, run_file: Path) -> None:
    assert server.server_address[0] == "127.0.0.1"
    before = run_file.read_bytes(), run_file.stat().st_mtime_ns, sorted(run_file.parent.iterdir())
    Answer(server, "/data")
    assert (run_file.read_bytes(), run_file.stat().st_mtime_ns, sorted(run_file.parent.iterdir())) == before


def test_a_port_that_cannot_be_had_is_named(server: PageServer, run_file: Path) -> None:
    with pytest.raises(ArgumentError, match=rf"port {server.server_port} of 127.0.0.1 is taken.*--port 0"):
        make_server(run_file, server.server_port)
    with pytest.raises(ArgumentError, match="from 0 to 65535, not 70000"):
        make_server(run_file, 70_000)


def test_the_command_says_where_and_ctrl_c_ends_it_cleanly(run_file: Path) -> None:
    command = [sys.executable, "-u", "-m", "curvdiag.cli", "watch", str(run_file), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
        assert address
        connection = http.client.HTTPConnection("127.0.0.1", int(address.group(1)), timeout=30)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, error) == (0, "stopped\n", "")


def test_the_page_of_a_long_run_is_answered_from_one_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from curvdiag.report import server as module

    read = []
    original = module.run_bundle
    monkeypatch.setattr(module, "run_bundle", lambda *given: (read.append(1), original(*given))[1])
    with make_server(full(tmp_path / "run.db", times=2), 0) as server:
        answers = {server.data(None, None) for _ in range(3)}
    assert (len(answers), len(read)) == (1, 1)
