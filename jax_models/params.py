"""Canonical weights into and out of the nnx modules, strictly."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vitcmp.params import Weights, expected_params
from vitcmp.specs import Spec


def load_params(model: nnx.Module, spec: Spec, weights: Weights, *, dtype: jnp.dtype, device: jax.Device) -> nnx.Module:
    """Fills the model with canonical weights, cast to `dtype` on the `device`, and returns it."""
    slots = {flax_name(path): (path, variable) for path, variable in nnx.to_flat_state(nnx.state(model))}
    expected = expected_params(spec)
    if slots.keys() != expected.keys():
        raise ValueError(f"the model and its spec name different weights: {sorted(slots.keys() ^ expected.keys())}")
    state = []
    for name, (path, variable) in slots.items():
        if variable.shape != weights[name].shape:
            raise ValueError(f"{name} has shape {weights[name].shape}, the model expects {variable.shape}")
        array = jax.device_put(np.asarray(weights[name]).astype(dtype), device)
        state.append((path, variable.replace(array)))
    nnx.update(model, nnx.from_flat_state(state))
    return model


def export_params(model: nnx.Module, spec: Spec) -> Weights:
    """Returns the weights by their canonical names, as numpy arrays of float32 at least."""
    state = {flax_name(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}
    return {name: _numpy(state[name]) for name in expected_params(spec)}


def flax_name(path: tuple[str | int, ...]) -> str:
    """Returns `blocks/3/attn/qkv/kernel` for the path of a leaf."""
    return "/".join(map(str, path))


def _numpy(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.promote_types(array.dtype, jnp.float32)))
