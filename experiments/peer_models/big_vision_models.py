"""google-research/big_vision's ViT and BiT, through the interface that its models have here: `big_vision:vit/B/16`.

Both compute the logits of every position too, and the whole tree of intermediates: what is not read, XLA leaves out.
"""

from typing import Any

from experiments.peer_models.registry import Setting
from vitcmp.backend import Backend, Unsupported
from vitcmp.big_vision import to_big_vision
from vitcmp.params import Weights
from vitcmp.specs import BiTSpec, BiTV1Spec, Spec, ViTDetSpec, ViTSpec, get_spec

VITS = {32: "mu", 192: "Ti", 384: "S", 768: "B"}  # by width


def load(backend: Backend, spec: Spec, weights: Weights, setting: Setting) -> Any:
    if setting.attention not in (None, "xla"):
        raise Unsupported(f"attention={setting.attention}: big_vision's is Flax's own, which is xla")
    options = f"num_classes={spec.num_classes},image_size={spec.image_size[0]}x{spec.image_size[1]}"
    match spec:
        case ViTSpec() if spec.width in VITS and not isinstance(spec, ViTDetSpec):
            text = f"big_vision:vit/{VITS[spec.width]}/{spec.patch_size}:pool={spec.pool},{options}"
        case BiTSpec() if not isinstance(spec, BiTV1Spec):
            text = f"big_vision:bit_paper/{sum(spec.depths) * 3 + 2}x{spec.width_factor}:{options}"
        case _:
            raise Unsupported(f"no model of big_vision is known for {spec}")
    try:
        model = backend.build(get_spec(text))
    except ValueError as error:
        raise Unsupported(str(error)) from error  # BIG_VISION_PATH is not set, or leads nowhere
    return backend.load(model, to_big_vision(weights, spec), numerics=setting.numerics)
