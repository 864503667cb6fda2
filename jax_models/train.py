"""One training step: softmax cross-entropy, its gradient, and one SGD or AdamW update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

OPTIMIZERS = ("sgd", "adamw")


def make_optimizer(
    name: str, *, learning_rate: float = 1e-3, weight_decay: float = 1e-4
) -> optax.GradientTransformation:
    """SGD with momentum 0.9, or AdamW with betas (0.9, 0.999) and eps 1e-8; `weight_decay` is AdamW's, on all."""
    if name == "sgd":
        return optax.sgd(learning_rate, momentum=0.9)
    return optax.adamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay)


def loss_fn(model: nnx.Module, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of the logits, in float32 at least."""
    logits = model(images)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_train_step(model: nnx.Module, *, optimizer: str) -> tuple[Callable[..., tuple[Any, jax.Array]], Any]:
    """Returns `step(state, images, labels) -> (state, loss)` and its first state: (params, statistics, optimizer's)."""
    model.train()
    update_rule = make_optimizer(optimizer)
    graph, params, statistics = nnx.split(model, nnx.Param, ...)

    def step(state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        params, statistics, moments = state

        def loss_and_statistics(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            model = nnx.merge(graph, params, statistics, copy=True)  # jax: a trace may change its own variables only
            loss = loss_fn(model, images, labels)
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        (loss, statistics), gradients = jax.value_and_grad(loss_and_statistics, has_aux=True)(params)
        updates, moments = update_rule.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), statistics, moments), loss

    return step, (params, statistics, update_rule.init(params))
