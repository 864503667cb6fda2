"""Random access to TFRecord files, TFDS's default format, without TensorFlow.

A record is its length (uint64, little-endian), a checksum of that, the bytes, and a checksum of those (4 bytes each);
the checksums are not looked at, the number of records of each file is. TFDS parses the bytes in numpy.
"""

import bisect
import itertools
import mmap
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = struct.Struct("<Q")
BEFORE, AFTER = 12, 4  # bytes around a record's own


class TFRecords:
    """The records of some files, in order; `parts` are TFDS's FileInstructions: filename, skip, take and num_records.

    A file is indexed when it is first read. Raises ValueError for one that is cut off or has another number of records.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = list(parts)
        self._ends = list(itertools.accumulate(_num_taken(part) for part in parts))
        self._files: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        which = bisect.bisect_right(self._ends, index)
        file, offsets = self._open(which)
        first = self._ends[which - 1] if which else 0
        offset = int(offsets[self._parts[which].skip + index - first])
        (length,) = LENGTH.unpack_from(file, offset)
        return file[offset + BEFORE : offset + BEFORE + length]

    def _open(self, which: int) -> tuple[mmap.mmap, np.ndarray]:
        with self._lock:
            if which not in self._files:
                part = self._parts[which]
                self._files[which] = open_file(Path(part.filename), part.examples_in_shard)
            return self._files[which]


def open_file(path: Path, num_records: int) -> tuple[mmap.mmap, np.ndarray]:
    """Returns the file and the offset of each of its records. Raises ValueError where it has another number of them."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    offsets: list[int] = []
    offset = 0
    while offset < len(mapped):
        end = offset + BEFORE + AFTER
        end += LENGTH.unpack_from(mapped, offset)[0] if end <= len(mapped) else 0
        if end > len(mapped):
            raise ValueError(f"{path} is cut off in record {len(offsets)}: prepare the dataset again")
        offsets.append(offset)
        offset = end
    if len(offsets) != num_records:
        raise ValueError(f"{path} has {len(offsets)} records, its dataset_info.json says {num_records}")
    return mapped, np.array(offsets, np.int64)


def _num_taken(part: Any) -> int:
    return part.take if part.take >= 0 else part.examples_in_shard - part.skip
