"""Our weights into the variables of Keras layers, and a Keras model as a function of its variables."""

from typing import Any

import jax
import keras
import numpy as np

from experiments.peer_models.jax_module import Foreign
from experiments.peer_models.registry import Setting
from vitcmp.backend import Unsupported
from vitcmp.params import Weights
from vitcmp.specs import Spec

# Keras' names of our leaves, in layers that multiply and in norms.
LEAVES = {"kernel": "kernel", "bias": "bias"}
NORM_LEAVES = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}


class Assigner:
    """Assigns our arrays to Keras layers by our names, and knows in the end whether each side was used up."""

    def __init__(self, weights: Weights) -> None:
        self.left = dict(weights)
        self.assigned: set[int] = set()

    def variable(self, variable: Any, array: np.ndarray) -> None:
        if tuple(variable.shape) != array.shape:
            raise ValueError(f"{variable.path} has shape {tuple(variable.shape)}, our array has {array.shape}")
        variable.assign(array)
        self.assigned.add(id(variable))

    def take(self, name: str) -> np.ndarray:
        return self.left.pop(name)

    def layer(self, layer: Any, name: str) -> None:
        """Assigns every leaf of our module `name` to a Dense, Conv2D, LayerNormalization or BatchNormalization."""
        leaves = NORM_LEAVES if f"{name}/scale" in self.left else LEAVES
        for leaf, theirs in leaves.items():
            if f"{name}/{leaf}" in self.left:
                self.variable(getattr(layer, theirs), self.take(f"{name}/{leaf}"))

    def finish(self, model: Any, library: str) -> None:
        """Raises ValueError where an array has no variable, or a variable no array."""
        unset = [variable.path for variable in model.variables if id(variable) not in self.assigned]
        if unset or self.left:
            raise ValueError(
                f"{library}: variables without our arrays: {unset[:3]}; arrays left: {list(self.left)[:3]}"
            )


def set_dtype(setting: Setting) -> None:
    """Sets the dtype of what is built from now on; raises Unsupported where Keras runs on another framework."""
    if keras.backend.backend() != "jax":
        raise Unsupported(f"Keras runs on {keras.backend.backend()}: set KERAS_BACKEND=jax before it is imported")
    keras.config.set_floatx(setting.dtype)
    keras.config.set_dtype_policy(setting.dtype)


def as_foreign(model: Any, spec: Spec, *, setting: Setting, pool: bool = False) -> Foreign:
    """Returns the model as a function of its variables; `pool` takes the mean of the map that it ends in."""

    def apply(params: Any, statistics: Any, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        x, statistics = model.stateless_call(params, statistics, images, training=train)
        return (x.mean(axis=(1, 2)) if pool else x), statistics

    params = [variable.value for variable in model.trainable_variables]
    return Foreign(apply, params, [variable.value for variable in model.non_trainable_variables], spec, setting=setting)
