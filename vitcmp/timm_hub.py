"""timm's pretrained weights by name: from the hub, or from a local file by timm's own loading. Nothing is unpickled.

`timm:NAME` is what `timm.create_model(NAME, pretrained=True)` holds; `timm:NAME:FILE` is the same with FILE in place of
the hub's, for files that timm renames while it loads them (`checkpoint_filter_fn` of each family).
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from vitcmp.specs import did_you_mean
from vitcmp.weight_files import State, as_floats, read_arrays

PREFIX = "timm:"
HEADS = ("head.fc", "head", "fc", "classifier")  # where families keep their classifier, before timm renames it
# What timm's loading raises for files that do not fit, tried on wrong models, cut names and wrong shapes.
MISFITS = (RuntimeError, ValueError, LookupError, AttributeError, TypeError, AssertionError, NotImplementedError)
WHAT_TO_DO = "download the weights of {hub} from the hub elsewhere, and give the file as PATH or as timm:{name}:PATH"


def is_timm(source: str | os.PathLike[str]) -> bool:
    return os.fspath(source).startswith(PREFIX)


def split_timm(source: str) -> tuple[str, str]:
    """Returns the name and the path of `timm:NAME:PATH`; the path is empty for `timm:NAME`. ValueError for no name."""
    name, colon, path = source.removeprefix(PREFIX).partition(":")
    if not name or (colon and not path):
        raise ValueError(f"{source}: write timm:NAME, or timm:NAME:PATH for a local file")
    return name, path


def read_timm(source: str) -> State:
    """Returns the state dict of timm's model as numpy arrays, float64 where a local file has float64.

    Raises ValueError where timm is not installed, has no such model or no weights for it, cannot reach the hub, or does
    not take the file.
    """
    name, path = split_timm(source)
    timm = _import_timm(source)
    _require_weights(timm, name, path, source)
    with _no_pickle():
        return _read_file(timm, name, path, source) if path else _read_hub(timm, name, source)


def _import_timm(source: str) -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{source}: needs {error.name}, which is not installed: pip install timm, or give the path of a file"
        ) from None
    return timm


def _require_weights(timm: Any, name: str, path: str, source: str) -> None:
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(
            f"{source}: timm {timm.__version__} has no model {name!r}{did_you_mean(name, timm.list_models())}"
        )
    tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
    tag = name.partition(".")[2]
    if tag and tag not in tags:
        raise ValueError(
            f"{source}: {architecture} has no weights {tag!r}{did_you_mean(tag, tags)}; timm has: {', '.join(tags)}"
        )
    if not (tags or path):
        raise ValueError(
            f"{source}: timm has no pretrained weights for {name}; give a file, as timm:{name}:PATH, or another model "
            f"(timm.list_pretrained())"
        )


def _read_hub(timm: Any, name: str, source: str) -> State:
    hub = timm.models.get_pretrained_cfg(name).hf_hub_id or f"timm/{name}"
    try:
        model = timm.create_model(name, pretrained=True)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # of huggingface_hub and of urllib: offline, refused, not found
        is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set, and it is not in the cache" if is_offline else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{source}: cannot be had from the hub ({why}); {WHAT_TO_DO.format(hub=hub, name=name)}"
        ) from error
    return _arrays(model)


def _read_file(timm: Any, name: str, path: str, source: str) -> State:
    """Loads a file as timm would; its arrays are read here, where no pickle is run."""
    import torch

    arrays = as_floats(read_arrays(path), path)
    is_flax = any("/" in array for array in arrays)
    is_double = any(array.dtype == np.float64 for array in arrays.values())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if is_double else torch.float32)
    try:
        loaded = _load_flax(timm, name, path, arrays) if is_flax else _load_torch(timm, name, arrays)
    except MISFITS as error:
        message = " ".join(f"{type(error).__name__}: {error}"[:2000].split())
        raise ValueError(f"{source}: timm's {name} does not take this file: {message}") from error
    finally:
        torch.set_default_dtype(before)
    return loaded


def _load_torch(timm: Any, name: str, arrays: dict[str, np.ndarray]) -> State:
    import torch

    heads = [arrays[f"{head}.weight"] for head in HEADS if f"{head}.weight" in arrays]
    num_classes = len(heads[0]) if heads else 0
    state = {key: torch.from_numpy(array) for key, array in arrays.items()}
    # num_classes on both sides: where they differ, timm drops the file's head and keeps a random one.
    overlay = {"state_dict": dict(state), "num_classes": num_classes, "label_offset": 0, "custom_load": False}
    model = timm.create_model(name, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)
    loaded = _arrays(model)
    missing = [key for key in loaded if key not in arrays and not key.endswith("num_batches_tracked")]
    if missing and not arrays.keys() - loaded.keys():  # nothing that timm could have renamed
        raise ValueError(f"it lacks {', '.join(missing[:10])}")
    if "pos_embed" in arrays and arrays["pos_embed"].shape != loaded["pos_embed"].shape:
        loaded["pos_embed"] = arrays["pos_embed"]  # of its own grid: resampled once, in float64, where it is needed
    return loaded


def _load_flax(timm: Any, name: str, path: str, arrays: dict[str, np.ndarray]) -> State:
    """Has timm read an `.npz` of big_vision's. What it leaves out would stay random: it is NaN here, and refused."""
    import torch

    heads = [array for key, array in arrays.items() if key.endswith(("head/bias", "head/conv2d/bias"))]
    model = timm.create_model(name, pretrained=False, num_classes=len(heads[0]) if heads else 0)
    rows = [array.shape[1] for key, array in arrays.items() if key.endswith("pos_embedding")]
    if rows and rows[0] != model.pos_embed.shape[1]:
        raise ValueError(f"pos_embedding has {rows[0]} rows, not {model.pos_embed.shape[1]}; give the path alone")
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(torch.nan)
    model.load_pretrained(os.path.expanduser(path))
    loaded = _arrays(model)
    missing = [key for key, array in loaded.items() if not np.isfinite(array).all()]
    if missing:
        raise ValueError(f"timm leaves {', '.join(missing[:10])} out; give the path alone")
    return loaded


def _arrays(model: Any) -> dict[str, np.ndarray]:
    return {key: tensor.detach().cpu().numpy() for key, tensor in model.state_dict().items()}


@contextlib.contextmanager
def _no_pickle() -> Iterator[None]:
    """Has torch.load refuse pickled objects, whoever calls it."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
