"""Canonical weights into and out of the torch modules, strictly."""

import numpy as np
import torch
from torch import nn

from vitcmp.params import Weights, expected_params
from vitcmp.specs import Spec

LEAF_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def load_params(
    model: nn.Module, spec: Spec, weights: Weights, *, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Fills the model with canonical weights, cast to `dtype` on the `device`, and returns it.

    The copies lie in torch's own memory, at multiples of 64 bytes as everybody's parameters; numpy aligns to 16 only.
    """
    state = {
        torch_name(name): torch.from_numpy(to_torch(np.asarray(weights[name]), leaf.kind)).to(device, dtype, copy=True)
        for name, leaf in expected_params(spec).items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device, dtype)


def export_params(model: nn.Module, spec: Spec) -> Weights:
    """Returns the weights by their canonical names, as numpy arrays of float32 at least."""
    state = model.state_dict()
    return {
        name: from_torch(_numpy(state[torch_name(name)]), leaf.kind) for name, leaf in expected_params(spec).items()
    }


def torch_name(name: str) -> str:
    """Returns `blocks.3.attn.qkv.weight` for `blocks/3/attn/qkv/kernel`."""
    *modules, leaf = name.split("/")
    return ".".join([*modules, LEAF_NAMES.get(leaf, leaf)])


def to_torch(array: np.ndarray, kind: str) -> np.ndarray:
    if kind == "linear":
        array = array.T  # torch: (out, in)
    elif kind == "conv":
        array = array.transpose(3, 2, 0, 1)  # torch: (out, in / groups, height, width)
    return np.array(array, order="C")  # torch warns of an array that cannot be written


def from_torch(array: np.ndarray, kind: str) -> np.ndarray:
    # torch: the reverse of to_torch; the nnx modules hold the canonical layouts
    if kind == "linear":
        return array.T
    return array.transpose(2, 3, 1, 0) if kind == "conv" else array


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to("cpu", wide, copy=True).numpy()  # a copy: a train step works in place
