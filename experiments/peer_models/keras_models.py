"""keras.applications' ConvNeXt and ResNet-50, on Keras' JAX backend.

Its ResNet-50 is the original (v1): the stride of a stage is in the first 1x1 convolution, ours and all others' is in
the 3x3 (v1.5). It computes another function, with 6 % fewer FLOPs; the comparison of outputs says so, and it is never
timed as if it were the same. Its convolutions have biases, which are set to 0.
"""

from typing import Any

import keras
import numpy as np

from experiments.peer_models.jax_module import Foreign
from experiments.peer_models.keras_variables import Assigner, as_foreign, set_dtype
from experiments.peer_models.registry import Setting
from vitcmp.backend import Backend, Unsupported
from vitcmp.params import Weights
from vitcmp.sizes import CONVNEXT_SIZES
from vitcmp.specs import ConvNeXtSpec, ResNetSpec, Spec


def load(backend: Backend, spec: Spec, weights: Weights, setting: Setting) -> Foreign:
    set_dtype(setting)
    options = {"input_shape": (*spec.image_size, 3), "classes": spec.num_classes, "weights": None}
    assigner = Assigner(weights)
    match spec:
        case ConvNeXtSpec() if spec.widths == CONVNEXT_SIZES["tiny"][1]:
            model = keras.applications.ConvNeXtTiny(
                **options, include_preprocessing=False, classifier_activation=None, name="convnext"
            )
            _assign_convnext(model, spec, assigner)
        case ResNetSpec() if spec.depths == (3, 4, 6, 3):
            model = keras.applications.ResNet50(**options, classifier_activation=None)
            _assign_resnet(model, spec, assigner)
        case _:
            raise Unsupported(f"keras.applications has ConvNeXt-T and ResNet-50 of our models, not {spec}")
    assigner.finish(model, "keras.applications")
    return as_foreign(model, spec, setting=setting)


def _assign_resnet(model: Any, spec: ResNetSpec, assigner: Assigner) -> None:
    names = {"conv1_conv": "conv1", "conv1_bn": "bn1", "predictions": "fc"}
    for stage, depth in enumerate(spec.depths):
        for i in range(depth):
            ours, theirs = f"layer{stage + 1}/{i}", f"conv{stage + 2}_block{i + 1}"
            names |= {f"{theirs}_0_conv": f"{ours}/downsample/0", f"{theirs}_0_bn": f"{ours}/downsample/1"}
            for j in (1, 2, 3):
                names |= {f"{theirs}_{j}_conv": f"{ours}/conv{j}", f"{theirs}_{j}_bn": f"{ours}/bn{j}"}
    for layer in model.layers:
        if layer.weights:
            assigner.layer(layer, names[layer.name])
        if layer.name.endswith("_conv"):
            assigner.variable(layer.bias, np.zeros(layer.bias.shape))


def _assign_convnext(model: Any, spec: ConvNeXtSpec, assigner: Assigner) -> None:
    stem = model.get_layer("convnext_stem").layers
    for layer, name in zip((layer for layer in stem if layer.weights), ("stem/0", "stem/1"), strict=True):
        assigner.layer(layer, name)
    for stage, depth in enumerate(spec.depths):
        if stage > 0:
            downsample = model.get_layer(f"convnext_downsampling_block_{stage - 1}").layers
            for i, layer in enumerate(layer for layer in downsample if layer.weights):
                assigner.layer(layer, f"stages/{stage}/downsample/{i}")
        for i in range(depth):
            ours, theirs = f"stages/{stage}/blocks/{i}", f"convnext_stage_{stage}_block_{i}"
            named = {"depthwise_conv": "conv_dw", "layernorm": "norm"}
            named |= {"pointwise_conv_1": "mlp/fc1", "pointwise_conv_2": "mlp/fc2"}
            for suffix, name in named.items():
                assigner.layer(model.get_layer(f"{theirs}_{suffix}"), f"{ours}/{name}")
            assigner.variable(model.get_layer(f"{theirs}_layer_scale").gamma, assigner.take(f"{ours}/gamma"))
    assigner.layer(model.get_layer("convnext_head_layernorm"), "head/norm")
    assigner.layer(model.get_layer("convnext_head_dense"), "head/fc")
