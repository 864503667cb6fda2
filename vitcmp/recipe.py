"""How a model is trained: the recipe, the trainer that both frameworks implement, and what they check alike."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from vitcmp.params import Weights, check_shapes, expected_params
from vitcmp.specs import Spec

OPTIMIZERS = ("adamw", "sgd")
# What an optimizer keeps of each parameter: AdamW the means of the gradient and of its square, SGD the momentum.
MOMENTS = {"adamw": ("moment1", "moment2"), "sgd": ("moment1",)}
STATISTICS = ("mean", "var")  # kinds of leaves that no gradient moves
PIXELS = (np.uint8, np.float32, np.float64)
State = dict[str, np.ndarray]


class Diverged(ArithmeticError):
    """The loss or the gradient of a step is not finite; `step` is the first such step."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a training run but the model, its first weights and the batches.

    AdamW is arXiv:1711.05101, Algorithm 2, with the decay multiplied by the learning rate, as torch and optax have it
    (big_vision multiplies it by the schedule alone: its 1e-4 at a learning rate of 1e-3 is 0.1 here). SGD's decay is
    L2, added to the gradient before the momentum. Either decays the leaves named `kernel` only, as big_vision does: no
    norms, biases, tokens and position embeddings. Labels are smoothed as in arXiv:1512.00567, section 7.
    """

    total_steps: int
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3  # the highest
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's
    eps: float = 1e-8  # AdamW's, outside of the root
    momentum: float = 0.9  # SGD's
    weight_decay: float = 0.0
    warmup_steps: int = 0
    clip_norm: float | None = None  # of all gradients together
    label_smoothing: float = 0.0
    accumulate: int = 1  # micro-batches of a step; BatchNorm sees each by itself
    num_questions: int = 1  # an image; the head's outputs are read as (b, num_questions, answers)
    numerics: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        counts = ("total_steps", "warmup_steps", "accumulate", "num_questions")
        faults = [f"{name}={value!r}, expected a whole number" for name, value in _fields(self, counts, int)]
        numbers = ("learning_rate", "eps", "momentum", "weight_decay", "clip_norm", "label_smoothing")
        faults += [f"{name}={value!r}, expected a number" for name, value in _fields(self, numbers, (int, float))]
        faults = faults or [f"{name}={getattr(self, name)!r}, expected {allowed}" for name, allowed in self._faults()]
        if faults:
            raise ValueError(f"recipe: {'; '.join(faults)}")

    def _faults(self) -> list[tuple[str, str]]:
        clips, betas = self.clip_norm, self.betas
        rules = (
            ("optimizer", self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS)),
            ("total_steps", self.total_steps >= 1, "1 or more"),
            ("warmup_steps", 0 <= self.warmup_steps < max(self.total_steps, 1), "from 0 to less than total_steps"),
            ("accumulate", self.accumulate >= 1, "1 or more"),
            ("num_questions", self.num_questions >= 1, "1 or more"),
            ("learning_rate", 0 <= self.learning_rate < math.inf, "0 or more"),
            ("betas", len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers from 0 to less than 1"),
            ("eps", 0 < self.eps < 1, "between 0 and 1"),
            ("momentum", 0 <= self.momentum < 1, "from 0 to less than 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("clip_norm", clips is None or 0 < clips < math.inf, "None or more than 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to less than 1"),
        )
        return [(name, allowed) for name, holds, allowed in rules if not holds]

    def learning_rate_at(self, step: int) -> float:
        """Returns the rate of step 0, 1 ...: linear from 0 to the highest, then half a cosine to 0 at `total_steps`.

        As optax.warmup_cosine_decay_schedule and big_vision: with a warm-up, step 0 moves nothing but the moments.
        """
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.learning_rate * (1 + math.cos(math.pi * min(progress, 1))) / 2


class StepStats(NamedTuple):
    step: int  # the first is 0
    loss: float  # mean over images and questions, smoothing included
    gradient_norm: float  # of all gradients together, before clipping


class Trainer(Protocol):
    """A model with its optimizer on one or more devices; made by `backend.trainer`.

    It is made and used inside `with backend.numerics(recipe.numerics)`; elsewhere, what computes raises ValueError.
    Images are pixels (b h w 3): uint8, or floats where nothing was rounded; the model sees x / 127.5 - 1. Labels are
    ints (b k).
    """

    step: int  # how many are done

    def train(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Takes one optimizer step; may return before the device is done.

        Raises ValueError for a batch that does not fit the model, the recipe or the number of devices, and after
        `total_steps`.
        """

    def drain(self) -> list[StepStats]:
        """Waits for the device, and returns the figures of every step since the last call; Diverged where one is not
        finite, which is found here and not in `train`: call it every few steps."""

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Returns logits (b k answers), float32 at least, in evaluation mode; any b from 1."""

    def state(self) -> State:
        """Returns what the run needs to go on bit-exactly, as arrays of float32 at least that share no memory with it.

        `step`, `params/NAME` and `moment1/NAME`, `moment2/NAME`, in canonical names and layouts: either framework goes
        on with it. What is not in it is the recipe and the order of the batches.
        """

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from a state of this model and optimizer; one ValueError lists every array that does not fit."""

    def weights(self) -> Weights: ...

    def memory(self) -> dict[str, Any]:
        """Returns parameters_bytes and optimizer_bytes of one device, and activation_peak_bytes of a train step and
        process_peak_bytes, each with its source, and None where it is not known."""

    def close(self) -> None:
        """Frees the other devices; the trainer is of no use after it. With one device nothing needs it."""


def check_batch(images: np.ndarray, labels: np.ndarray, *, spec: Spec, recipe: Recipe, num_devices: int) -> None:
    """Raises one ValueError that says all that is wrong with a batch to train on."""
    num_answers = spec.num_classes // recipe.num_questions
    faults = _image_faults(images, spec)
    size, share = len(images), num_devices * recipe.accumulate
    if labels.shape != (size, recipe.num_questions) or labels.dtype.kind not in "iu":
        expected = f"ints of ({size}, {recipe.num_questions}): (batch, questions)"
        faults.append(f"labels are {labels.dtype} of shape {labels.shape}, expected {expected}")
    elif size and not 0 <= labels.min() <= labels.max() < num_answers:
        faults.append(f"labels run from {labels.min()} to {labels.max()}, expected 0 to {num_answers - 1}")
    if size % share or not size:
        faults.append(
            f"a batch of {size} images cannot be shared by num_devices={num_devices} x accumulate={recipe.accumulate}; "
            f"allowed: a multiple of {share}"
        )
    if faults:
        raise ValueError("; ".join(faults))


def check_images(images: np.ndarray, *, spec: Spec) -> None:
    if faults := _image_faults(images, spec):
        raise ValueError("; ".join(faults))


def _image_faults(images: np.ndarray, spec: Spec) -> list[str]:
    shape = (*spec.image_size, 3)
    if images.ndim == 4 and images.size and images.shape[1:] == shape and images.dtype in PIXELS:
        return []
    return [f"images are {images.dtype} of shape {images.shape}, expected 1 or more of {shape}, uint8 or floats"]


def param_names(spec: Spec) -> list[str]:
    """Returns the canonical names of what an optimizer moves."""
    return [name for name, leaf in expected_params(spec).items() if leaf.kind not in STATISTICS]


def check_state(state: Mapping[str, np.ndarray], *, spec: Spec, recipe: Recipe) -> None:
    """Raises one ValueError that lists every array that is not a state's of this model and optimizer."""
    leaves = expected_params(spec)
    shapes: dict[str, tuple[int, ...]] = {"step": ()}
    shapes |= {f"params/{name}": leaf.shape for name, leaf in leaves.items()}
    shapes |= {f"{kind}/{name}": leaves[name].shape for kind in MOMENTS[recipe.optimizer] for name in param_names(spec)}
    check_shapes(state, shapes, f"a state of {recipe.optimizer} and {spec}", source="state")
    step = int(state["step"])
    if not 0 <= step <= recipe.total_steps:
        raise ValueError(f"state: step={step} must be from 0 to total_steps={recipe.total_steps}")


def check_finite(stats: list[StepStats], recipe: Recipe) -> list[StepStats]:
    """Returns the figures; raises Diverged where one is not finite."""
    for step, loss, norm in stats:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(
                f"step {step}: the loss is {loss:g} and the gradient's norm {norm:g}; lower learning_rate="
                f"{recipe.learning_rate:g}, lengthen warmup_steps={recipe.warmup_steps}, or set clip_norm="
                f"{recipe.clip_norm} lower",
                step=step,
            )
    return stats


def _fields(recipe: Recipe, names: tuple[str, ...], types: Any) -> list[tuple[str, Any]]:
    """Returns the fields that are of another type; a bool is no number, and None is left to the rules."""
    values = ((name, getattr(recipe, name)) for name in names)
    wrong = [(name, value) for name, value in values if not isinstance(value, types) or isinstance(value, bool)]
    return [(name, value) for name, value in wrong if (name, value) != ("clip_norm", None)]
