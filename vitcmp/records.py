"""Records: one JSON line for every attempt, in an append-only store that survives kill -9 and a full disk."""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from vitcmp.schema import FINAL, METHOD_VERSION, SCHEMA, STATUSES, Record, validate_record

__all__ = [
    "FINAL",
    "METHOD_VERSION",
    "SCHEMA",
    "STATUSES",
    "Record",
    "RecordError",
    "RecordStore",
    "latest",
    "validate_record",
]


class RecordError(ValueError):
    """A record, or its file, cannot be read or written; the message says where, and what was kept."""


class RecordStore:
    """The records in a folder. Any number of processes may append to `path`; other `*.jsonl` files are only read.

    They are of one `schema`, and `validate` returns the faults of one of them. `notes` says what `load` set aside or
    passed over.
    """

    def __init__(
        self, folder: str | Path, *, schema: str = SCHEMA, validate: Callable[[Record], list[str]] = validate_record
    ) -> None:
        self.folder, self.schema, self.validate = Path(folder), schema, validate
        self.path = self.folder / "records.jsonl"
        self.notes: list[str] = []

    def open(self) -> "RecordStore":
        """Makes the folder, and checks that records can be written to it. Raises RecordError."""
        try:
            _make_folder(self.folder)
        except (FileExistsError, NotADirectoryError):
            raise RecordError(
                f"{_first_file(self.folder)} is a file: {self.folder} cannot be a folder for records"
            ) from None
        except OSError as error:
            raise RecordError(f"cannot make the folder {self.folder}: {error.strerror}") from error
        self.check_writable()
        return self

    def check_writable(self) -> None:
        """Raises RecordError where a record could not be written now: a read-only folder or file, a full disk."""
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(b" " * 4096)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                os.close(os.open(self.path, os.O_RDWR | os.O_APPEND))
        except OSError as error:
            raise RecordError(f"cannot write records to {self.path}: {error.strerror}") from error

    def load(self) -> list[Record]:
        """Returns the records of every `*.jsonl` under the folder, sorted by path, this store's own last.

        A torn last line, as kill -9 or a power cut leaves it, is no record; in this store's own file it is moved to
        `records.torn-<n>`. Raises RecordError, naming file and line, for any other line that is not a good record.
        """
        found = (path for path in self.folder.rglob("*.jsonl") if path.is_file())
        paths = sorted(found, key=lambda path: (path == self.path, path))
        records = [record for path in paths for record in self._read(path)]
        if self.path in paths:  # only now: a file of something else is left alone
            self._set_torn_line_aside()
        return records

    def append(self, record: Record) -> None:
        """Appends one line and waits until it is on the disk.

        Raises RecordError where it cannot; the file is then as it was before, and the record is kept in another file,
        which the message names.
        """
        try:
            if faults := self.validate(record):
                raise RecordError(f"not a valid record: {'; '.join(faults)}")
            line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
            is_new = not self.path.exists()
            with _locked(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as descriptor:
                self._repair(descriptor)
                _write_whole(descriptor, line)
            if is_new:
                _sync_folder(self.folder)
        except (OSError, RecordError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise RecordError(f"cannot append to {self.path}: {reason}. {_keep_elsewhere(record)}") from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for one sweep. Raises RecordError, naming the holder, where another has it.

        The kernel lets go when the holder dies, however it dies, so the file may stay.
        """
        path = self.folder / ".lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise RecordError(f"cannot lock {self.folder}: {error.strerror}") from error
        try:
            _lock_or_explain(descriptor, self.folder)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def _set_torn_line_aside(self) -> None:
        try:
            with _locked(self.path, os.O_RDWR | os.O_APPEND) as descriptor:
                self._repair(descriptor)
        except OSError as error:  # such as a folder that is only there to be read
            self.notes.append(f"{self.path}: its last line was not checked ({error.strerror})")

    def _repair(self, descriptor: int) -> None:
        """Moves a torn last line to `records.torn-<n>`: under the lock nobody is still writing it."""
        start, line = _last_line(descriptor)
        if not line.strip() or (line.endswith(b"\n") and _parse(line) is not None):
            return
        if _parse(line) is not None:  # whole but for the newline
            _write_whole(descriptor, b"\n")
            return
        aside = _write_aside(self.folder, line)
        os.ftruncate(descriptor, start)
        os.fsync(descriptor)
        self.notes.append(f"{self.path}: a torn last line of {len(line)} bytes was moved to {aside}")

    def _read(self, path: Path) -> Iterator[Record]:
        try:
            with _locked(path, os.O_RDONLY) as descriptor, open(descriptor, "rb", closefd=False) as file:
                lines = file.read().split(b"\n")
        except OSError as error:
            raise RecordError(f"cannot read {path}: {error.strerror}") from error
        last = max((i for i, line in enumerate(lines, start=1) if line.strip()), default=0)
        for i, line in enumerate(lines[:last], start=1):
            record = _parse(line)
            if record is not None and path != self.path and self._is_of_another_kind(record):
                self.notes.append(f"{path}: passed over, its schema is {record['schema']!r}")
                return
            if record is not None:
                yield self._checked(record, f"{path}:{i}")
            elif i == last:
                self.notes.append(f"{path}:{i}: a torn last line of {len(line)} bytes was passed over")
            elif line.strip():
                raise RecordError(f"{path}:{i}: not a JSON object: {line[:60]!r}")

    def _checked(self, record: Record, where: str) -> Record:
        if record.get("schema") != self.schema:
            raise RecordError(
                f"{where}: schema is {record.get('schema')!r}, expected {self.schema!r}; "
                "move the file out of the folder"
            )
        if faults := self.validate(record):
            raise RecordError(f"{where}: {'; '.join(faults)}")
        return record

    def _is_of_another_kind(self, record: Record) -> bool:
        """Says whether the record is vitcmp's, and no other version of these: an experiment's, in a folder below."""
        name = str(record.get("schema")).partition("/")[0]
        return name.startswith("vitcmp-") and name != self.schema.partition("/")[0]


def latest(records: list[Record]) -> dict[tuple[str, int], Record]:
    """Returns the last record of every (case id, run)."""
    return {(record["case_id"], record["run"]): record for record in records}


def _parse(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except ValueError:  # also bytes that are not UTF-8
        return None
    return value if isinstance(value, dict) else None


@contextlib.contextmanager
def _locked(path: Path, flags: int) -> Iterator[int]:
    """Opens the file and holds it against other processes that do the same."""
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock_or_explain(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
        raise RecordError(
            f"another sweep (pid {pid}) is writing to {folder}; wait for it, or give another --out"
        ) from None


def _write_whole(descriptor: int, line: bytes) -> None:
    """Writes the line and waits for the disk; after a failure the file ends where it did before."""
    end, written = os.fstat(descriptor).st_size, 0
    try:
        while written < len(line):
            written += os.write(descriptor, line[written:])
        os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):  # what cannot be cut off is a torn line, which the next append sets aside
            os.ftruncate(descriptor, end)
            os.fsync(descriptor)
        raise


def _last_line(descriptor: int, block: int = 1 << 16) -> tuple[int, bytes]:
    """Returns where the last line starts, and the line, read backwards from the end."""
    end = start = os.fstat(descriptor).st_size
    tail = b""
    while start > 0:
        size = min(block, start)
        start -= size
        tail = os.pread(descriptor, size, start) + tail
        newline = tail.rfind(b"\n", 0, -1)
        if newline >= 0:
            return start + newline + 1, tail[newline + 1 :]
    return end - len(tail), tail


def _write_aside(folder: Path, line: bytes) -> Path:
    """Writes the line to the first free `records.torn-<n>`."""
    n = 1
    while True:
        path = folder / f"records.torn-{n}"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            n += 1
            continue
        try:
            _write_whole(descriptor, line)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        return path


def _keep_elsewhere(record: Record) -> str:
    """Writes the record to the folder for temporary files and says where; gives it in the message where that fails."""
    text = json.dumps(record, default=repr, skipkeys=True)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="vitcmp-", suffix=".jsonl", delete=False) as file:
            file.write(text + "\n")
        return f"The record is kept in {file.name}: move it into the folder once there is room"
    except OSError:
        return f"The record could not be kept anywhere else; here it is: {text}"


def _make_folder(folder: Path) -> None:
    """Makes the folder and its parents, each of them on the disk before the next."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no fsync for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_file(path: Path) -> Path:
    return next(
        candidate for candidate in reversed([path, *path.parents]) if candidate.exists() and not candidate.is_dir()
    )
