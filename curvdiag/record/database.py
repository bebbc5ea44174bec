"""The SQLite file under a run store: how it is opened, written, read and closed without harm.

Journal: write-ahead (WAL) where the file system carries it, a rollback journal elsewhere. Both commit with
``synchronous=FULL``, so that a finished transaction survives a killed process and a power cut. The
write-ahead log is folded into the file after every transaction, so that the file by itself is complete even
where a batch system kills the run, and at closing the file returns to a rollback journal: a closed file has
no side files, and reading it makes none.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from curvdiag.errors import StoreError, UnwritableStoreError
from curvdiag.record.schema import check, create, mark

logger = logging.getLogger(__name__)

BUSY_SECONDS = 10.0

# Memory shared between processes does not reach over a network, and the write-ahead log needs it.
NETWORK_FILE_SYSTEMS = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "pvfs2",
    "orangefs", "afs", "9p", "virtiofs", "wekafs", "panfs", "fuse.sshfs", "fuse.glusterfs", "fuse.juicefs",
    "fuse.s3fs", "fuse.gcsfuse", "fuse.ceph", "fuse.ceph-fuse", "fuse.rclone",
}  # fmt: skip

_of_another_process: list[sqlite3.Connection] = []


class Database:
    """One run file. A writer keeps one connection for all threads; a reader opens one for each read.

    A reader between two reads therefore holds no lock, and never keeps a writer from tidying up at its end.

    Raises:
        StoreError: The file cannot be opened, is not a run file, or is from a newer curvdiag.
    """

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False):
        self.path = Path(path).expanduser().absolute()
        self.readonly = readonly
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._closed = False
        if self.path.is_dir():
            raise StoreError(f"{self.path} is a folder; give the path of a run file, e.g. {self.path / 'run.db'}")
        if not self.path.parent.is_dir():
            raise StoreError(f"cannot open {self.path}: the folder {self.path.parent} does not exist; create it first")
        if readonly:
            if not self.path.exists():
                raise StoreError(f"there is no run file {self.path}")
            with self.reading():
                pass
            return
        with translated(self.path, "open"):
            connection = connect(self.path, "rwc")
            try:
                with transaction(connection, "BEGIN"):  # one moment: another process may be making the tables
                    check(connection, self.path, new_allowed=True)
                self.journal = prepare(connection, self.path)
            except BaseException:
                connection.close()
                raise
        self._connection = connection
        # Also runs at the end of the interpreter, for scripts that forget to close.
        self._finalizer = weakref.finalize(self, tidy_close, connection, self.path, os.getpid())

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection inside one read transaction: all its queries see one moment."""
        with self._lock, translated(self.path, "read"):
            if self._closed:
                raise StoreError(f"the run file {self.path} has been closed; open it again to read")
            if self._connection is not None:
                with transaction(self._connection, "BEGIN"):
                    yield self._connection
                return
            connection = connect_reader(self.path)
            try:
                with transaction(connection, "BEGIN"):
                    check(connection, self.path, new_allowed=False)
                    yield connection
            finally:
                connection.close()

    @contextmanager
    def writing(self, doing: str) -> Iterator[sqlite3.Connection]:
        """A connection inside one write transaction, committed at the end or rolled back as a whole."""
        if self.readonly:
            raise StoreError(f"cannot {doing}: {self.path} was opened with readonly=True")
        with self._lock, translated(self.path, doing):
            if self._connection is None or self._closed:
                raise StoreError(f"cannot {doing}: the run file {self.path} has been closed; open it again")
            with transaction(self._connection, "BEGIN IMMEDIATE"):
                yield self._connection

    def close(self) -> None:
        """Fold the write-ahead log into the file and remove it; harmless when repeated."""
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection = None
                self._finalizer()


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection in autocommit mode (transactions are ours), usable from any thread under a lock."""
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def connect_reader(path: Path) -> sqlite3.Connection:
    """A read-only connection.

    A killed writer that used a rollback journal may leave half a transaction in the file. Only undoing it
    makes the file readable, so the reader then opens it for writing and lets SQLite do that, which first
    makes sure by its locks that the writer is dead. And where nothing may be written beside a file that
    was left in WAL mode, SQLite must be told that nobody is writing.
    """
    connection = connect(path, "ro")
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        refused = primary_code(error) in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
        if refused and Path(f"{path}-journal").exists():
            return connect(path, "rw")
        if not refused or Path(f"{path}-wal").exists():
            raise
        connection = connect(path, "ro&immutable=1")
    except BaseException:
        connection.close()
        raise
    return connection


def prepare(connection: sqlite3.Connection, path: Path) -> str:
    """Choose the journal, create the tables where there are none, and return the journal mode in use."""
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 1")
    journal, reason = "delete", f"{path.parent} is on a network file system ({network_file_system(path)})"
    if network_file_system(path) is None:
        try:
            (journal,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            reason = "the file system does not allow it"
            if journal == "wal":
                try_write(connection, path)
                return journal
        except sqlite3.OperationalError as error:
            # A mode that is granted may still fail at the first write, where shared memory is missing.
            if primary_code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY):
                raise
            reason = str(error)
    logger.info("%s uses a rollback journal instead of a write-ahead log: %s", path, reason)
    (journal,) = connection.execute("PRAGMA journal_mode = DELETE").fetchone()
    try_write(connection, path)
    return journal


def try_write(connection: sqlite3.Connection, path: Path) -> None:
    """A real write: the tables of a new file, or the version of an old one over itself."""
    with transaction(connection, "BEGIN IMMEDIATE"):
        # Asked again under the lock: another process may have made the tables meanwhile.
        if not check(connection, path, new_allowed=True):
            create(connection)
        mark(connection)


def tidy_close(connection: sqlite3.Connection, path: Path, owner: int) -> None:
    """Leave one file with no others beside it, unless another process still has it open."""
    if os.getpid() != owner:
        # A forked child would drop its parent's locks by closing; keep the object alive instead.
        _of_another_process.append(connection)
        return
    deadline = time.monotonic() + 0.5
    while True:
        try:
            connection.execute("PRAGMA journal_mode = DELETE").fetchone()
            break
        except sqlite3.OperationalError as error:
            if primary_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                logger.info("%s keeps its write-ahead log at closing: %s", path, error)
                break
            time.sleep(0.02)
        except sqlite3.Error as error:
            logger.info("%s could not be tidied at closing: %s", path, error)
            break
    connection.close()


@contextmanager
def transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some failures, a full disk among them, may have rolled back already
            connection.execute("ROLLBACK")
        raise


@contextmanager
def translated(path: Path, doing: str) -> Iterator[None]:
    """Failures of SQLite and of the file system, as a StoreError that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        damaged = primary_code(error) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
        kind = StoreError if damaged else UnwritableStoreError
        raise kind(f"cannot {doing} {path}: {error}{remedy(error)}") from error
    except OSError as error:
        raise UnwritableStoreError(f"cannot {doing} {path}: {error.strerror or error}") from error


REMEDIES = {
    sqlite3.SQLITE_FULL: "the disk is full or a quota used up; what was recorded is safe, free some space",
    sqlite3.SQLITE_IOERR: "the disk may be full or failing; what was recorded is safe",
    sqlite3.SQLITE_READONLY: "the file or its folder is read-only; change its permissions, or open it with "
    "readonly=True to read",
    sqlite3.SQLITE_CANTOPEN: "check that the file and its folder may be written to",
    sqlite3.SQLITE_PERM: "check that the file and its folder may be written to",
    sqlite3.SQLITE_BUSY: f"another process has held it for more than {BUSY_SECONDS:.0f} s",
    sqlite3.SQLITE_NOTADB: "this is not a run file of curvdiag",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; restore a copy, or use .recover of the sqlite3 shell",
}


def remedy(error: sqlite3.Error) -> str:
    found = REMEDIES.get(primary_code(error))
    return f" ({found})" if found else ""


def primary_code(error: sqlite3.Error) -> int:
    """SQLite's result code without its extension; -1 for errors of the Python layer."""
    code = getattr(error, "sqlite_errorcode", None)
    return -1 if code is None else code & 0xFF


def network_file_system(path: Path) -> str | None:
    """Type of the network file system that holds ``path``, or None (local, or not known on this system)."""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        folder = str(path.parent.resolve())
    except OSError:
        return None
    best, kind = "", ""
    for line in mounts:
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        inside = folder == point or folder.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, found
    return kind if kind in NETWORK_FILE_SYSTEMS else None
