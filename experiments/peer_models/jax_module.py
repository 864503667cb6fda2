"""A JAX model of another library as an nnx module, as `Backend.compile` takes one: NHWC images in, logits out.

Its arrays are the module's leaves, so they are arguments of the compiled program, donated in training and updated by
optax, as those of our models are; nothing of it is a constant of the program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.peer_models.registry import Setting
from vitcmp.backend import Unsupported
from vitcmp.specs import Spec

# (params, statistics, images, train) -> (logits, statistics); params and statistics are any trees of arrays.
Apply = Callable[[Any, Any, jax.Array, bool], tuple[jax.Array, Any]]


class Foreign(nnx.Module):
    """Runs `apply` on arrays that it holds: `params` are trained, `statistics` are what a training step replaces.

    It has the attributes that `Backend.load` leaves on a model and that `Backend.compile` reads.
    """

    def __init__(self, apply: Apply, params: Any, statistics: Any, spec: Spec, *, setting: Setting) -> None:
        if setting.attention not in (None, "xla"):
            raise Unsupported(f"attention={setting.attention}: this library writes its attention out, which is xla")
        self.spec, self.attention, self.numerics = spec, setting.attention, setting.numerics
        self.compute_dtype = jnp.dtype(setting.dtype)
        self.apply = apply
        self.use_running_average = False  # what train() and eval() set
        params, self.params_structure = jax.tree.flatten(params)
        statistics, self.statistics_structure = jax.tree.flatten(statistics)
        self.params = nnx.List([nnx.Param(self._cast(x)) for x in params])
        self.statistics = nnx.List([nnx.BatchStat(self._cast(x)) for x in statistics])

    def _cast(self, array: Any) -> jax.Array:
        array = jnp.asarray(array)
        return array.astype(self.compute_dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array

    def __call__(self, images: jax.Array, out: dict[str, jax.Array] | None = None) -> jax.Array:
        params = self.params_structure.unflatten([leaf[...] for leaf in self.params])
        statistics = self.statistics_structure.unflatten([leaf[...] for leaf in self.statistics])
        logits, statistics = self.apply(params, statistics, images, not self.use_running_average)
        if not self.use_running_average:
            for leaf, array in zip(self.statistics, jax.tree.leaves(statistics), strict=True):
                leaf[...] = array.astype(leaf[...].dtype)
        if out is not None:
            out["logits"] = logits
        return logits
