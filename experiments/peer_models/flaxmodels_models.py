"""flaxmodels' ResNet: Linen modules named by their order, and BatchNorm in float32 whatever the input's dtype."""

import re
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from flaxmodels.resnet import resnet

from experiments.peer_models.jax_module import Foreign
from experiments.peer_models.names import check_names
from experiments.peer_models.registry import Setting
from vitcmp.backend import Backend, Unsupported
from vitcmp.params import Weights
from vitcmp.specs import RESNET_SIZES, ResNetSpec, Spec


def load(backend: Backend, spec: Spec, weights: Weights, setting: Setting) -> Foreign:
    sizes = {size: depth for depth, size in RESNET_SIZES.items()}
    if not isinstance(spec, ResNetSpec) or (spec.block, spec.depths) not in sizes or spec.block == "basic":
        raise Unsupported(f"flaxmodels has ResNet-50, 101 and 152 of our models, not {spec}")
    model = resnet.ResNet(
        output="logits",
        pretrained=None,
        normalize=False,
        architecture=f"resnet{sizes[spec.block, spec.depths]}",
        num_classes=spec.num_classes,
        block=resnet.Bottleneck,
        dtype=setting.dtype,
    )
    images = jax.ShapeDtypeStruct((1, *spec.image_size, 3), np.float32)
    expected = jax.eval_shape(model.init, jax.random.key(0), images)
    arrays = {_name(name, spec): array for name, array in weights.items()}
    check_names(arrays, flax.traverse_util.flatten_dict(expected, sep="/"), library="flaxmodels")
    variables = flax.traverse_util.unflatten_dict(arrays, sep="/")

    def apply(params: Any, statistics: Any, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        collections = {"params": params, "batch_stats": statistics}
        if not train:
            return model.apply(collections, images, train=False), statistics
        logits, new = model.apply(collections, images, train=True, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    return Foreign(apply, variables["params"], variables["batch_stats"], spec, setting=setting)


def _name(name: str, spec: ResNetSpec) -> str:
    """Returns params/Bottleneck_4/Conv_1/kernel for layer2/1/conv2/kernel; the fourth of each is the shortcut's."""
    module, _, leaf = name.rpartition("/")
    block = ""
    if match := re.fullmatch(r"layer(\d+)/(\d+)/(.+)", module):
        block = f"Bottleneck_{sum(spec.depths[: int(match[1]) - 1]) + int(match[2])}/"
        module = match[3]
    module = {"downsample/0": "conv4", "downsample/1": "bn4", "fc": "Dense_0"}.get(module, module)
    if match := re.fullmatch(r"(conv|bn)(\d)", module):
        module = f"{'Conv' if match[1] == 'conv' else 'BatchNorm'}_{int(match[2]) - 1}"
    collection = "batch_stats" if leaf in ("mean", "var") else "params"
    return f"{collection}/{block}{module}/{leaf}"
