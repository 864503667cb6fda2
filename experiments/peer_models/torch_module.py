"""A torch model of another library as `Backend.compile` takes one: NCHW images in, logits out, one attention kernel."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.peer_models.names import check_names
from experiments.peer_models.registry import Setting
from vitcmp.backend import Backend, Unsupported
from vitcmp.params import Weights
from vitcmp.specs import Spec

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
Read = Callable[[Any], torch.Tensor]


class Foreign(nn.Module):
    """Runs `model` and reads the logits from what it returns; its attention is forced to one kernel of SDPA.

    It has the attributes that `Backend.load` leaves on a model and that `Backend.compile` reads.
    """

    def __init__(self, model: nn.Module, spec: Spec, *, read: Read | None, setting: Setting) -> None:
        super().__init__()
        if setting.attention not in (None, *KERNELS):
            raise Unsupported(f"attention={setting.attention} is no kernel of SDPA, which is all that can be forced")
        self.model, self.read = model, read
        self.spec, self.attention, self.numerics = spec, setting.attention, setting.numerics
        self.compute_dtype = getattr(torch, setting.dtype)
        self.memory_format = MEMORY_FORMATS[setting.layout or "nchw"]

    def forward(self, images: torch.Tensor, out: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        with sdpa_kernel(KERNELS[self.attention]) if self.attention else contextlib.nullcontext():
            logits = self.model(images)
        logits = logits if self.read is None else self.read(logits)
        if out is not None:
            out["logits"] = logits
        return logits


def load_state(
    model: nn.Module,
    state: Weights,
    spec: Spec,
    *,
    library: str,
    backend: Backend,
    setting: Setting,
    read: Read | None = None,
) -> Foreign:
    """Fills the library's model with arrays by its own names, strictly, and puts it on the backend's device."""
    expected = {name: x for name, x in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    check_names(state, expected, library=library)
    tensors = {name: torch.from_numpy(np.array(array)).reshape(expected[name].shape) for name, array in state.items()}
    model.load_state_dict(tensors, strict=False)  # without the counters of batches, which nobody reads
    foreign = Foreign(model, spec, read=read, setting=setting)
    device = torch.device("cuda" if backend.describe().platform == "gpu" else "cpu")
    return foreign.to(device, foreign.compute_dtype).to(memory_format=foreign.memory_format)


def split_qkv(state: Mapping[str, np.ndarray]) -> Weights:
    """Cuts each `*.qkv.*` of timm's into `*.q.*`, `*.k.*` and `*.v.*`."""
    split: Weights = {}
    for name, array in state.items():
        if ".qkv." not in name:
            split[name] = array
            continue
        for part, third in zip("qkv", np.split(array, 3), strict=True):
            split[name.replace(".qkv.", f".{part}.")] = third
    return split
