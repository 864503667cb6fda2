"""One training step: softmax cross-entropy, its gradient, and one SGD or AdamW update."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

OPTIMIZERS = ("sgd", "adamw")


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    is_captured: bool = False,  # torch: in a CUDA graph AdamW's count of steps must be on the device
) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW with betas (0.9, 0.999) and eps 1e-8; `weight_decay` is AdamW's, on all."""
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9)
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay, "capturable": is_captured}
    return torch.optim.AdamW(model.parameters(), learning_rate, **options)


def loss_fn(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the logits, in float32 at least."""
    logits = model(images)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels)


def make_train_step(
    model: nn.Module,
    *,
    optimizer: str,
    compile: Callable[[Callable], Callable] = lambda function: function,
    is_captured: bool = False,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Returns `step(images, labels) -> loss`, which updates the model in place; `compile` is applied to the loss."""
    model.train()
    update_rule = make_optimizer(optimizer, model, is_captured=is_captured)
    loss = compile(lambda images, labels: loss_fn(model, images, labels))

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = loss(images, labels)
        value.backward()
        update_rule.step()
        update_rule.zero_grad(set_to_none=True)  # at the end: between steps there are no gradients in memory
        return value.detach()

    return step
