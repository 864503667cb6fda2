"""FLOPs counted in torch's own operators: the cross-check of vitcmp.flops.

On the meta device, where attention is broken down into its matmuls. Elsewhere torch's counter has given 0 for
attention: on CPU before 2.15, and in nn.MultiheadAttention's fast path still.
"""

import itertools

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitcmp.specs import Spec


def count_flops(model: nn.Module, spec: Spec) -> int:
    """Counts the FLOPs of one image's forward pass, in evaluation mode; build the model with attention="math".

    Any model of the spec will do: none of its weights is read, and nothing is computed.
    """
    with FlopCounterMode(display=False) as counter:
        run_on_meta(model, spec.image_size)
    return counter.get_total_flops()


def run_on_meta(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Runs one image's forward pass, in evaluation mode, without memory or arithmetic."""
    images = torch.empty((1, 3, *image_size), device="meta")
    # torch: by functional_call, because a model built on the meta device may still hold buffers made from numpy
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    state = {name: tensor.detach().to("meta") for name, tensor in tensors}
    with torch.no_grad():
        torch.func.functional_call(model.eval(), state, (images,))
