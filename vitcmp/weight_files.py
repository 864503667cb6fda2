"""Arrays by name, from and into files: safetensors, npz and torch files. No pickle is ever run.

Every fault of a file is one ValueError that names the path, what is wrong and what is allowed.
"""

import argparse
import hashlib
import os
import pickle
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vitcmp.specs import did_you_mean

State = Mapping[str, Any]

SAFETENSORS_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "V2", "I64": "<i8"}
# Where training programs keep the state dict, in timm's order: averaged weights first.
TORCH_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
TORCH_ALLOWED = "allowed is a dict of tensors, as torch.save(model.state_dict(), path) writes"
# What torch.load raises for damaged files, found by cutting and flipping bytes of files in both of its formats.
TORCH_FAULTS = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    AssertionError,
    AttributeError,
    TypeError,
    OSError,
    struct.error,
)
NPZ_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What numpy and zipfile raise for damaged files, found in the same way.
NPZ_FAULTS = (
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    RuntimeError,
    SyntaxError,
    AttributeError,
    OverflowError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


def read_arrays(path: str | os.PathLike[str]) -> State:
    """Reads every array of a `.safetensors`, `.npz`, `.pth`, `.pt` or `.bin` file; bfloat16 comes as two raw bytes.

    Torch files need torch, and hold a state dict, bare or under one of TORCH_WRAPPERS; `module.` and `_orig_mod.`
    before every name of any file are dropped. Raises ValueError for a file that cannot be read, is larger than the
    memory or holds pickled objects.
    """
    path = _existing_file(path)
    read = READERS[_known_suffix(path, tuple(READERS))]
    try:
        arrays = read(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    except MemoryError as error:
        raise ValueError(
            f"{path}: its arrays are larger than the memory: {str(error) or 'the file alone is'}"
        ) from error
    prefix = re.compile(r"((module|_orig_mod)\.)+")  # of DistributedDataParallel and of torch.compile
    is_prefixed = all(prefix.match(name) for name in arrays)
    return {prefix.sub("", name, count=1): array for name, array in arrays.items()} if is_prefixed else arrays


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a `.npz` or `.safetensors` file in one step: an older file is replaced, or kept where writing fails.

    Raises ValueError for another suffix or a missing folder, OSError where the disk is full or the folder read-only; no
    part of a file is left behind.
    """
    path = check_target(path)
    write = WRITERS[path.suffix.lower()]
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file, arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"not written, nothing was changed: {error.strerror}", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def check_target(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file that `write_arrays` may write; raises ValueError for any other."""
    path = Path(os.path.expanduser(path))
    _known_suffix(path, tuple(WRITERS))
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"{path}: cannot be written, " + ("it is a folder" if path.is_dir() else f"no folder {path.parent}")
        )
    return path


def file_id(path: str | os.PathLike[str]) -> str:
    """Returns "sha256:..." of the file's bytes; raises ValueError where there is no such file."""
    try:
        with open(_existing_file(path), "rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def split_subtree(source: str | os.PathLike[str]) -> tuple[str, str]:
    """Returns the path and the subtree of `siglip.npz:img`; the subtree is empty where none is named.

    Raises ValueError for a colon with nothing after it.
    """
    text = os.fspath(source)
    suffixes = "|".join(re.escape(suffix) for suffix in READERS)
    match = re.fullmatch(rf"(.*(?:{suffixes})):([^:]*)", text, re.IGNORECASE)
    if match is None or os.path.exists(os.path.expanduser(text)):
        return text, ""
    if not match[2].strip("/"):
        raise ValueError(f"{text}: names no subtree after the colon; write {match[1]}, or {match[1]}:img")
    return match[1], match[2].strip("/")


def as_floats(state: State, source: str) -> dict[str, np.ndarray]:
    """Returns arrays or CPU tensors as numpy's, float32 or float64 where they were; without BatchNorm's counters."""
    arrays, faults = {}, []
    for name, value in state.items():
        array = _array(value)
        if name.endswith("num_batches_tracked"):
            continue
        if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # bfloat16, which numpy stores as raw bytes
            array = (np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if array.dtype.kind == "f":
            arrays[name] = array.astype(np.float64 if array.dtype.itemsize >= 8 else np.float32)
        else:
            faults.append(f"{name} ({array.dtype})")
    if faults or not arrays:
        what = f"not of floating point: {', '.join(faults[:20])}" if faults else "no arrays in it"
        raise ValueError(f"{source}: {what}; allowed are arrays of float64, float32, float16 or bfloat16")
    return arrays


def as_numbers(state: State, source: str) -> dict[str, np.ndarray]:
    """Returns arrays for another library's model: 16-bit floats as float32, counters and indices as they are."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} is a {type(state).__name__}, expected a dict of names to arrays")
    arrays = {name: _array(value) for name, value in state.items()}
    floats = {name: array for name, array in arrays.items() if array.dtype.kind not in "iub"}
    return arrays | as_floats(floats, source)


def _existing_file(path: str | os.PathLike[str]) -> Path:
    path = Path(os.path.expanduser(path))  # Path's own raises where there is no such user
    try:
        is_there = path.exists()
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if not is_there:
        names = [item.name for item in path.parent.iterdir() if item.is_file()] if path.parent.is_dir() else []
        raise ValueError(f"{path}: no such file{did_you_mean(path.name, names)}")
    if not path.is_file():
        raise ValueError(
            f"{path}: is a folder, not a file of weights" if path.is_dir() else f"{path}: is not a regular file"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: is empty")
    return path


def _known_suffix(path: Path, allowed: tuple[str, ...]) -> str:
    suffix = path.suffix.lower()
    if suffix not in allowed:
        raise ValueError(
            f"{path}: unknown file type {path.suffix!r}{did_you_mean(suffix, allowed)}; allowed: {', '.join(allowed)}"
        )
    return suffix


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError, deserialize

    try:
        entries = dict(deserialize(path.read_bytes()))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or a truncated one: {error}") from error
    foreign = [
        f"{name} ({entry['dtype']})" for name, entry in entries.items() if entry["dtype"] not in SAFETENSORS_DTYPES
    ]
    if foreign:
        raise ValueError(f"{path}: unknown dtypes: {', '.join(foreign[:20])}; allowed: {', '.join(SAFETENSORS_DTYPES)}")
    return {
        name: np.frombuffer(entry["data"], SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries.items()
    }


def _read_npz(path: Path) -> State:
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: not an .npz file of arrays (a pickle, a single array, or a truncated file); none is read"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            foreign = [name for name in file.zip.namelist() if not name.endswith(".npy")]
            if foreign:
                raise ValueError(f"holds {', '.join(foreign[:3])}, as a torch file does: is its suffix .npz?")
            packed = [x.filename for x in file.zip.infolist() if x.flag_bits & 1 or x.compress_type not in NPZ_PACKED]
            if packed:
                raise ValueError(f"{', '.join(packed[:3])}: encrypted, or not packed as numpy packs arrays")
            return {name: file[name] for name in file.files}
    except NPZ_FAULTS as error:
        raise ValueError(f"{path}: not an .npz file of plain arrays, or a damaged one: {error}") from error


def _read_torch(path: Path) -> State:
    try:
        import torch
    except ModuleNotFoundError:
        raise ValueError(
            f"{path}: torch files need torch: pip install 'vitcmp[torch]', or give a .safetensors file"
        ) from None
    path.open("rb").close()  # after which an OSError is of what the file says
    try:
        # The namespace holds the arguments in timm's training checkpoints.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols and sparse tensors, both refused here
            content = torch.load(path, map_location="cpu", weights_only=True)
    except TORCH_FAULTS as error:
        if pickled := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path}: holds a pickled {pickled[1]}, which is never loaded; {TORCH_ALLOWED}") from error
        what = f"not a torch file, a damaged one, or one of a newer pickle protocol than 2 ({type(error).__name__})"
        raise ValueError(f"{path}: {what}; {TORCH_ALLOWED}") from error
    return _torch_arrays(content, str(path))


def _torch_arrays(content: Any, source: str) -> State:
    """Finds the state dict and gives its tensors as numpy arrays, 16-bit ones as float32."""
    state = content
    if isinstance(content, Mapping):
        state = next((content[key] for key in TORCH_WRAPPERS if isinstance(content.get(key), Mapping)), content)
    entries = state if isinstance(state, Mapping) else {"the file": state}
    foreign = [
        f"{name} ({_kind(value)})"
        for name, value in entries.items()
        if entries is not state or not isinstance(name, str) or _kind(value) != "tensor"
    ]
    if foreign:
        raise ValueError(f"{source}: not a state dict: {', '.join(foreign[:10])}; {TORCH_ALLOWED}")
    return {name: _numpy(tensor) for name, tensor in state.items()}


def _kind(value: Any) -> str:
    """Returns "tensor" for a dense tensor in memory, of numbers that numpy has or can have, and else what it is."""
    if not hasattr(value, "is_quantized"):
        return type(value).__name__
    is_dense = str(value.layout) == "torch.strided" and not value.is_quantized and value.device.type == "cpu"
    if not is_dense:
        return "a sparse, quantized or meta tensor"
    try:
        _numpy(value[(slice(1),) * value.ndim])
    except (TypeError, RuntimeError):
        return str(value.dtype)
    return "tensor"


def _array(value: Any) -> np.ndarray:
    return _numpy(value) if hasattr(value, "is_quantized") else np.asarray(value)  # torch's tensors have it


def _numpy(tensor: Any) -> np.ndarray:
    is_half = tensor.is_floating_point() and tensor.element_size() < 4
    return (tensor.float() if is_half else tensor).detach().numpy()


READERS: dict[str, Callable[[Path], State]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
}


def _write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    np.savez(file, **arrays)  # type: ignore[arg-type]


def _write_safetensors(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save

    file.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


WRITERS: dict[str, Callable[[BinaryIO, Mapping[str, np.ndarray]], None]] = {
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
}
