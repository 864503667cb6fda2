"""The child of experiments.capacity: trains the arms of one seed, one after the other; each ends as a record.

It reads a request on standard input, and appends the records to the store itself, so that what is finished stays when
it is killed. Beside the store lie a run's checkpoint, of its last epoch, and its progress, which the parent shows.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.capacity.arms import Arm, arm_weights, carry_weights, make_arms
from experiments.capacity.checkpoint import Checkpoint
from experiments.capacity.data.batches import Batches
from experiments.capacity.data.dataset import Dataset
from experiments.capacity.data.pipeline import Augment, Preprocess
from experiments.capacity.data.sources import open_dataset
from experiments.capacity.plan import Local, first_weights, recipe_of, spec_of
from experiments.capacity.schema import SCHEMA, Record, new_final, new_record, validate
from vitcmp.backend import Backend, load_backend
from vitcmp.cases import timestamp
from vitcmp.environment import describe_environment
from vitcmp.params import count_params
from vitcmp.recipe import Trainer
from vitcmp.records import RecordStore
from vitcmp.specs import parse_image_size
from vitcmp.worker import Stages, die_with_parent, failures_recorded

WINDOW = 10  # steps between two looks at the losses, which wait for the device
EVALUATE_BATCH = 256


def main() -> None:
    job = json.loads(sys.stdin.read())
    die_with_parent(job["parent_pid"])
    if job["cpus"]:
        os.sched_setaffinity(0, job["cpus"])
    local = Local(**job["local"])
    store = RecordStore(local.folder, schema=SCHEMA, validate=validate)
    for run in job["runs"]:
        store.append(Training(run, local).record())
        Checkpoint(local.folder, run).remove()


@dataclasses.dataclass
class Training:
    """One run: its identity (`schema.RUN_KEYS`), and where things are on this machine."""

    run: Mapping[str, Any]
    local: Local

    def __post_init__(self) -> None:
        self.recipe, self.arms = recipe_of(self.run), make_arms(spec_of(self.run), self.run["low"], self.run["high"])
        self.arm, self.stages = self.arms[self.run["arm"]], Stages()
        self.checkpoint = Checkpoint(self.local.folder, self.run)
        self.tests: dict[Preprocess, Batches] = {}

    def record(self) -> Record:
        """Trains and tests; whatever goes wrong becomes the record's status and error."""
        record = new_record(self.run) | {"environment": describe_environment()}
        with failures_recorded(record, self.stages):
            record |= self._results()
            record["status"] = "ok"
        if record["error"] and record["error"]["type"] == "Diverged":
            record["status"] = "diverged"
            record["curve"] = self.checkpoint.curve
        return {**record, "stages_s": self.stages.seconds, "ended_at": timestamp()}

    def _results(self) -> dict[str, Any]:
        with self.stages.stage("data"):
            train, test = (self._open(split) for split in ("train", "test"))
        backend = load_backend(self.run["backend"], platform=self.run["platform"])
        with backend.numerics(self.recipe.numerics) as effective:
            trainer = self._make_trainer(backend, self.arm, first_weights(self.run, self.local))
            try:
                self._train(trainer, train, test)
                with self.stages.stage("test"):
                    tested = evaluate(trainer, self._test_batches(test, self.arm))
                    final = new_final(*tested, examples_sha256=self.run["data"]["test_sha256"])
                with self.stages.stage("cross"):
                    cross = self._cross(backend, trainer, test) if self.local.cross else None
                memory = trainer.memory()
            finally:
                trainer.close()
        return {
            **self.checkpoint.results(),
            "final": final,
            "cross": cross,
            "flops": self.arm.flops,
            "num_params": count_params(self.arm.spec),
            "memory": memory,
            "device": vars(backend.describe()),
            "effective": effective,
        }

    def _open(self, split: str) -> Dataset:
        name, data = self.run["dataset"], self.run["data"]
        return open_dataset(name, data[split], data_dir=self.local.data_dir, mnist_dir=self.local.mnist_dir)

    def _make_trainer(self, backend: Backend, arm: Arm, weights: Mapping[str, np.ndarray]) -> Trainer:
        with self.stages.stage("build"):
            options = {"attention": self.run["attention"], "num_devices": self.run["num_devices"]}
            base = dataclasses.replace(spec_of(self.run), image_size=parse_image_size(self.run["low"]))
            return backend.trainer(arm.spec, arm_weights(weights, base, arm), self.recipe, **options)

    def _test_batches(self, test: Dataset, arm: Arm) -> Batches:
        """Returns the test set as the arm sees it; kept, because it is gone through after each epoch."""
        preprocess = make_preprocess(arm, self.run["preprocessing"])
        if preprocess not in self.tests:
            self.tests[preprocess] = Batches(test, preprocess, batch_size=EVALUATE_BATCH, is_training=False)
        return self.tests[preprocess]

    def _train(self, trainer: Trainer, train: Dataset, test: Dataset) -> None:
        """Takes every step of the recipe, from the last checkpoint on; tests and saves after each epoch."""
        kept, recipe = self.checkpoint, self.run["recipe"]
        if kept.load():
            trainer.load_state(kept.state)
        augment = Augment(**self.run["preprocessing"]["augment"])
        batches = Batches(
            train,
            make_preprocess(self.arm, self.run["preprocessing"]),
            batch_size=recipe["batch_size"],
            seed=self.run["seed"],
            start_step=trainer.step,
            augment=augment,
        )
        with self.stages.stage("train"):
            clock = StepClock(batches)
            for batch in batches if trainer.step < self.recipe.total_steps else ():
                trainer.train(batch.images, batch.labels)
                is_epoch = trainer.step % batches.steps_per_epoch == 0 or trainer.step == self.recipe.total_steps
                if trainer.step % WINDOW == 0 or is_epoch:
                    kept.add(trainer.drain(), clock.window(trainer.step))
                    kept.show_progress(trainer.step, self.recipe.total_steps)
                if is_epoch:
                    self._end_epoch(trainer, test, batches)
                    clock.restart()
                if trainer.step == self.recipe.total_steps:
                    break

    def _end_epoch(self, trainer: Trainer, test: Dataset, batches: Batches) -> None:
        correct, losses = evaluate(trainer, self._test_batches(test, self.arm))
        self.checkpoint.add_evaluation(
            epoch=trainer.step / batches.steps_per_epoch,
            step=trainer.step,
            accuracy=float(correct.mean()),
            loss=float(losses.mean()),
        )
        self.checkpoint.save(trainer.state(), batches.input_bound_share)

    def _cross(self, backend: Backend, trainer: Trainer, test: Dataset) -> dict[str, dict[str, float]]:
        """Tests the model as every other arm: its weights carried to that arm's sizes, images as that arm sees them."""
        found = {}
        weights = trainer.weights()
        for name, other in self.arms.items():
            if name == self.arm.name:
                continue
            if other.spec == self.arm.spec:
                correct, losses = evaluate(trainer, self._test_batches(test, other))
            else:
                carried = carry_weights(weights, self.arm, other)
                carrier = backend.trainer(other.spec, carried, self.recipe, attention=self.run["attention"])
                correct, losses = evaluate(carrier, self._test_batches(test, other))
            found[name] = {"accuracy": float(correct.mean()), "loss": float(losses.mean())}
        return found


class StepClock:
    """The time of a step between two looks at the losses, less the wait for images; nothing of the first look."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.is_warm = batches, False
        self.restart()

    def restart(self) -> None:
        self.step: int | None = None
        self.start_s, self.waited_s = time.perf_counter(), self.batches.waited_s

    def window(self, step: int) -> float | None:
        """Returns seconds per step since the last look; None for the first, which compiles, and after an evaluation."""
        now, waited = time.perf_counter(), self.batches.waited_s
        seconds, steps = now - self.start_s - (waited - self.waited_s), step - (self.step or step)
        self.step, self.start_s, self.waited_s = step, now, waited
        is_warm, self.is_warm = self.is_warm, True
        return seconds / steps if steps and is_warm else None


def make_preprocess(arm: Arm, settings: Mapping[str, Any]) -> Preprocess:
    """Returns what the arm does to an image; arms are square here (`plan.check_setting`)."""
    options = {name: settings[name] for name in ("method", "antialias", "truncate", "stretch")}
    return Preprocess(information=arm.sizes[0][0], compute=arm.sizes[-1][0], **options)


def evaluate(trainer: Trainer, batches: Batches) -> tuple[np.ndarray, np.ndarray]:
    """Returns for every test example whether all its questions are answered right, and its loss: (m,) and (m,)."""
    correct, losses = [], []
    for batch in batches:
        logits = trainer.predict(batch.images).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses.append(-np.take_along_axis(log_probs, batch.labels[..., None], axis=-1)[..., 0].mean(axis=1))
        correct.append((logits.argmax(axis=-1) == batch.labels).all(axis=1))
    return np.concatenate(correct), np.concatenate(losses)


if __name__ == "__main__":
    main()
