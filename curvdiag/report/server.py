"""The page served on the loopback address, with the data of a run that goes on."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from curvdiag.errors import ArgumentError, CurvdiagError
from curvdiag.record import RunStore
from curvdiag.report.contents import filled, run_bundle, summary
from curvdiag.report.encoding import script_json
from curvdiag.report.page import page, plotly_script, policy

ADDRESS = "127.0.0.1"
PORT = 8642


def serve(
    path: str | os.PathLike[str], port: int = PORT, *, ready: Callable[[str], None] = lambda address: None
) -> None:
    """Serve the page of a run file on 127.0.0.1 until interrupted, and follow the run while it goes on.

    The file is only read. A file without a measurement is waited for; it must exist.

    Args:
        path: The run file.
        port: Where to listen; 0 for any free one.
        ready: Called with the address of the page when it can be opened.

    Raises:
        StoreError: The run file is missing, damaged or no run file.
        ArgumentError: The port is taken, or none.
        MissingExtraError: plotly is not installed.
    """
    with make_server(path, port) as server:
        try:
            ready(f"http://{ADDRESS}:{server.server_port}/")
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            pass


def make_server(path: str | os.PathLike[str], port: int = PORT) -> PageServer:
    """The server of :func:`serve`, listening and not yet answering."""
    plotly_script()
    store = RunStore(path, readonly=True)
    try:
        store.runs()
        return PageServer(store, port)
    except BaseException:
        store.close()
        raise


class PageServer(ThreadingHTTPServer):
    """Answers for one run file. A new one is a new server."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, store: RunStore, port: int) -> None:
        self.store, self.lock = store, threading.Lock()
        try:
            super().__init__((ADDRESS, port), Handler)
        except (OSError, OverflowError) as error:
            raise ArgumentError(refusal(port, error)) from error
        self.page = page(store.path.name, None, live=True).encode()
        self.policy = policy(live=True) + "; frame-ancestors 'none'"
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}
        if self.server_port == 80:
            self.hosts |= {ADDRESS, "localhost"}
        self._latest: tuple[str, str, bytes] | None = None

    def data(self, run: str | None, have: str | None) -> bytes:
        """What is new since the version that a page has: JSON.

        One answer is kept, so that several pages cost one reading of the file.
        """
        with self.lock:
            version = self.version()
            if version == have:
                return script_json({"version": version}).encode()
            if self._latest is None or self._latest[:2] != (version, run or ""):
                answer = script_json({"version": version, "data": self._bundle(run)}).encode()
                self._latest = version, run or "", answer
            return self._latest[2]

    def version(self) -> str:
        """Changes whenever the file does."""
        stamps = []
        for path in (self.store.path, Path(f"{self.store.path}-wal")):
            try:
                found = path.stat()
                stamps.append(f"{found.st_ino}.{found.st_size}.{found.st_mtime_ns}")
            except OSError:
                stamps.append("")
        return "-".join(stamps)

    def _bundle(self, run: str | None) -> dict[str, Any]:
        """One run, the latest if none is named; no run, where nothing was measured so far."""
        store = self.store
        infos = [info for info in store.runs() if filled(store, info)]
        named = [info for info in infos if str(info.id) == run]
        shown = named or infos[-1:]
        return {
            "file": store.path.name,
            "runs": [summary(info) for info in infos],
            "left_out": 0,
            "chosen": shown[0].id if shown else None,
            "held": {str(info.id): run_bundle(store, info) for info in shown},
        }

    def server_close(self) -> None:
        super().server_close()
        self.store.close()


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the page and its data, asked for under the server's own name; nothing else."""

    server: PageServer
    timeout = 30  # of a connection that sends nothing
    server_version, sys_version = "curvdiag", ""

    def do_GET(self) -> None:
        # A name that another site had resolve to this machine (DNS rebinding) would lend it our answers.
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            return self._refuse(HTTPStatus.FORBIDDEN, "this address is not the server's own")
        asked = urlsplit(self.path)
        if asked.path == "/":
            return self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
        if asked.path != "/data":
            return self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here but the page")
        query = parse_qs(asked.query)
        try:
            found = self.server.data(query.get("run", [None])[0], query.get("have", [None])[0])
        except CurvdiagError as error:
            answer = script_json({"error": " ".join(str(error).split())}).encode()
            return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "application/json", answer)
        return self._answer(HTTPStatus.OK, "application/json", found)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.close_connection = True  # what else was sent is not read
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "GET and HEAD only")

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = do_POST

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._answer(status, "text/plain; charset=utf-8", f"{why}\n".encode())

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            try:
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):  # the page was closed meanwhile
                self.close_connection = True

    def end_headers(self) -> None:
        for name, value in {**HEADERS, "Content-Security-Policy": self.server.policy}.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """A request every two seconds is no news."""


HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def refusal(port: int, error: Exception) -> str:
    """Why a port cannot be had, and what to do."""
    remedy = "give another one, or 0 for any that is free (curvdiag watch --port 0)"
    if isinstance(error, OverflowError):
        return f"a port is a number from 0 to 65535, not {port}"
    if getattr(error, "errno", None) == errno.EADDRINUSE:
        return f"port {port} of {ADDRESS} is taken, perhaps by another curvdiag watch: {remedy}"
    return f"cannot listen on port {port} of {ADDRESS} ({getattr(error, 'strerror', None) or error}): {remedy}"
