"""The child of experiments/peers.py: our model and a library's, with one set of weights, on one batch.

Both are compiled by the same `Backend.compile`, so the step, its loss, its optimizer and its clock are one code; what
differs between the two sides is the model.
"""

import dataclasses
from typing import Any

import numpy as np

from experiments import pairs
from experiments.peer_models.registry import Setting, choose_keras_backend, load_peer, prepare_images
from vitcmp.backend import Backend, Step, load_backend
from vitcmp.params import init_weights
from vitcmp.parity import tolerance
from vitcmp.specs import Spec, get_spec, parse_image_size
from vitcmp.worker import announce_stage

Batch = tuple[np.ndarray, np.ndarray]
# Of `tolerance`, by family. BiT's float32 is by itself up to 7.8e-6 from its float64 (R50x1 at 224 px, random weights,
# either framework), while the bound of two implementations is 5.8e-6; ResNet-50's is 1e-6. In float64 both are 3e-15
# from big_vision's and timm's.
BOUND_SCALE = {"bit": 3.0}


def make_sides(pair: pairs.Pair) -> pairs.Sides:
    """Builds both, and compares them before anything is timed: logits, and of training steps the first loss too."""
    point, how = pair["point"], pair["setting"]
    setting = Setting(numerics=how["numerics"], attention=how["attention"], layout=how["layout"])
    spec = dataclasses.replace(get_spec(pair["ours"]["model"]), image_size=parse_image_size(point["image_size"]))
    choose_keras_backend(pair["backend"])
    backend = load_backend(pair["backend"], platform=how["device"])
    effective = pairs.hold(backend.numerics(setting.numerics))
    images, labels = draw_batch(spec, point["batch_size"])
    weights, peer = init_weights(spec), pair["theirs"]["name"]
    ours = backend.build(spec, attention=setting.attention)
    ours = backend.load(ours, weights, numerics=setting.numerics, layout=setting.layout)
    theirs = load_peer(peer, backend, spec, weights, setting)
    options = {"mode": point["mode"], "compile": how["compile"]}
    announce_stage("make ours")
    our_step, our_output = make_step(backend, ours, (images, labels), **options)
    announce_stage("make theirs")
    their_step, their_output = make_step(backend, theirs, (prepare_images(peer, spec, images), labels), **options)
    return pairs.Sides(
        ours=our_step,
        theirs=their_step,
        ours_output=our_output,
        theirs_output=their_output,
        bound=BOUND_SCALE.get(spec.family, 1.0) * tolerance(setting.numerics, spec),
        platform=backend.describe().platform,
        facts={
            "device": vars(backend.describe()),
            "effective": effective,
            "num_params": [backend.count_params(model) for model in (ours, theirs)],
            "compile_s": [step.compile_s for step in (our_step, their_step)],
            "attention_ran": [getattr(step, "attention_ran", None) for step in (our_step, their_step)],
        },
    )


def draw_batch(spec: Spec, batch_size: int) -> Batch:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (batch_size, *spec.image_size, 3)).astype(np.float32)
    return images, rng.integers(0, max(spec.num_classes, 1), batch_size)


def make_step(backend: Backend, model: Any, batch: Batch, *, mode: str, compile: str) -> tuple[Step, np.ndarray]:
    """Returns the compiled step and what proves it: its logits or, in training, the logits and half of the first loss.

    Half, because the loss moves by twice what the logits move, at the most.
    """
    if mode == "forward":
        step = backend.compile(model, *batch, mode=mode, compile=compile)
        return step, step.result().ravel()
    out = backend.outputs(model, batch[0])  # before the first update
    logits = out["logits"] if "logits" in out else out["pre_logits"]
    step = backend.compile(model, *batch, mode=mode, compile=compile)
    return step, np.append(logits, step.result() / 2)


if __name__ == "__main__":
    pairs.child_main(make_sides)
