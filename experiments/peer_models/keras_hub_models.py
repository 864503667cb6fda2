"""keras-hub's ViT, ViTDet and ResNet, on Keras' JAX backend.

Its ViTDet is square, ends in SAM's neck (whose mean is taken here), and starts with ImageNet's mean and spread, which
`registry.prepare_images` undoes.
"""

from typing import Any

import keras_hub
import numpy as np

from experiments.peer_models.jax_module import Foreign
from experiments.peer_models.keras_variables import Assigner, as_foreign, set_dtype
from experiments.peer_models.registry import Setting
from vitcmp.backend import Backend, Unsupported
from vitcmp.params import Weights
from vitcmp.specs import ResNetSpec, Spec, ViTDetSpec, ViTSpec


def load(backend: Backend, spec: Spec, weights: Weights, setting: Setting) -> Foreign:
    set_dtype(setting)
    assigner = Assigner(weights)
    match spec:
        case ViTDetSpec():
            model = _vitdet(spec, assigner)
        case ViTSpec():
            model = _vit(spec, assigner)
        case ResNetSpec():
            model = _resnet(spec, assigner)
        case _:
            raise Unsupported(f"keras-hub has no {spec.family}")
    assigner.finish(model, "keras-hub")
    return as_foreign(model, spec, setting=setting, pool=isinstance(spec, ViTDetSpec))


def _vit(spec: ViTSpec, assigner: Assigner) -> Any:
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(*spec.image_size, 3),
        patch_size=spec.patch_size,
        num_layers=spec.depth,
        num_heads=spec.num_heads,
        hidden_dim=spec.width,
        mlp_dim=spec.mlp_dim,
        layer_norm_epsilon=spec.norm_eps,
    )
    model = keras_hub.models.ViTImageClassifier(backbone, spec.num_classes, pooling="token")
    embedding, encoder = (backbone.get_layer(name) for name in ("vit_patching_and_embedding", "vit_encoder"))
    assigner.layer(embedding.patch_embedding, "patch_embed/proj")
    assigner.variable(embedding.class_token, assigner.take("cls_token"))
    table = assigner.take("pos_embed").reshape(-1, spec.width)
    # the token holds its own position
    assigner.variable(embedding.position_embedding.embeddings, np.concatenate([np.zeros_like(table[:1]), table]))
    for i, block in enumerate(encoder.encoder_layers):
        _attention(block.mha, f"blocks/{i}/attn", spec, assigner)
        for layer, name in ((block.layer_norm_1, "norm1"), (block.layer_norm_2, "norm2")):
            assigner.layer(layer, f"blocks/{i}/{name}")
        assigner.layer(block.mlp.dense_1, f"blocks/{i}/mlp/fc1")
        assigner.layer(block.mlp.dense_2, f"blocks/{i}/mlp/fc2")
    assigner.layer(encoder.layer_norm, "norm")
    assigner.layer(model.output_dense, "head")
    return model


def _attention(mha: Any, name: str, spec: ViTSpec, assigner: Assigner) -> None:
    heads = spec.num_heads, spec.head_dim
    for leaf in ("kernel", "bias"):
        thirds = np.split(assigner.take(f"{name}/qkv/{leaf}"), 3, axis=-1)
        for dense, third in zip((mha.query_dense, mha.key_dense, mha.value_dense), thirds, strict=True):
            assigner.variable(getattr(dense, leaf), third.reshape(*third.shape[:-1], *heads))
    assigner.variable(mha.output_dense.kernel, assigner.take(f"{name}/proj/kernel").reshape(*heads, spec.width))
    assigner.variable(mha.output_dense.bias, assigner.take(f"{name}/proj/bias"))


def _vitdet(spec: ViTDetSpec, assigner: Assigner) -> Any:
    if spec.image_size[0] != spec.image_size[1]:
        raise Unsupported(f"keras-hub's ViTDet takes square images only, not {spec.image_size}")
    assert isinstance(spec.global_blocks, tuple)
    model = keras_hub.models.ViTDetBackbone(
        image_shape=(*spec.image_size, 3),
        patch_size=spec.patch_size,
        hidden_size=spec.width,
        num_layers=spec.depth,
        intermediate_dim=spec.mlp_dim,
        num_heads=spec.num_heads,
        global_attention_layer_indices=list(spec.global_blocks),
        num_output_channels=spec.neck_dim,
        use_rel_pos=spec.rel_pos,
        window_size=spec.window_size,
        layer_norm_epsilon=spec.norm_eps,
    )
    layers = [layer for layer in model.layers if layer.weights]
    embedding, positions, *blocks, neck = layers
    assigner.layer(embedding.projection, "patch_embed/proj")
    assigner.variable(positions.pos_embed, assigner.take("pos_embed"))
    for i, block in enumerate(blocks):
        name = f"blocks/{i}"
        if spec.rel_pos:
            tables = block.attention.add_decomposed_relative_pe
            for table in ("rel_pos_h", "rel_pos_w"):
                assigner.variable(getattr(tables, table), assigner.take(f"{name}/attn/{table}"))
        fc1, _, fc2 = block.mlp_block.dense_net.layers
        named = {
            "attn/qkv": block.attention.qkv,
            "attn/proj": block.attention.projection,
            "mlp/fc1": fc1,
            "mlp/fc2": fc2,
        }
        for ours, layer in {**named, "norm1": block.layer_norm1, "norm2": block.layer_norm2}.items():
            assigner.layer(layer, f"{name}/{ours}")
    for i, layer in enumerate(neck.layers):
        assigner.layer(layer, f"neck/{i}")
    return model


def _resnet(spec: ResNetSpec, assigner: Assigner) -> Any:
    num_stages = len(spec.depths)
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[spec.width],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[spec.width * 2**stage for stage in range(num_stages)],
        stackwise_num_blocks=list(spec.depths),
        stackwise_num_strides=[1] + [2] * (num_stages - 1),
        block_type="bottleneck_block",
        image_shape=(*spec.image_size, 3),
    )
    model = keras_hub.models.ResNetImageClassifier(backbone, spec.num_classes)
    names = {"conv1_conv": "conv1", "conv1_bn": "bn1"}
    for stage, depth in enumerate(spec.depths):
        for i in range(depth):
            ours, theirs = f"layer{stage + 1}/{i}", f"stack{stage}_block{i}"
            names |= {f"{theirs}_0_conv": f"{ours}/downsample/0", f"{theirs}_0_bn": f"{ours}/downsample/1"}
            for j in (1, 2, 3):
                names |= {f"{theirs}_{j}_conv": f"{ours}/conv{j}", f"{theirs}_{j}_bn": f"{ours}/bn{j}"}
    for layer in backbone.layers:
        if layer.weights:
            assigner.layer(layer, names[layer.name])
    assigner.layer(model.output_dense, "fc")
    return model
