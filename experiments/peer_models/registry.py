"""Which library has which of our models, and what of ours must be set so that the two compute the same function.

No library is imported here: the parent process lists points from this table, and only a child loads a library.
"""

import dataclasses
import importlib
import os
from typing import Any

import numpy as np

from vitcmp.backend import NUMERICS, Backend, Unsupported
from vitcmp.params import Weights
from vitcmp.specs import Spec, ViTDetSpec, did_you_mean

MODELS = ("vit_ti16", "vit_b16", "vitdet_b16", "resnet50", "convnext_tiny", "bit_r50x1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """A library that has some of our models; `models` gives for each what is set in our spec to equal it."""

    backend: str
    package: str  # as it is installed
    models: dict[str, str]


# Numerics are set on our side wherever our spec can, because the library's own are what its users run:
# - timm's samvit has no classifier, and a norm epsilon of 1e-5 in its blocks.
# - big_vision has GELU's tanh form, and other constants in BiT; its root block's max-pool never chooses the padding.
# - keras-hub's ViTDet ends in SAM's neck.
# - keras.applications' ResNet-50 has BatchNorm's epsilon of 1.001e-5, and is v1, so its outputs differ all the same.
# - equimo has GELU's tanh form, and 1e-5 in its ViT's norms.
SAM = "neck_dim=256,num_classes=0"
PEERS = {
    "timm": Peer(
        backend="torch",
        package="timm",
        models={**dict.fromkeys(MODELS, ""), "vitdet_b16": f"{SAM},norm_eps=1e-5"},
    ),
    "torchvision": Peer(
        backend="torch",
        package="torchvision",
        models=dict.fromkeys(("vit_ti16", "vit_b16", "resnet50", "convnext_tiny"), ""),
    ),
    "transformers": Peer(
        backend="torch",
        package="transformers",
        models=dict.fromkeys(MODELS[:5], ""),
    ),
    "big_vision": Peer(
        backend="jax",
        package="big_vision",
        models={"vit_ti16": "gelu=tanh", "vit_b16": "gelu=tanh", "bit_r50x1": "weight_eps=1e-10,stem_pad=lowest"},
    ),
    "keras_hub": Peer(
        backend="jax",
        package="keras-hub",
        models={"vit_ti16": "", "vit_b16": "", "vitdet_b16": SAM, "resnet50": ""},
    ),
    "keras": Peer(
        backend="jax",
        package="keras",
        models={"resnet50": "norm_eps=1.001e-5", "convnext_tiny": ""},
    ),
    "equimo": Peer(
        backend="jax",
        package="equimo",
        models={
            "vit_ti16": "gelu=tanh,norm_eps=1e-5",
            "vit_b16": "gelu=tanh,norm_eps=1e-5",
            "convnext_tiny": "gelu=tanh",
        },
    ),
    "flaxmodels": Peer(
        backend="jax",
        package="flaxmodels",
        models={"resnet50": ""},
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What both sides have alike."""

    numerics: str
    attention: str | None = None
    layout: str | None = None

    @property
    def dtype(self) -> str:
        """The one dtype of parameters and activations; a library has no mixed precision but its own."""
        params, activations = NUMERICS[self.numerics]
        if params != activations:
            raise ValueError(f"numerics={self.numerics}: peers have parameters and activations of one dtype only")
        return params


def default_attention(spec: Spec, *, peer: str, platform: str, mode: str, numerics: str = "float32") -> str | None:
    """Returns the kernel that both sides are forced to: what the library itself would take there.

    torch: flash, and on a GPU the memory-efficient one where flash cannot run (32-bit inputs, and ViTDet's relative
    positions, which are a bias); on a CPU math where flash has no gradient of a bias. transformers' VitDetModel writes
    its attention out, which is math. JAX: all of these libraries write it out, which is xla.
    """
    if spec.family not in ("vit", "vitdet"):
        return None
    if PEERS[peer].backend == "jax":
        return "xla"
    has_bias = isinstance(spec, ViTDetSpec) and spec.rel_pos
    if isinstance(spec, ViTDetSpec) and peer == "transformers":
        return "math"
    if platform == "gpu":
        is_16_bit = NUMERICS[numerics][1] in ("bfloat16", "float16")
        return "flash" if is_16_bit and not has_bias else "mem_efficient"
    return "math" if has_bias and mode == "train" else "flash"


def choose_keras_backend(backend: str) -> None:
    """Says which framework Keras runs on, unless the user did; in time only before anything imports Keras."""
    os.environ.setdefault("KERAS_BACKEND", backend)


def load_peer(name: str, backend: Backend, spec: Spec, weights: Weights, setting: Setting) -> Any:
    """Returns the library's model of `spec` with our canonical weights, as `Backend.compile` takes a model.

    Raises Unsupported where the library is not installed or cannot run this, ValueError for an unknown name.
    """
    if name not in PEERS:
        raise ValueError(f"unknown peer {name!r}{did_you_mean(name, PEERS)}; allowed: {', '.join(PEERS)}")
    if PEERS[name].backend != backend.name:
        raise ValueError(f"peer={name} is a library of {PEERS[name].backend}, not of {backend.name}")
    try:
        library = importlib.import_module(f"experiments.peer_models.{name}_models")
    except ModuleNotFoundError as error:
        raise Unsupported(f"{PEERS[name].package} is not installed: no module {error.name!r}") from error
    return library.load(backend, spec, weights, setting)


def prepare_images(name: str, spec: Spec, images: np.ndarray) -> np.ndarray:
    """Undoes what the library's model does to its input: keras-hub's ViTDet starts with ImageNet's mean and spread."""
    if name == "keras_hub" and isinstance(spec, ViTDetSpec):
        return images * np.array([0.229, 0.224, 0.225]) + np.array([0.485, 0.456, 0.406])
    return images
