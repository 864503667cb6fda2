"""What of a run is on the disk while it lasts: the state of its last epoch with its curve, and its progress."""

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.capacity.schema import run_id
from vitcmp.recipe import State, StepStats
from vitcmp.stats import median, median_interval

SHOW_EVERY_S = 0.5


class Checkpoint:
    """The trainer's state and the curve so far, replaced in one step; whoever is killed goes on from there."""

    def __init__(self, folder: str | Path, run: Mapping[str, Any]) -> None:
        name = run_id(run)[:16]
        self.path = Path(folder) / "checkpoints" / f"{name}.npz"
        self.progress_path = progress_path(folder, run)
        self.state: State = {}
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.step_s: list[float] = []
        self.evaluations: list[dict[str, float]] = []
        self.input_bound_share: float | None = None
        self.shown_s = 0.0

    @property
    def curve(self) -> dict[str, list[float]]:
        return {"loss": self.losses, "gradient_norm": self.norms}

    def load(self) -> bool:
        """Reads the state of the last epoch; False where there is none, or none that can be read."""
        with contextlib.suppress(OSError, ValueError, KeyError), np.load(self.path, allow_pickle=False) as file:
            kept = json.loads(str(file["meta"]))
            state = {name.removeprefix("state/"): file[name] for name in file.files if name != "meta"}
            self.state = state
            self.losses, self.norms, self.step_s = kept["losses"], kept["norms"], kept["step_s"]
            self.evaluations, self.input_bound_share = kept["evaluations"], kept["input_bound_share"]
            return True
        return False

    def save(self, state: State, input_bound_share: float) -> None:
        self.input_bound_share = input_bound_share
        names = ("losses", "norms", "step_s", "evaluations", "input_bound_share")
        meta = json.dumps({name: getattr(self, name) for name in names})
        arrays: dict[str, Any] = {"meta": np.array(meta)} | {f"state/{name}": array for name, array in state.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)

    def add(self, stats: Sequence[StepStats], step_s: float | None) -> None:
        self.losses += [each.loss for each in stats]
        self.norms += [each.gradient_norm for each in stats]
        self.step_s += [] if step_s is None else [step_s]

    def add_evaluation(self, **evaluation: float) -> None:
        self.evaluations.append(evaluation)

    def results(self) -> dict[str, Any]:
        """Returns what of a record the training gives."""
        return {
            "curve": self.curve,
            "evaluations": self.evaluations,
            "step_s": summarise_steps(self.step_s),
            "input_bound_share": self.input_bound_share,
        }

    def show_progress(self, step: int, total_steps: int) -> None:
        """Writes how far the run is, for the parent to show; at most twice a second."""
        now = time.monotonic()
        if now - self.shown_s < SHOW_EVERY_S:
            return
        self.shown_s = now
        accuracy = self.evaluations[-1]["accuracy"] if self.evaluations else None
        said = {"step": step, "total_steps": total_steps, "loss": self.losses[-1], "accuracy": accuracy}
        self.progress_path.parent.mkdir(parents=True, exist_ok=True)
        part = self.progress_path.with_suffix(".part")
        part.write_text(json.dumps(said))
        part.replace(self.progress_path)

    def remove(self) -> None:
        for path in (self.path, self.progress_path):
            path.unlink(missing_ok=True)


def progress_path(folder: str | Path, run: Mapping[str, Any]) -> Path:
    return Path(folder) / "progress" / f"{run_id(run)[:16]}.json"


def summarise_steps(seconds: list[float]) -> dict[str, Any] | None:
    """Returns the median time of a step with its 95 % interval, from windows of steps; None where nothing was timed."""
    if not seconds:
        return None
    low, high = median_interval(seconds)
    return {"median": median(seconds), "low": low, "high": high, "num_steps": len(seconds)}
