"""Models of other libraries behind our interface: here big_vision's. Code, names, weights are their own."""

import contextlib
import functools
import hashlib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from jax_models.layers import Outputs, tap
from vitcmp.backend import NUMERICS, Unsupported
from vitcmp.params import Weights, check_shapes
from vitcmp.specs import BigVisionSpec, ForeignSpec

SEED = 0  # of weights that nobody gave
MIXED = "bfloat16_mixed"
# What big_vision's loading raises for weights of another model.
LOADING_ERRORS = RuntimeError, AssertionError, ValueError, TypeError, LookupError, AttributeError

# By kind of model and by big_vision's name of an output, ours. Of a stage's units the last one is the stage.
NAMES = {
    "vit": {
        "with_posemb": "stem",
        r"encoder/block(\d+)/\+mlp": "block/{}",
        "encoded": "features",
        "head_input": "pooled",
        "pre_logits": "pre_logits",
    },
    "bit": {
        "stem": "stem",
        r"stage(\d+)(?:/unit\d+)?": "stage/{}",
        "pre_logits_2d": "features",
        "pre_logits": "pre_logits",
    },
}
POS_EMBED = {"learned": "learn", "sincos2d": "sincos2d"}


class ForeignModel(nnx.Module):
    """A model of big_vision: (b h w 3) -> (b num_classes), its Linen parameters held by nnx.

    The ViT computes in the dtype that it is told (`dtype_mm`), which follows the numerics; bfloat16_mixed is that
    alone, with parameters in the dtypes that its code draws them in (16 bits for positions and class token). The
    ResNets take no such dtype: parameters and images are cast, and nothing else; they have no mixed precision.

    Attention is Linen's own: no kernel can be forced. The MLP of the MAP head is float32 at all numerics, as its code
    has it.
    """

    def __init__(self, spec: ForeignSpec) -> None:
        self.spec = spec
        self.is_mixed = False
        self.library = create(spec)
        self.variables = nnx.Dict({name: nnx.Param(x) for name, x in draw(self.library, spec).items()})

    def __call__(self, images: jax.Array, out: Outputs | None = None) -> jax.Array:
        """Returns logits (b num_classes), or what the head would read where num_classes is 0."""
        # jax: a Linen model is given its parameters at each call
        params = {name: variable[...] for name, variable in self.variables.items()}
        x, theirs = self.library.apply({"params": traverse_util.unflatten_dict(params, sep="/")}, images)
        if out is not None:
            self.describe(theirs, out)
        return tap(out, "logits" if self.spec.num_classes else "pre_logits", x)

    def describe(self, theirs: Mapping[str, Any], out: Outputs) -> None:
        """Keeps big_vision's intermediates that our models have too, under our names; `stem` has no class token."""
        # jax: big_vision returns all of them, where timm has methods for two
        names = NAMES["vit" if self.spec.name.startswith("vit") else "bit"]
        for name, x in traverse_util.flatten_dict(dict(theirs), sep="/").items():
            for pattern, ours in names.items():
                if match := re.fullmatch(pattern, name):
                    first = int("stage" in ours)  # big_vision counts stages from 1, and blocks from 0
                    tap(out, ours.format(*(int(number) - first for number in match.groups())), x)

    def effective(self) -> dict[str, Any]:
        """Returns what a record must say of the library and of what these settings mean to it."""
        mixed = {"mixed": "dtype_mm=bfloat16, parameters as big_vision draws them"} if self.is_mixed else {}
        return {"library": library_versions(), **mixed}


def build_foreign(spec: ForeignSpec, *, attention: str | None = None) -> ForeignModel:
    """Builds the model with no weights in memory.

    Raises ValueError where BIG_VISION_PATH does not lead to big_vision, Unsupported where a kernel was named.
    """
    spec.require_backend("jax")
    if attention is not None:
        raise Unsupported(f"attention={attention!r}: big_vision's attention is Linen's own; leave attention out")
    return nnx.eval_shape(lambda: ForeignModel(spec))


def load_foreign(model: ForeignModel, weights: Weights | None, *, numerics: str, device: jax.Device) -> ForeignModel:
    """Fills the model with big_vision's weights by big_vision's names, strictly, or with what it draws from seed 0.

    Weights of another image size, of a scan or by older names are brought to this model by big_vision's own loading.
    Raises Unsupported for mixed precision in a ResNet.
    """
    param_dtype, compute_dtype = NUMERICS[numerics]
    model.is_mixed = numerics == MIXED
    model.library = _told(model, compute_dtype)
    drawn = jax.eval_shape(lambda: draw(model.library, model.spec))
    if weights is None:
        weights = jax.jit(lambda: draw(model.library, model.spec))()
    else:
        weights = _as_loaded(weights, drawn, model.spec)
        check_shapes(weights, {name: x.shape for name, x in drawn.items()}, f"big_vision:{model.spec.name}")
    for name, variable in model.variables.items():
        dtype = drawn[name].dtype if model.is_mixed else param_dtype
        model.variables[name] = variable.replace(jax.device_put(np.asarray(weights[name]).astype(dtype), device))
    return model


def _as_loaded(weights: Weights, drawn: Mapping[str, jax.ShapeDtypeStruct], spec: ForeignSpec) -> Weights:
    """Renames and resamples as big_vision's own `load` does; it zooms from a square grid to a square one alone."""
    if {name: array.shape for name, array in weights.items()} == {name: x.shape for name, x in drawn.items()}:
        return weights
    kind = spec.name.partition("/")[0]
    module = _import_library(_find_library(kind), kind)
    # jax: timm has one function for all; big_vision's `load` reads a file, and calls these
    with contextlib.suppress(*LOADING_ERRORS):  # the strict check says what does not fit
        tree = traverse_util.unflatten_dict({name: np.array(x) for name, x in weights.items()}, sep="/")
        for rename in ("maybe_convert_big_transfer_format", "fix_old_checkpoints"):
            tree = getattr(module, rename, lambda tree: tree)(tree)
        if "encoderblock" in tree.get("Transformer", {}):
            tree = module.scan_to_pyloop(tree)
        loaded = traverse_util.flatten_dict(tree, sep="/")
        if "pos_embedding" in loaded and "pos_embedding" in drawn and _has_square_grid(drawn, spec):
            positions = {"old": loaded["pos_embedding"], "new": drawn["pos_embedding"]}
            loaded["pos_embedding"] = module.resample_posemb(**positions)
        return loaded
    return weights


# jax: timm has grids of any shape
def _has_square_grid(drawn: Mapping[str, jax.ShapeDtypeStruct], spec: ForeignSpec) -> bool:
    patch_size = drawn["embedding/kernel"].shape[0]
    height, width = (side // patch_size for side in spec.image_size)
    return height == width


def export_foreign(model: ForeignModel) -> Weights:
    """Returns the weights by big_vision's own names; floats are float32 at least."""
    return {name: _numpy(variable[...]) for name, variable in model.variables.items()}


def library_versions() -> dict[str, str]:
    """Returns a hash of big_vision's models, which have no version, or nothing where there is none; imports nothing."""
    folder = Path(os.environ.get("BIG_VISION_PATH", "")) / "big_vision" / "models"
    files = [path for name in ("vit", "bit", "bit_paper") if (path := folder / f"{name}.py").is_file()]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    return {"big_vision": f"sha256:{digest}"} if files and os.environ.get("BIG_VISION_PATH") else {}


def create(spec: ForeignSpec) -> Any:
    """Returns big_vision's own Linen model; raises ValueError where it cannot be imported."""
    assert isinstance(spec, BigVisionSpec)
    kind, _, variant = spec.name.partition("/")
    module = _import_library(_find_library(kind), kind)
    if kind == "vit":
        options = {"pool_type": spec.pool, "posemb": POS_EMBED[spec.pos_embed], "rep_size": spec.rep_size}
        return module.Model(spec.num_classes, variant=variant, **options)
    depth, _, width = variant.partition("x")
    return module.Model(spec.num_classes, depth=int(depth), width=int(width or 1))


# jax: timm draws in its constructors
def draw(library: Any, spec: ForeignSpec) -> dict[str, jax.Array]:
    """Returns the parameters that big_vision draws from seed 0, by its names."""
    images = jnp.zeros((1, *spec.image_size, 3))
    return traverse_util.flatten_dict(library.init(jax.random.key(SEED), images)["params"], sep="/")


# jax: hard casts are all that timm's models need
def _told(model: ForeignModel, compute_dtype: str) -> Any:
    """Returns big_vision's model with the dtype to compute in, where it takes one."""
    if hasattr(model.library, "dtype_mm"):
        return model.library.clone(dtype_mm=compute_dtype)
    if model.is_mixed:
        raise Unsupported(f"numerics={MIXED}: big_vision:{model.spec.name} computes in its parameters' dtype")
    return model.library


# jax: timm is installed; big_vision has no setup.py
def _find_library(kind: str) -> str:
    """Returns the folder that holds big_vision; raises ValueError where BIG_VISION_PATH does not lead to it."""
    root = os.environ.get("BIG_VISION_PATH")
    what = "the folder of a checkout of github.com/google-research/big_vision"
    if not root:
        raise ValueError(f"big_vision's models need BIG_VISION_PATH: set it to {what}")
    if not (Path(root) / "big_vision" / "models" / f"{kind}.py").is_file():
        raise ValueError(f"BIG_VISION_PATH={root!r} has no big_vision/models/{kind}.py: set it to {what}")
    return root


@functools.cache
def _import_library(root: str, kind: str) -> ModuleType:
    # jax: imported once for each folder, because two imports give two different classes
    try:
        with _isolated(root):
            return importlib.import_module(f"big_vision.models.{kind}")
    except ModuleNotFoundError as error:
        raise ValueError(f"big_vision's models need the package {error.name!r}: pip install it") from error


# jax: timm's modules stand on their own
@contextlib.contextmanager
def _isolated(root: str) -> Iterator[None]:
    """Imports big_vision from `root`, and leaves no trace of it for another import to find.

    Its `utils` are left out but for one function: the models use them to load files only, and they import TensorFlow,
    which costs seconds and hundreds of megabytes, einops and ml_collections.
    """
    kept = _take_modules("big_vision")
    sys.modules["big_vision.utils"] = utils = ModuleType("big_vision.utils")
    vars(utils)["tree_flatten_with_names"] = lambda tree: ([*traverse_util.flatten_dict(tree, sep="/").items()], None)
    sys.path.insert(0, root)
    try:
        yield
    finally:
        sys.path.remove(root)
        _take_modules("big_vision")
        sys.modules.update(kept)


# jax: see _isolated
def _take_modules(package: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}


def _numpy(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.promote_types(array.dtype, jnp.float32)))
