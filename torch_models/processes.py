# torch: JAX drives all devices from one process; torch's data parallelism wants one process for each
"""The processes of data-parallel training: the caller's own is the first, and starts, feeds and ends the others.

Orders and shares of batches go down a pipe to each, so that a process whose first has died reads its end and stops,
and one that waits needs no time-out. Gradients and logits go between devices by torch.distributed: NCCL or Gloo.
"""

import contextlib
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from torch_models.layers import BatchNorm
from vitcmp.params import expected_shapes
from vitcmp.recipe import Recipe
from vitcmp.specs import BiTSpec, BiTV1Spec, ConvNeXtSpec, ResNetSpec, ViTDetSpec, ViTSpec

HOST = "127.0.0.1"
TIMEOUT = datetime.timedelta(minutes=30)  # of one exchange; a first step may compile
SPECS = {cls.family: cls for cls in (ViTSpec, ViTDetSpec, ResNetSpec, BiTSpec, BiTV1Spec, ConvNeXtSpec)}
LIBRARIES = {"cpu": "gloo", "gpu": "nccl"}


class Group:
    """What every one of the processes does together with the others."""

    def __init__(self, store: dist.TCPStore, *, rank: int, num_devices: int, platform: str) -> None:
        self.num_devices = num_devices
        options = {"store": store, "rank": rank, "world_size": num_devices, "timeout": TIMEOUT}
        dist.init_process_group(LIBRARIES[platform], **options)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the model with gradients averaged, and its weights taken from the first process.

        BatchNorm is brought to the statistics of the whole batch by SyncBatchNorm, which runs on GPUs only.
        """
        share_statistics(model)
        for param in model.parameters():
            if 1 in param.shape:  # a gradient's strides along it are arbitrary, of which DDP warns
                param.register_hook(lambda gradient: gradient.reshape(-1).view(gradient.shape))
        return nn.parallel.DistributedDataParallel(model)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x / self.num_devices

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the rows of all processes, in their order."""
        parts = [torch.empty_like(x) for _ in range(self.num_devices)]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Fills the tensors with those of the first process."""
        for x in tensors:
            dist.broadcast(x.detach(), 0)


class Processes(Group):
    """The first process: starts the others, each with `job`, and tells them what to do."""

    def __init__(self, num_devices: int, *, platform: str, job: dict[str, Any]) -> None:
        if dist.is_initialized():
            raise ValueError(
                f"num_devices={num_devices}: this process is in a process group of torch.distributed already; close() "
                "the trainer that has it, or train on one device"
            )
        store = dist.TCPStore(HOST, 0, num_devices, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        job = {**job, "port": store.port, "num_devices": num_devices, "platform": platform}
        job["num_threads"] = torch.get_num_threads()
        self.children = [_start({**job, "rank": rank}) for rank in range(1, num_devices)]
        self._wait_for_all(store)
        super().__init__(store, rank=0, num_devices=num_devices, platform=platform)

    def _wait_for_all(self, store: dist.TCPStore) -> None:
        """Waits until each has loaded torch and found its device: one that cannot is no reason to wait for ever."""
        for rank, child in enumerate(self.children, start=1):
            while not store.check([f"ready/{rank}"]):
                if child.poll() is not None:
                    for other in self.children:
                        other.kill()
                        _close_pipe(other)
                        other.wait()
                    raise RuntimeError(f"the process of device {rank} ended with exit code {child.wait()} at its start")
                time.sleep(0.05)

    def call(self, method: str, arrays: Iterable[np.ndarray]) -> None:
        """Has each of the others call a method of its trainer with its share, by the first axis, of each array."""
        for rank, child in enumerate(self.children, start=1):
            shares = [np.ascontiguousarray(array[rank]) for array in arrays]
            order = {"method": method, "arrays": [(share.dtype.str, share.shape) for share in shares]}
            try:
                _write_line(child.stdin, order)
                for share in shares:
                    child.stdin.write(share.data)
                child.stdin.flush()
            except BrokenPipeError:
                raise RuntimeError(f"the process of device {rank} ended with exit code {child.wait()}") from None

    def close(self) -> None:
        for child in self.children:
            _close_pipe(child)
        dist.destroy_process_group()
        for child in self.children:
            try:
                child.wait(timeout=60)
            except subprocess.TimeoutExpired:  # it waits for an exchange that will not come
                child.kill()
                child.wait()


def share_statistics(model: nn.Module) -> None:
    """Puts torch's SyncBatchNorm in the place of each BatchNorm, on its parameters and statistics."""
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, BatchNorm):
                shared = nn.SyncBatchNorm(len(norm.weight), eps=norm.eps, momentum=norm.momentum).to(norm.weight.device)
                shared.weight, shared.bias = norm.weight, norm.bias
                shared.running_mean, shared.running_var = norm.running_mean, norm.running_var
                setattr(module, name, shared)


def _start(job: dict[str, Any]) -> Any:
    """Starts a process that knows its job; a session of its own, because Ctrl-C is for the first process alone."""
    command = [sys.executable, "-c", "from torch_models.processes import work; work()"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child: Any = subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    _write_line(child.stdin, job)
    child.stdin.flush()
    return child


def _write_line(pipe: Any, value: Any) -> None:
    pipe.write(json.dumps(value).encode() + b"\n")


def _close_pipe(child: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has ended by itself
        child.stdin.close()


def work() -> None:
    """Does the job that stdin names first, and then what it says line by line, until it ends."""
    from torch_models.backend import make_backend  # here, because it imports this module

    job = json.loads(sys.stdin.buffer.readline())
    torch.set_num_threads(job["num_threads"])
    if job["platform"] == "gpu":
        torch.cuda.set_device(job["rank"])
    store = dist.TCPStore(HOST, job["port"], is_master=False, timeout=TIMEOUT)
    axes = {"num_devices": job["num_devices"], "platform": job["platform"]}
    backend = make_backend(job["platform"])
    with backend.numerics(job["recipe"]["numerics"]):
        store.set(f"ready/{job['rank']}", "")
        group = Group(store, rank=job["rank"], **axes)
        spec, recipe = SPECS[job["family"]](**job["spec"]), Recipe(**job["recipe"])
        nothing = {name: np.zeros(shape, np.float32) for name, shape in expected_shapes(spec).items()}
        options = {"attention": job["attention"], "compile": job["compile"]}
        trainer = backend.make_trainer(spec, nothing, recipe, **options, group=group)  # its weights come with the group
        for method, arrays in _read_orders(sys.stdin.buffer):
            getattr(trainer, method)(*arrays)
            trainer.pending.clear()  # the first process has the figures
    dist.destroy_process_group()


def _read_orders(pipe: Any) -> Iterator[tuple[str, list[np.ndarray]]]:
    for line in iter(pipe.readline, b""):
        order = json.loads(line)
        arrays = [np.empty(shape, dtype) for dtype, shape in order["arrays"]]
        for array in arrays:
            if pipe.readinto(array.reshape(-1).view(np.uint8)) < array.nbytes:
                return  # the first process died while it wrote
        yield order["method"], arrays
