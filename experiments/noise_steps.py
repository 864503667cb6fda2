"""The child of experiments/noise.py: two steps of one backend, built and compiled one after the other."""

import dataclasses
from collections.abc import Callable

import numpy as np

from experiments import pairs
from vitcmp.backend import COMPILE, Step, load_backend
from vitcmp.params import init_weights
from vitcmp.parity import tolerance
from vitcmp.specs import get_spec, parse_image_size

NUMERICS = "float32"


def make_sides(pair: pairs.Pair) -> pairs.Sides:
    """A side calls its own program `calls` times: 21 against 20 are 5 % more work, whatever the machine does."""
    point = pair["point"]
    spec = dataclasses.replace(get_spec(point["model"]), image_size=parse_image_size(point["image_size"]))
    backend = load_backend(pair["backend"], platform="cpu")
    effective = pairs.hold(backend.numerics(NUMERICS))
    images = np.random.default_rng(0).uniform(-1, 1, (point["batch_size"], *spec.image_size, 3)).astype(np.float32)
    steps: dict[str, Step] = {}
    for side in sorted(pairs.SIDES, key=lambda side: side != point["built_first"]):
        model = backend.load(backend.build(spec, attention=point["attention"]), init_weights(spec), numerics=NUMERICS)
        labels = np.zeros(len(images), np.int64)
        compile = COMPILE[backend.name][0]
        steps[side] = backend.compile(model, images, labels, mode="forward", compile=compile)
    return pairs.Sides(
        ours=_repeat(steps["ours"], pair["ours"]["calls"]),
        theirs=_repeat(steps["theirs"], pair["theirs"]["calls"]),
        ours_output=steps["ours"].result(),
        theirs_output=steps["theirs"].result(),
        bound=tolerance(NUMERICS, spec),
        facts={"device": vars(backend.describe()), "effective": effective},
    )


def _repeat(step: Step, num_calls: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(num_calls):
            step()

    return repeated


if __name__ == "__main__":
    pairs.child_main(make_sides)
