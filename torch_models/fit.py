"""Training: optimizer steps by a recipe, on one or more devices, with figures, evaluation and a state to go on from."""

import contextlib
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from torch_models.params import export_params, from_torch, to_torch, torch_name
from torch_models.processes import Group, Processes
from vitcmp.backend import require_open
from vitcmp.environment import peak_rss_bytes
from vitcmp.params import Weights, expected_params
from vitcmp.recipe import (
    MOMENTS,
    Recipe,
    State,
    StepStats,
    check_batch,
    check_finite,
    check_images,
    check_state,
    param_names,
)

# What torch calls what an optimizer keeps.
MOMENT_NAMES = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


class Trainer:
    """Trains a model by data parallelism: parameters on every device, each batch in equal shares.

    torch: a process for each device; this one is the first, and the others do what it tells them.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        engine: Any,  # the backend
        group: Group | None = None,
    ) -> None:
        self.spec, self.recipe, self.engine = model.spec, recipe, engine
        self.compute_dtype, self.device = model.compute_dtype, engine.device
        self.num_devices = group.num_devices if group else 1
        self.step = 0
        self.pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.model, self.group = model, group
        self.params = dict(zip(param_names(model.spec), named_params(model), strict=True))
        self.rule = make_optimizer(self.params, recipe)
        fill_moments(self.rule, recipe)
        # torch: what runs is the model in its wrapper, which averages the gradients; what is read is the model itself
        self.runner = group.wrap(model) if group else model
        self.release = weakref.finalize(self, group.close) if isinstance(group, Processes) else lambda: None

    def train(self, images: np.ndarray, labels: np.ndarray) -> None:
        require_open(self.recipe.numerics, self.engine.open_numerics)
        if self.step >= self.recipe.total_steps:
            raise ValueError(f"step {self.step} is past the recipe's total_steps={self.recipe.total_steps}")
        check_batch(images, labels, spec=self.spec, recipe=self.recipe, num_devices=self.num_devices)
        self.train_share(*self._tell("train_share", *self._share(images, labels)))

    def train_share(self, images: np.ndarray, labels: np.ndarray) -> None:
        # torch: what each process does of a step; images are (micro-batch, image, ...)
        self.model.train()
        loss = torch.zeros((), dtype=_wide(self.compute_dtype), device=self.device)
        for i in range(self.recipe.accumulate):
            is_last = i == self.recipe.accumulate - 1
            with contextlib.nullcontext() if is_last or not self.group else self.runner.no_sync():
                logits = self.runner(self._put_images(images[i]))
                answers = read_answers(logits, self.recipe.num_questions)
                targets = torch.from_numpy(labels[i]).to(self.device)
                part = loss_fn(answers, targets, self.recipe.label_smoothing) / self.recipe.accumulate
                part.backward()
                loss += part.detach()
        norm = clip_gradients(self.params.values(), self.recipe.clip_norm)
        for group in self.rule.param_groups:
            group["lr"] = self.recipe.learning_rate_at(self.step)
        self.rule.step()
        self.rule.zero_grad(set_to_none=True)
        self.pending.append((self.step, self.group.mean(loss) if self.group else loss, norm))
        self.step += 1

    def drain(self) -> list[StepStats]:
        pending, self.pending = self.pending, []
        stats = [StepStats(step, loss.item(), norm.item()) for step, loss, norm in pending]
        return check_finite(stats, self.recipe)

    def predict(self, images: np.ndarray) -> np.ndarray:
        require_open(self.recipe.numerics, self.engine.open_numerics)
        check_images(images, spec=self.spec)
        rest = -len(images) % self.num_devices
        padded = np.concatenate([images, np.zeros((rest, *images.shape[1:]), images.dtype)]) if rest else images
        shares = self._tell("predict_share", padded.reshape(self.num_devices, -1, *images.shape[1:]))
        return self.predict_share(*shares).cpu().numpy()[: len(images)]

    def predict_share(self, images: np.ndarray) -> torch.Tensor:
        # torch: what each process does of an evaluation
        self.model.eval()
        with torch.inference_mode():
            logits = read_answers(self.model(self._put_images(images)), self.recipe.num_questions)
            return self.group.gather(logits) if self.group else logits

    def state(self) -> State:
        leaves = expected_params(self.spec)
        state = {"step": np.array(self.step), **{f"params/{name}": x for name, x in self.weights().items()}}
        for kind, theirs in zip(MOMENTS[self.recipe.optimizer], MOMENT_NAMES[self.recipe.optimizer], strict=True):
            for name, param in self.params.items():
                state[f"{kind}/{name}"] = _numpy(self.rule.state[param][theirs], leaves[name].kind)
        return state

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        require_open(self.recipe.numerics, self.engine.open_numerics)
        check_state(state, spec=self.spec, recipe=self.recipe)
        leaves, ours = expected_params(self.spec), self.model.state_dict()
        for name, leaf in leaves.items():
            self._fill(ours[torch_name(name)], state[f"params/{name}"], leaf.kind)
        for kind, theirs in zip(MOMENTS[self.recipe.optimizer], MOMENT_NAMES[self.recipe.optimizer], strict=True):
            for name, param in self.params.items():
                self._fill(self.rule.state[param][theirs], state[f"{kind}/{name}"], leaves[name].kind)
        self.step, self.pending = int(state["step"]), []
        self.share_state(*self._tell("share_state", np.full((self.num_devices, 1), self.step)))

    def share_state(self, step: np.ndarray) -> None:
        # torch: the first process has loaded the state, and every one has it from there
        self.step, self.pending = int(step[0]), []
        tensors = [*self.model.state_dict().values()]
        for kept in (self.rule.state[param] for param in self.params.values()):
            tensors += [kept[theirs] for theirs in MOMENT_NAMES[self.recipe.optimizer]]
            if self.recipe.optimizer == "adamw":
                kept["step"].fill_(self.step)
        if self.group:
            self.group.broadcast(tensors)

    def weights(self) -> Weights:
        return export_params(self.model, self.spec)

    def memory(self) -> dict[str, Any]:
        on_cpu = self.device.type == "cpu"
        kept = [x for state in self.rule.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        peak = peak_rss_bytes() if on_cpu else torch.cuda.max_memory_reserved(self.device)
        parameters_bytes = sum(x.nbytes for x in self.model.state_dict().values())
        optimizer_bytes = sum(x.nbytes for x in kept)
        activations, source = None, "unknown: the CPU's allocator keeps no count"
        if not on_cpu:  # torch: the gradients are in it, as in XLA's temporaries
            activations = torch.cuda.max_memory_allocated(self.device) - parameters_bytes - optimizer_bytes
            source = "CUDA allocator, allocated"
        return {
            "parameters_bytes": parameters_bytes,
            "optimizer_bytes": optimizer_bytes,
            "activation_peak_bytes": activations,
            "activation_source": source,
            "process_peak_bytes": peak,
            "process_source": "VmHWM" if on_cpu else "CUDA allocator, reserved",
        }

    def close(self) -> None:
        """Ends the other processes."""
        self.release()

    def _tell(self, method: str, *arrays: np.ndarray) -> list[np.ndarray]:
        # torch: sends the other processes their shares of the arrays, by their first axis; returns the first's
        if isinstance(self.group, Processes):
            self.group.call(method, arrays)
        return [array[0] for array in arrays]

    def _share(self, images: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
        """Returns the batch as (device, micro-batch, its images, ...), each micro-batch in equal shares."""
        shares = self.recipe.accumulate, self.num_devices, -1
        arrays = images, labels.astype(np.int64)
        return [array.reshape(*shares, *array.shape[1:]).swapaxes(0, 1) for array in arrays]

    def _put_images(self, images: np.ndarray) -> torch.Tensor:
        # torch: pixels travel as they are, from memory that the GPU reads while this process goes on
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        nhwc = normalise(pixels.to(self.device, non_blocking=True), self.compute_dtype)
        return nhwc.permute(0, 3, 1, 2).contiguous(memory_format=self.model.memory_format)

    def _fill(self, tensor: torch.Tensor, array: np.ndarray, kind: str) -> None:
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(to_torch(np.asarray(array), kind)))


def named_params(model: nn.Module) -> list[torch.Tensor]:
    # torch: the parameters in the order of their canonical names
    ours = dict(model.named_parameters())
    return [ours[torch_name(name)] for name in param_names(model.spec)]


def normalise(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Maps pixels from [0, 255] to [-1, 1], in float32 at least."""
    wide = images.to(_wide(dtype))
    return (wide / 127.5 - 1).to(dtype)


def read_answers(logits: torch.Tensor, num_questions: int) -> torch.Tensor:
    """Returns the head's outputs (b k*c) as (b k c), float32 at least."""
    wide = logits.to(_wide(logits.dtype))
    return wide.reshape(len(logits), num_questions, -1)


def loss_fn(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Mean cross-entropy of logits (b k c) and labels (b k), smoothed."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=label_smoothing)


def clip_gradients(params: Any, clip_norm: float | None) -> torch.Tensor:
    """Multiplies gradients by min(1, clip / norm), and returns their norm before, all together, in float32 at least."""
    gradients = [param.grad for param in params]
    wide = (x.to(_wide(x.dtype)) for x in gradients)
    norm = torch.stack([(x**2).sum() for x in wide]).sum().sqrt()
    if clip_norm is None:
        return norm
    factor = (clip_norm / norm).clamp(max=1)
    for x in gradients:
        x *= factor.to(x.dtype)
    return norm


def make_optimizer(params: dict[str, torch.Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """Returns the recipe's rule, whose learning rate is set at each step."""
    kernels = [param for name, param in params.items() if name.endswith("/kernel")]
    others = [param for name, param in params.items() if not name.endswith("/kernel")]
    groups = [{"params": kernels, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, recipe.learning_rate, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, recipe.learning_rate, betas=recipe.betas, eps=recipe.eps)


def fill_moments(rule: torch.optim.Optimizer, recipe: Recipe) -> None:
    # torch: moments are made at the first step; here before it, zero, so that a state has them always
    for param in (param for group in rule.param_groups for param in group["params"]):
        kept = {theirs: torch.zeros_like(param) for theirs in MOMENT_NAMES[recipe.optimizer]}
        rule.state[param] = kept | ({"step": torch.tensor(0.0)} if recipe.optimizer == "adamw" else {})


def _wide(dtype: torch.dtype) -> torch.dtype:
    # torch: a function, because promote_types is called with one more name than in JAX
    return torch.promote_types(dtype, torch.float32)


def _numpy(tensor: torch.Tensor, kind: str) -> np.ndarray:
    wide = tensor.detach().to("cpu", _wide(tensor.dtype), copy=True)
    return from_torch(wide.numpy(), kind)
