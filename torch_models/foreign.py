"""Models of other libraries behind our interface: here timm's. Code, names, weights are their own."""

import contextlib
import importlib.metadata
import inspect
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import sdpa_kernel
from torch.overrides import TorchFunctionMode

from torch_models.attention import SDPA_BACKENDS
from torch_models.flops import run_on_meta
from torch_models.layers import Outputs, tap, tap_map
from vitcmp.backend import NUMERICS, Unsupported
from vitcmp.params import Weights, check_shapes
from vitcmp.specs import ForeignSpec, did_you_mean, format_image_size

SEED = 0  # of weights that nobody gave
MIXED = "bfloat16_mixed"
SDPA = "scaled_dot_product_attention"
# What timm's models raise for an image that they cannot take.
SIZE_ERRORS = RuntimeError, AssertionError, ValueError, TypeError, IndexError, ZeroDivisionError
LOADING_ERRORS = *SIZE_ERRORS, LookupError, AttributeError  # and its loading, for weights of another model


class ForeignModel(nn.Module):
    """Any model of timm: (b 3 h w) -> (b num_classes).

    The size of the image is given to every architecture that takes one (`img_size`: ViT, Swin, MaxViT, EVA, SAM ...),
    which then builds its tables by timm's own rules: Swin's windows keep the size in the name, and shrink where the map
    is smaller; those of MaxViT are a 32nd of the image, as at its own size. Architectures without `img_size` (ConvNets)
    are the same at every size.

    `attention` None leaves the kernel to timm and torch; a name forces it around the whole forward pass. bfloat16_mixed
    is torch.autocast, as timm trains; every other numerics casts parameters, buffers and images, and nothing else.
    """

    def __init__(self, spec: ForeignSpec, *, attention: str | None) -> None:
        super().__init__()
        self.spec, self.attention = spec, attention
        self.is_mixed = False
        self.num_sdpa_calls = 0  # torch: what a kernel can be forced on
        self.library = create(spec)

    def forward(self, images: torch.Tensor, out: Outputs | None = None) -> torch.Tensor:
        """Returns logits (b num_classes), or what the head would read where num_classes is 0."""
        # torch: contexts force the kernel and the mixed precision; big_vision's models take both as arguments
        kernel = contextlib.nullcontext() if self.attention is None else sdpa_kernel(SDPA_BACKENDS[self.attention])
        device, dtype = images.device.type, torch.bfloat16
        mixed = torch.autocast(device, dtype) if self.is_mixed else contextlib.nullcontext()
        with kernel, mixed:
            x = self.library(images)
            if out is not None:
                self.describe(images, out)
        return tap(out, "logits" if self.spec.num_classes else "pre_logits", x)

    def describe(self, images: torch.Tensor, out: Outputs) -> None:
        """Keeps `features` (maps are NHWC) and `pre_logits` where the library tells them apart."""
        if not hasattr(self.library, "forward_features"):
            return
        x = self.library.forward_features(images)
        if not isinstance(x, torch.Tensor):
            return
        is_nhwc = getattr(self.library, "output_fmt", "NCHW") == "NHWC"
        tap_map(out, "features", x) if x.ndim == 4 and not is_nhwc else tap(out, "features", x)
        head = getattr(self.library, "forward_head", None)
        if head is not None and "pre_logits" in inspect.signature(head).parameters:
            with contextlib.suppress(NotImplementedError):  # an encoder that is no classifier
                tap(out, "pre_logits", head(x, pre_logits=True))

    def effective(self) -> dict[str, Any]:
        """Returns what a record must say of the library and of what these settings mean to it."""
        mixed = {"mixed": "torch.autocast(bfloat16) around the forward pass"} if self.is_mixed else {}
        return {"library": library_versions(), "num_sdpa_calls": self.num_sdpa_calls, **mixed}


def build_foreign(spec: ForeignSpec, *, attention: str | None = None) -> ForeignModel:
    """Builds the model on the meta device, and runs it there once, to see that it takes the image and the kernel.

    Raises ValueError for a name that timm does not have and for an image that the model cannot take, Unsupported where
    a kernel was named and the model never calls scaled_dot_product_attention.
    """
    spec.require_backend("torch")
    if attention is not None and attention not in SDPA_BACKENDS:
        raise Unsupported(f"attention={attention!r} is of our own layers; of timm's: {', '.join(SDPA_BACKENDS)}")
    with torch.device("meta"):
        model = ForeignModel(spec, attention=attention)
    with _FunctionCalls() as calls, _size_errors(spec):
        run_on_meta(model, spec.image_size)
    if attention is not None and not calls.num[SDPA]:
        raise Unsupported(
            f"attention={attention!r}: timm:{spec.name} never calls scaled_dot_product_attention, so no kernel can be "
            "forced; leave attention out"
        )
    model.num_sdpa_calls = calls.num[SDPA]
    return model


def load_foreign(model: ForeignModel, weights: Weights | None, *, numerics: str, device: torch.device) -> ForeignModel:
    """Fills the model with timm's own weights by timm's names, strictly, or with what timm draws from seed 0.

    Weights of another image size are brought to this one by timm's own loading. BatchNorm's `num_batches_tracked` may
    be left out. Drawn and checked on the CPU, whatever the device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        library = create(model.spec).to(getattr(torch, NUMERICS[numerics][0]))
    if weights is not None:
        weights = _as_loaded(weights, library, model.spec)
        state = {
            name: tensor for name, tensor in library.state_dict().items() if name in weights or not _is_count(name)
        }
        check_shapes(weights, {name: tuple(x.shape) for name, x in state.items()}, f"timm:{model.spec.name}")
        arrays = {name: torch.from_numpy(np.array(weights[name])) for name in state}
        library.load_state_dict(arrays, strict=False)  # checked above, with every fault at once
    model.library = library.to(device)
    model.is_mixed = numerics == MIXED
    return model


def _as_loaded(weights: Weights, library: nn.Module, spec: ForeignSpec) -> Weights:
    """Has timm's own loading, in float32, resample what depends on the image size: positions, tables of windows.

    Nothing else: it would make patches of 16 pixels of those of 32 without a word. Positions of as many rows as the
    grid's are of that grid, unless the weights are `timm:NAME`'s, of which another is known.
    """
    misfits = _misfits(weights, library)
    made_for = getattr(getattr(weights, "told", None), "grid_size", None)
    if made_for not in (None, getattr(getattr(library, "patch_embed", None), "grid_size", made_for)):
        misfits.add("pos_embed")
    if not misfits or not misfits <= _of_image_size(library, spec) | {"pos_embed"}:
        return weights
    state = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    overlay = {"state_dict": state, "num_classes": spec.num_classes, "label_offset": 0, "custom_load": False}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    with contextlib.suppress(*LOADING_ERRORS), warnings.catch_warnings():  # the strict check says what does not fit
        warnings.simplefilter("ignore", UserWarning)  # torch's, of the speed of timm's interpolation
        loaded = _create(_import_library(), spec, spec.image_size, **options).state_dict()
        return {**weights, **{name: loaded[name].numpy() for name in misfits}}
    return weights


# torch: of big_vision's weights the position embedding alone
def _of_image_size(library: nn.Module, spec: ForeignSpec) -> set[str]:
    """Returns the names of the arrays whose shapes change with the image size."""
    shapes = {name: np.empty(x.shape, np.bool_) for name, x in library.state_dict().items()}
    timm, (height, width) = _import_library(), spec.image_size
    with torch.device("meta"):
        others = [timm.create_model(spec.name, num_classes=spec.num_classes)]
        for size in ((2 * height, 2 * width), (height // 2, width // 2)):
            with contextlib.suppress(*SIZE_ERRORS):
                others.append(_create(timm, spec, size))
    return set().union(*(_misfits(shapes, other) for other in others))


# torch: see _of_image_size
def _misfits(weights: Weights, library: nn.Module) -> set[str]:
    shapes = {name: tuple(x.shape) for name, x in library.state_dict().items()}
    return {name for name, array in weights.items() if shapes.get(name, array.shape) != array.shape}


def export_foreign(model: ForeignModel) -> Weights:
    """Returns the weights by timm's own names and in its layouts; floats are float32 at least."""
    return {name: _numpy(tensor) for name, tensor in model.library.state_dict().items()}


def library_versions() -> dict[str, str]:
    """Returns the library's version by its name, or nothing where it is not installed; imports nothing."""
    try:
        return {"timm": importlib.metadata.version("timm")}
    except importlib.metadata.PackageNotFoundError:
        return {}


def create(spec: ForeignSpec) -> nn.Module:
    """Builds timm's own model for the image size, with the library's initialisation, on the default device."""
    timm = _import_library()
    if not timm.is_model(spec.name):
        near = did_you_mean(spec.name, timm.list_models())
        raise ValueError(f"timm {timm.__version__} has no model {spec.name!r} (timm.list_models() lists them){near}")
    tags = timm.list_pretrained(f"{spec.name.partition('.')[0]}.*")
    if "." in spec.name and spec.name not in tags:
        raise ValueError(f"timm {timm.__version__} has no {spec.name!r}; allowed: {', '.join(tags) or 'no tag'}")
    with _size_errors(spec):
        return _create(timm, spec, spec.image_size)


# torch: big_vision's models are built for no size
def _create(timm: Any, spec: ForeignSpec, image_size: tuple[int, int], **options: Any) -> nn.Module:
    try:
        return timm.create_model(spec.name, num_classes=spec.num_classes, img_size=image_size, **options)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
        return timm.create_model(spec.name, num_classes=spec.num_classes, **options)


# torch: big_vision's models take no kernel
class _FunctionCalls(TorchFunctionMode):
    """Counts torch's functions by name while open."""

    def __init__(self) -> None:
        super().__init__()
        self.num: Counter[str] = Counter()

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num[getattr(function, "__name__", "")] += 1
        return function(*args, **(kwargs or {}))


# torch: big_vision's ViT takes any image that holds a patch, which its spec checks
@contextlib.contextmanager
def _size_errors(spec: ForeignSpec) -> Iterator[None]:
    """Turns what an architecture says of an image that it cannot take into a ValueError that names both."""
    try:
        yield
    except SIZE_ERRORS as error:
        size, reason = format_image_size(spec.image_size), str(error).partition("\n")[0] or _failed_line(error)
        raise ValueError(f"timm:{spec.name} cannot take image_size={size}: {reason}{_known_sizes(spec)}") from error


# torch: see _size_errors
def _failed_line(error: Exception) -> str:
    """Returns timm's line that raised: some of its assertions say nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.line for frame in frames if frame.filename.startswith(_import_library().__path__[0])]
    return (lines and lines[-1]) or type(error).__name__


# torch: see _size_errors
def _known_sizes(spec: ForeignSpec) -> str:
    """Returns "; it takes 224 and 96x128": the size that the model is made for, and one near the spec's."""
    timm = _import_library()
    config = timm.get_pretrained_cfg(spec.name)
    sizes = [config.input_size[1:]] if config else []
    for multiple in (8, 16, 32, 64):  # of patches and strides
        height, width = (-(-side // multiple) * multiple for side in spec.image_size)
        with contextlib.suppress(*SIZE_ERRORS):
            with torch.device("meta"):
                model = _create(timm, spec, (height, width))
            run_on_meta(model, (height, width))
            sizes.append((height, width))
            break
    known = dict.fromkeys(format_image_size(size) for size in sizes)
    return f"; it takes {' and '.join(known)}" if known else ""


def _import_library() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(f"timm's models need the package {error.name!r}: pip install timm") from error
    return timm


def _is_count(name: str) -> bool:
    # torch: big_vision has no BatchNorm
    return name.endswith("num_batches_tracked")


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    wide = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", wide, copy=True).numpy()  # a copy: a train step works in place
