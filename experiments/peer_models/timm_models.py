"""timm's models, through the interface that every model of timm has here: `timm:vit_base_patch16_224`."""

from typing import Any

from experiments.peer_models.registry import Setting
from vitcmp.backend import Backend, Unsupported
from vitcmp.checkpoints import to_timm
from vitcmp.params import Weights
from vitcmp.specs import BiTSpec, BiTV1Spec, ConvNeXtSpec, ResNetSpec, Spec, ViTDetSpec, ViTSpec, get_spec

VITS = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}


def load(backend: Backend, spec: Spec, weights: Weights, setting: Setting) -> Any:
    options = f"num_classes={spec.num_classes},image_size={spec.image_size[0]}x{spec.image_size[1]}"
    model = backend.build(get_spec(f"timm:{_name(spec)}:{options}"), attention=setting.attention)
    return backend.load(model, to_timm(weights, spec), numerics=setting.numerics, layout=setting.layout)


def _name(spec: Spec) -> str:
    """Returns the name of a model whose other sizes may differ: its weights then do not fit, and `load` says so."""
    match spec:
        case ViTDetSpec():
            return "samvit_base_patch16"
        case ViTSpec() if spec.width in VITS:
            return VITS[spec.width]
        case ResNetSpec():
            return f"resnet{sum(spec.depths) * 3 + 2}"
        case ConvNeXtSpec():
            return "convnext_tiny"
        case BiTSpec() if not isinstance(spec, BiTV1Spec):
            return f"resnetv2_{sum(spec.depths) * 3 + 2}x{spec.width_factor}_bit"
    raise Unsupported(f"no model of timm is known for {spec}")
