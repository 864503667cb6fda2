"""A folder of pictures as a dataset: one subfolder a class, or train/ and test/ (or val/) with one subfolder a class.

Classes and files are sorted by name, so that the same folder is the same dataset everywhere. Where there is no train/,
every fifth picture of each class, in that order, is `test`. Every picture is read once before training; a broken one is
left out, and named in `notes`. What that found is kept under `data_dir`, so that the next process need not read again.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from experiments.capacity.data.dataset import Example, check_index, spread
from experiments.capacity.data.images import ImageError, decode_image, find_fault, image_size
from vitcmp.environment import num_cpus
from vitcmp.specs import did_you_mean

SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
SPLITS = ("train", "val", "validation", "test")
TEST_EVERY = 5
NAMED_FAULTS = 5


@dataclasses.dataclass(frozen=True)
class FolderDataset:
    """The pictures of one split; `files` are relative to `root`, `labels` their classes."""

    name: str
    split: str
    root: Path
    class_names: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    notes: tuple[str, ...] = ()
    num_questions: int = 1

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        i = check_index(index, len(self))
        try:
            image = decode_image(self.root / self.files[i], rotate=True)
        except ImageError as error:  # it was whole when the folder was opened
            raise ImageError(f"{self.root / self.files[i]}: {error}") from error
        return Example(image, np.array([self.labels[i]], np.int64), self.files[i])

    def image_sizes(self, limit: int = 100) -> list[tuple[int, int]]:
        return [image_size(self.root / self.files[i], rotate=True) for i in spread(len(self), limit)]


def open_folder(path: str | Path, split: str, *, data_dir: str | Path) -> FolderDataset:
    """Opens `train` or `test` of a folder. Raises ValueError for a folder or a class without pictures."""
    root = Path(path).expanduser().resolve()
    if not root.is_dir():
        raise ValueError(f"folder:{path}: there is no folder {root}")
    found = _find(root)
    if split not in found:
        sizes = ", ".join(f"{name} ({sum(map(len, classes.values()))} files)" for name, classes in found.items())
        raise ValueError(f"folder:{path} has no split {split!r}{did_you_mean(split, found)}; it has {sizes}")
    class_names = _class_names(path, found)
    wanted = [(label, file) for label, name in enumerate(class_names) for file in found[split][name]]
    faults = _find_faults(root, [file for _, file in wanted], Path(data_dir) / "folders")
    kept = [(label, file) for label, file in wanted if file not in faults]
    empty = [class_names[i] for i in sorted(set(range(len(class_names))) - {label for label, _ in kept})]
    if empty:
        raise ValueError(f"folder:{path}: {_say_faults(faults)}; that leaves no picture of {split} in {_some(empty)}")
    return FolderDataset(
        name=f"folder:{path}",
        split=split,
        root=root,
        class_names=class_names,
        files=tuple(file for _, file in kept),
        labels=tuple(label for label, _ in kept),
        notes=(_say_faults(faults),) if faults else (),
    )


def _find(root: Path) -> dict[str, dict[str, list[str]]]:
    """Returns the files of each split and class, relative to the folder."""
    names = {entry.name for entry in os.scandir(root) if entry.is_dir()}
    splits = [split for split in SPLITS if split in names]
    if splits[:1] == ["train"] and len(splits) > 1:
        return {split: _classes(root, root / split) for split in splits}
    every = _classes(root, root)
    test = {name: files[TEST_EVERY - 1 :: TEST_EVERY] for name, files in every.items()}
    train = {name: [file for file in files if file not in set(test[name])] for name, files in every.items()}
    return {"train": train, "test": test}


def _classes(root: Path, folder: Path) -> dict[str, list[str]]:
    """Returns the pictures of each subfolder, at any depth; hidden files and folders are passed over."""
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {path.name: sorted(_pictures(root, path)) for path in subfolders}


def _pictures(root: Path, folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    relative = [path.relative_to(root) for path in files]
    return [path.as_posix() for path in relative if not any(part.startswith(".") for part in path.parts)]


def _class_names(path: str | Path, found: dict[str, dict[str, list[str]]]) -> tuple[str, ...]:
    if not any(files for classes in found.values() for files in classes.values()):
        allowed = " ".join(sorted(SUFFIXES))
        raise ValueError(f"folder:{path} has no pictures; expected one subfolder a class, with files of {allowed}")
    names = set().union(*found.values())
    common = names.intersection(*found.values())
    if odd := sorted(names - common):
        raise ValueError(f"folder:{path}: {' and '.join(found)} must have the same classes; not all have {_some(odd)}")
    if empty := sorted(name for name in names if not all(classes[name] for classes in found.values())):
        few = f" (each is split {TEST_EVERY - 1} to 1, and needs {TEST_EVERY})" * (list(found) == ["train", "test"])
        raise ValueError(f"folder:{path}: too few pictures for {' and '.join(found)} in class {_some(empty)}{few}")
    if len(names) < 2:
        raise ValueError(f"folder:{path} has one class, {names.pop()!r}; two or more are needed")
    return tuple(sorted(names))


def _find_faults(root: Path, files: list[str], index_dir: Path) -> dict[str, str]:
    """Returns why each broken picture is broken. A file is read again once its size or its time has changed."""
    index = index_dir / f"{hashlib.sha256(str(root).encode()).hexdigest()[:16]}.json"
    known = _load(index)
    stamps = {file: _stamp(root / file) for file in files}
    unread = [file for file in files if known.get(file, {}).get("stamp") != stamps[file]]
    with ThreadPoolExecutor(num_cpus()) as pool:
        read = pool.map(lambda file: find_fault(root / file), unread)
        known |= {file: {"stamp": stamps[file], "fault": fault} for file, fault in zip(unread, read, strict=True)}
    if unread:
        _save(index, known)
    return {file: known[file]["fault"] for file in files if known[file]["fault"]}


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _load(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or not ours: all files are read again
        return {}


def _save(path: Path, known: dict[str, Any]) -> None:
    """Replaces the file in one step, so that processes that do the same at once never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(known, file)
    os.replace(file.name, path)


def _say_faults(faults: dict[str, str]) -> str:
    if not faults:
        return "no broken picture"
    named = "; ".join(f"{file}: {fault}" for file, fault in list(faults.items())[:NAMED_FAULTS])
    more = f"; and {len(faults) - NAMED_FAULTS} more" if len(faults) > NAMED_FAULTS else ""
    return f"{len(faults)} broken picture{'s' * (len(faults) > 1)} left out: {named}{more}"


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:NAMED_FAULTS])) + (f" and {len(names) - NAMED_FAULTS} more" * (len(names) > 5))
