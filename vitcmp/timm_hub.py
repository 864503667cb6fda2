"""timm's pretrained weights by name: from the hub, or from a local file by timm's own loading. Nothing is unpickled.

`timm:NAME` is what `timm.create_model(NAME, pretrained=True)` holds; `timm:NAME:FILE` is the same with FILE in place of
the hub's, for files that timm renames while it loads them (`checkpoint_filter_fn` of each family). The name tells what
no array does, such as epsilons and the form of GELU: a `TimmState` carries it along.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vitcmp.specs import Spec, ViTDetSpec, did_you_mean
from vitcmp.weight_files import as_floats, read_arrays

PREFIX = "timm:"
HEADS = ("head.fc", "head", "fc", "classifier")  # where families keep their classifier, before timm renames it
# What timm's loading raises for files that do not fit, tried on wrong models, cut names and wrong shapes.
MISFITS = (RuntimeError, ValueError, LookupError, AttributeError, TypeError, AssertionError, NotImplementedError)
WHAT_TO_DO = "download the weights of {hub} from the hub elsewhere, and give the file as PATH or as timm:{name}:PATH"
# The modules without parts of the models that a spec can describe: any other is a trait that none has.
COMMON = {"Identity", "Dropout", "FastAdaptiveAvgPool", "AdaptiveAvgPool2d", "Flatten", "MaxPool2d", "ConstantPad2d"}
DESCRIBED = {
    "VisionTransformer": {"Conv2d", "Linear", "LayerNorm", "GELU", "GELUTanh"},
    "VisionTransformerSAM": {"Conv2d", "Linear", "LayerNorm", "LayerNorm2d", "GELU", "GELUTanh"},
    "ConvNeXt": {"Conv2d", "Linear", "LayerNorm", "LayerNorm2d", "GELU", "GELUTanh"},
    "ResNet": {"Conv2d", "Linear", "BatchNorm2d", "ReLU"},
    "ResNetV2": {"StdConv2d", "Conv2d", "ReLU"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """What timm's model is beyond its arrays."""

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # by the names of a spec's fields
    traits: tuple[str, ...] = ()  # what no spec describes
    foreign_pool: str = ""  # a way to pool that no spec describes; it is dropped where a plain ViT is upcycled
    num_positions_before: int = 0  # rows of the position embedding before the grid's: 1 of a class token
    grid_size: tuple[int, int] | None = None  # of the position embedding, where it is flat

    def grid_of(self, num_rows: int) -> tuple[int, tuple[int, int]] | None:
        """Returns the rows before the grid's and the grid: the model's own or a square; None where neither fits."""
        rows, side = num_rows - self.num_positions_before, math.isqrt(max(num_rows - self.num_positions_before, 0))
        if self.grid_size is None or rows < 1 or rows not in (math.prod(self.grid_size), side**2):
            return None
        return self.num_positions_before, self.grid_size if rows == math.prod(self.grid_size) else (side, side)

    def require(self, spec: Spec, source: str) -> None:
        """Raises ValueError where a spec that has the same arrays computes another function of them."""
        is_upcycled = isinstance(spec, ViTDetSpec) and "global_blocks" not in self.fields  # a plain ViT's weights
        other = {
            name: value
            for name, value in self.fields.items()
            if getattr(spec, name, value) != value and not (is_upcycled and name == "pool")
        }
        traits = [*self.traits, *([self.foreign_pool] if self.foreign_pool and not is_upcycled else [])]
        if traits:
            raise ValueError(f"{source}: this variant is not supported: {'; '.join(traits)}, which no spec has")
        if other:
            theirs = ", ".join(f"{name}={value} and not {getattr(spec, name)}" for name, value in other.items())
            texts = {name: "+".join(map(str, x)) if isinstance(x, tuple) else x for name, x in other.items()}
            fields = ",".join(f"{name}={text}" for name, text in texts.items())
            raise ValueError(
                f"{source}: its arrays fit {spec}, but timm's model has {theirs}; write MODEL:{fields}, or give a file "
                "by its path alone"
            )


class TimmState(dict[str, np.ndarray]):
    """The arrays of timm's model by timm's names, and what else it is."""

    def __init__(self, arrays: dict[str, np.ndarray], told: Told) -> None:
        super().__init__(arrays)
        self.told = told


def is_timm(source: str | os.PathLike[str]) -> bool:
    return os.fspath(source).startswith(PREFIX)


def split_timm(source: str) -> tuple[str, str]:
    """Returns the name and the path of `timm:NAME:PATH`; the path is empty for `timm:NAME`. ValueError for no name."""
    name, colon, path = source.removeprefix(PREFIX).partition(":")
    if not name or (colon and not path):
        raise ValueError(f"{source}: write timm:NAME, or timm:NAME:PATH for a local file")
    return name, path


def read_timm(source: str) -> TimmState:
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


def _read_hub(timm: Any, name: str, source: str) -> TimmState:
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the library it asks with

    hub = timm.models.get_pretrained_cfg(name).hf_hub_id or f"timm/{name}"
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, ValueError, RuntimeError, AssertionError, HTTPError) as error:  # offline, refused, not found
        is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set, and it is not in the cache" if is_offline else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{source}: cannot be had from the hub ({why}); {WHAT_TO_DO.format(hub=hub, name=name)}"
        ) from error
    return TimmState(_arrays(model), told_of(model))


def _read_file(timm: Any, name: str, path: str, source: str) -> TimmState:
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


def _load_torch(timm: Any, name: str, arrays: dict[str, np.ndarray]) -> TimmState:
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
    return TimmState(loaded, told_of(model))


def _load_flax(timm: Any, name: str, path: str, arrays: dict[str, np.ndarray]) -> TimmState:
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
    return TimmState(loaded, told_of(model))


def told_of(model: Any) -> Told:
    """Reads off timm's modules what a spec says and its arrays do not; of other classes than DESCRIBED nothing."""
    kind = type(model).__name__
    if kind not in DESCRIBED:
        return Told()
    parts = [module for module in model.modules() if not list(module.children())]
    foreign = {type(part).__name__ for part in parts} - DESCRIBED[kind] - COMMON
    traits = [f"it has {', '.join(sorted(foreign))}"] * bool(foreign)
    if any(getattr(part, "dilation", 1) not in (1, (1, 1)) for part in parts):
        traits.append("its convolutions are dilated")
    if kind.startswith("VisionTransformer"):
        return _told_of_vit(model, traits)
    if kind == "ConvNeXt":
        block = model.stages[0].blocks[0]
        return Told(fields={"gelu": _gelu(block.mlp.act), "norm_eps": block.norm.eps}, traits=tuple(traits))
    if kind == "ResNet":
        return Told(fields={"norm_eps": model.bn1.eps}, traits=tuple(traits))
    if not hasattr(model.stem, "conv"):
        return Told(traits=(*traits, "its stem has several convolutions"))
    fields = {"stem_pad": "zero" if hasattr(model.stem, "pad") else "lowest"}
    sources = {"norm_eps": (model.norm, "eps"), "num_groups": (model.norm, "num_groups")}
    sources |= {"weight_eps": (model.stem.conv, "eps")}
    fields |= {name: getattr(*source) for name, source in sources.items() if hasattr(*source)}
    return Told(fields=fields, traits=tuple(traits))


def _told_of_vit(model: Any, traits: list[str]) -> Told:
    if model.pos_embed is None:
        traits.append("it has no position embedding")
    if kinds := {type(block).__name__ for block in model.blocks} - {"Block"}:
        return Told(traits=(*traits, f"its blocks are {', '.join(sorted(kinds))}"))
    block = model.blocks[0]
    fields = {"num_heads": block.attn.num_heads, "gelu": _gelu(block.mlp.act), "norm_eps": block.norm1.eps}
    if type(model).__name__ == "VisionTransformerSAM":
        windows = [block.window_size for block in model.blocks]
        fields["global_blocks"] = tuple(i for i, window in enumerate(windows) if not window)
        fields |= {"window_size": max(windows), "window_policy": "pad"} if any(windows) else {}
        fields |= {"neck_eps": model.neck[1].eps} if len(list(model.neck.children())) else {}
        return Told(fields=fields, traits=tuple(traits))
    pool = {"token": "tok", "avg": "gap", "map": "map"}.get(model.global_pool)
    is_ours = pool is not None and model.has_class_token == (pool == "tok")
    beside = " beside a class token" if model.has_class_token else ""
    return Told(
        fields=fields | ({"pool": pool} if is_ours else {}),
        traits=tuple(traits),
        foreign_pool="" if is_ours else f"it pools by {model.global_pool!r}{beside}",
        num_positions_before=0 if model.no_embed_class else model.num_prefix_tokens,
        grid_size=tuple(model.patch_embed.grid_size),
    )


def _gelu(module: Any) -> str:
    return "tanh" if type(module).__name__ == "GELUTanh" or getattr(module, "approximate", "") == "tanh" else "erf"


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
