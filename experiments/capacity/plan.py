"""What is to be run: settings -> the identities of training runs, all checked before anything starts. No framework."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.capacity.arms import CELLS, make_arms, weights_sha256
from experiments.capacity.data.dataset import Dataset, spread
from experiments.capacity.data.pipeline import Augment, Preprocess
from experiments.capacity.data.sources import open_dataset
from vitcmp.backend import Device
from vitcmp.checkpoints import read_state, weights_id, weights_of
from vitcmp.infer import infer_spec
from vitcmp.initial import initial_weights
from vitcmp.params import Weights, expected_params
from vitcmp.recipe import Recipe
from vitcmp.specs import FOREIGN, Spec, format_image_size, get_spec, parse_image_size

SAMPLED = 64  # examples whose pixels are in a data set's fingerprint
SCRATCH = "scratch"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A model on a data set, in each arm and of each seed."""

    dataset: str
    model: str
    low: int
    high: int
    arms: tuple[str, ...] = tuple(CELLS)
    seeds: int = 3
    epochs: int = 10
    batch_size: int = 64
    train: str = "train"  # splits
    test: str = "test"
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of Recipe, but what follows from the data
    method: str = "bilinear"
    antialias: bool = True
    truncate: bool = True
    stretch: bool = True
    augment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attention: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """Where things are on this machine, and what decides no number."""

    folder: str
    data_dir: str
    mnist_dir: str | None = None
    weights: str | None = None
    cross: bool = True


@dataclasses.dataclass(frozen=True)
class Data:
    """The two splits of a data set, open, with their fingerprints."""

    train: Dataset
    test: Dataset

    @classmethod
    def open(cls, setting: Setting, local: Local) -> "Data":
        """Raises ValueError as `open_dataset`."""
        open_split = functools.partial(open_dataset, data_dir=local.data_dir, mnist_dir=local.mnist_dir)
        return cls(open_split(setting.dataset, setting.train), open_split(setting.dataset, setting.test))

    def describe(self) -> dict[str, Any]:
        return {
            "train": self.train.split,
            "test": self.test.split,
            "num_train": len(self.train),
            "num_test": len(self.test),
            "num_classes": self.train.num_classes,
            "num_questions": self.train.num_questions,
            "train_sha256": fingerprint(self.train),
            "test_sha256": fingerprint(self.test),
        }


def fingerprint(dataset: Dataset) -> str:
    """Returns the sha256 of how many examples there are, the classes, and some examples' ids, labels and pixels."""
    digest = hashlib.sha256(f"{len(dataset)} {dataset.num_questions} {dataset.class_names}".encode())
    for i in spread(len(dataset), SAMPLED):
        example = dataset[i]
        digest.update(f"{example.id} {example.label.tolist()} {example.image.shape}".encode())
        digest.update(np.ascontiguousarray(example.image).tobytes())
    return digest.hexdigest()


def make_runs(
    setting: Setting, data: Mapping[str, Any], device: Device, *, backend: str, local: Local, **machine: Any
) -> list[list[dict[str, Any]]]:
    """Returns for each seed the identities of its runs, one an arm; `machine` is num_devices and num_threads.

    Raises ValueError for what does not fit: arms, sizes, the recipe, weights of another model.
    """
    shared = {
        "backend": backend,
        "versions": _versions(device, get_spec(setting.model)),
        "platform": device.platform,
        "device_name": device.name,
        **machine,
        "dataset": setting.dataset,
        "data": dict(data),
        "preprocessing": describe_preprocessing(setting),
        "model": setting.model,
        "low": format_image_size(parse_image_size(setting.low)),
        "high": format_image_size(parse_image_size(setting.high)),
        "recipe": describe_recipe(setting, data["num_train"], data["num_questions"]),
        "attention": setting.attention,
    }
    arms = make_arms(spec_of(shared), setting.low, setting.high, setting.arms)
    runs = []
    for seed in range(setting.seeds):
        weights = describe_weights(shared, seed, local)
        of_seed = [shared | {"seed": seed, "arm": name, "weights": weights} for name in arms]
        runs.append([run | {"spec": describe_spec(arms[run["arm"]].spec)} for run in of_seed])
    return runs


def _versions(device: Device, spec: Spec) -> dict[str, str]:
    """Returns the versions of all that computes; of libraries of foreign models, the one that the model is of."""
    return {name: version for name, version in device.versions.items() if name not in FOREIGN or name == spec.family}


def describe_preprocessing(setting: Setting) -> dict[str, Any]:
    """Raises ValueError for an unknown method, and for a crop that is none."""
    names = ("method", "antialias", "truncate", "stretch")
    settings = {name: getattr(setting, name) for name in names}
    Preprocess(information=setting.low, compute=setting.high, **settings)
    return settings | {"augment": dataclasses.asdict(Augment(**setting.augment))}


def describe_recipe(setting: Setting, num_train: int, num_questions: int) -> dict[str, Any]:
    """Returns the recipe as JSON, with the batch size and the epochs; raises ValueError for one that cannot be."""
    if not 1 <= setting.batch_size <= num_train:
        raise ValueError(
            f"batch_size={setting.batch_size} must be from 1 to the {num_train} images of {setting.dataset}"
        )
    if setting.epochs < 1 or setting.seeds < 1:
        raise ValueError(f"epochs={setting.epochs} and seeds={setting.seeds} must be 1 or more")
    total_steps = setting.epochs * (num_train // setting.batch_size)
    recipe = Recipe(**{"total_steps": total_steps, "num_questions": num_questions, **setting.recipe})
    return dataclasses.asdict(recipe) | {"batch_size": setting.batch_size, "epochs": setting.epochs}


def recipe_of(run: Mapping[str, Any]) -> Recipe:
    fields = {field.name for field in dataclasses.fields(Recipe)}
    return Recipe(**{name: value for name, value in run["recipe"].items() if name in fields})


def spec_of(run: Mapping[str, Any]) -> Spec:
    """Returns the model of all arms, whose head answers every question of the data."""
    num_outputs = run["data"]["num_classes"] * run["data"]["num_questions"]
    return dataclasses.replace(get_spec(run["model"]), num_classes=num_outputs)


def describe_spec(spec: Spec) -> dict[str, Any]:
    return {"family": spec.family, **dataclasses.asdict(spec)}


def describe_weights(run: Mapping[str, Any], seed: int, local: Local) -> dict[str, str]:
    """Returns where the first weights are from, and the hash of what decides them."""
    if local.weights:
        return {"source": Path(local.weights).name, "sha256": weights_id(local.weights)}
    return {"source": SCRATCH, "sha256": weights_sha256(first_weights({**run, "seed": seed}, local))}


def first_weights(run: Mapping[str, Any], local: Local) -> Weights:
    """Returns what all arms of a seed start from, at the image size `low`: drawn from the seed, or a checkpoint's.

    A checkpoint's classifier is replaced by zeros, as big_vision does for a transfer; everything else must fit.
    """
    spec = dataclasses.replace(spec_of(run), image_size=parse_image_size(run["low"]))
    if not local.weights:
        return initial_weights(spec, run["seed"])
    state = read_state(local.weights)
    theirs = infer_spec(state, source=local.weights)
    weights = weights_of(state, dataclasses.replace(spec, num_classes=theirs.num_classes), source=local.weights)
    return with_new_head(weights, spec)


def with_new_head(weights: Weights, spec: Spec) -> Weights:
    """Returns the weights with a classifier of zeros for the classes of `spec`."""
    leaves, headless = expected_params(spec), expected_params(dataclasses.replace(spec, num_classes=0))
    head = {name: np.zeros(leaf.shape, np.float32) for name, leaf in leaves.items() if name not in headless}
    return {name: array for name, array in weights.items() if name in headless} | head
