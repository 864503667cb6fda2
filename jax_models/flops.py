"""FLOPs counted in the jaxpr: the cross-check of vitcmp.flops.

XLA's cost analysis will not do: it counts a scan's body once, leaves out a convolution's taps on its padding, and adds
softmax and GELU.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jax_models.layers import Conv
from vitcmp.specs import Spec

# Kernels whose matmuls no jaxpr shows, by the start of the primitive's name: better refused than counted as 0.
OPAQUE = ("pallas_call", "ffi_call", "dot_product_attention", "scaled_matmul", "ragged_dot")


def count_flops(model: nnx.Module, spec: Spec) -> int:
    """Counts the FLOPs of one image's forward pass, in evaluation mode; build the model with attention="xla".

    Any model of the spec will do: none of its weights is read, and nothing is computed. What the logits do not need is
    not counted, because XLA drops it: big_vision's models apply their head to every token too.
    """
    images = jax.ShapeDtypeStruct((1, *spec.image_size, 3), jnp.float32)
    model.eval()
    graph, state = nnx.split(model)

    def run(state: nnx.State, images: jax.Array) -> jax.Array:
        copy = nnx.merge(graph, state)
        copy.set_attributes(Conv, method="native", raise_if_not_found=False)  # a depthwise one expanded has no matmul
        return copy(images)

    return sum(_count(equation) for equation in _needed(jax.make_jaxpr(run)(state, images).jaxpr))


def count_jaxpr_flops(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """Counts the FLOPs of matmuls and convolutions, 2 per multiply-add, wherever they are nested.

    A scan counts `length` times, a cond as its dearest branch. A convolution's taps on its padding count; those on the
    zeros that lhs_dilation puts between the inputs do not, so that each gradient of a strided convolution costs what
    the convolution does. Raises ValueError where matmuls run an unknown number of times, in a while loop, or out of
    sight, in a kernel of their own.
    """
    return sum(_count(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _needed(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Returns the equations that the outputs depend on, or that have effects; the last one first."""
    equations, variables = [], set(map(id, jaxpr.outvars))  # by identity: a literal has no hash
    for equation in reversed(jaxpr.eqns):
        if equation.effects or variables & set(map(id, equation.outvars)):
            equations.append(equation)
            variables |= set(map(id, equation.invars))
    return equations


def _count(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _conv(equation)
    if name.startswith(OPAQUE):
        raise ValueError(f"the FLOPs inside {name} are not in the jaxpr; build the model with attention='xla'")
    inner = [count_jaxpr_flops(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == "while" and sum(inner):
        raise ValueError("a while loop runs matmuls a number of times that the jaxpr does not say; use a scan")
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _dot(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs, out = equation.invars[0].aval, equation.outvars[0].aval
    return 2 * out.size * math.prod(lhs.shape[axis] for axis in contracted)


def _conv(equation: JaxprEqn) -> int:
    lhs, rhs, out = (variable.aval.shape for variable in (*equation.invars, *equation.outvars))
    dims = equation.params["dimension_numbers"]
    positions = [
        lhs[lhs_axis] if dilation > 1 else out[out_axis]
        for lhs_axis, out_axis, dilation in zip(
            dims.lhs_spec[2:], dims.out_spec[2:], equation.params["lhs_dilation"], strict=True
        )
    ]
    batch, features = out[dims.out_spec[0]], out[dims.out_spec[1]]
    taps = math.prod(rhs[axis] for axis in dims.rhs_spec[1:])  # of one output: its group's inputs, and the kernel
    return 2 * batch * features * math.prod(positions) * taps


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item
