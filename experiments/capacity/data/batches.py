"""Batches of a dataset, decoded and resized in threads ahead of the trainer, in an order that a seed decides."""

import collections
import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from experiments.capacity.data.dataset import Dataset
from experiments.capacity.data.pipeline import Augment, Preprocess, draw, order
from vitcmp.environment import num_cpus


class Batch(NamedTuple):
    """`images` (b, h, w, 3) uint8, or float32 in [0, 255]; `labels` (b, k) int64; `ids` (b,) int64, dataset indices."""

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


class Batches:
    """The batches of training, epoch after epoch and without end, or of one evaluation.

    Training batches of epoch e are in `order(seed, e)`, and an epoch's last incomplete batch is dropped; an evaluation
    is in the dataset's order and keeps its last batch. Iterating starts at `start_step`, exactly as if the steps
    before had been taken. It may be iterated any number of times, and what was decoded once stays in memory up to
    `cache_bytes`: the resized images, or, where crops are drawn, the decoded ones. Raises ValueError for a batch that
    no epoch fills and for other arguments out of range.
    """

    def __init__(
        self,
        dataset: Dataset,
        preprocess: Preprocess,
        *,
        batch_size: int,
        seed: int = 0,
        is_training: bool = True,
        start_step: int = 0,
        augment: Augment | None = None,
        num_threads: int | None = None,
        prefetch: int = 2,
        cache_bytes: int = 2 << 30,
    ) -> None:
        self.dataset, self.preprocess, self.batch_size, self.seed = dataset, preprocess, batch_size, seed
        self.is_training, self.start_step, self.prefetch = is_training, start_step, prefetch
        self.augment = augment if augment is not None and is_training else Augment()
        self.num_threads = num_cpus() if num_threads is None else num_threads
        self._check()
        self._cache = _Cache(cache_bytes)
        self.waited_s = self.wall_s = 0.0

    @property
    def steps_per_epoch(self) -> int:
        num, size = len(self.dataset), self.batch_size
        return num // size if self.is_training else -(-num // size)

    @property
    def input_bound_share(self) -> float:
        """The share of the time between the first batch asked for and the last that the trainer waited for batches."""
        return self.waited_s / self.wall_s if self.wall_s else 0.0

    @property
    def cached_bytes(self) -> int:
        return self._cache.num_bytes

    def __iter__(self) -> Iterator[Batch]:
        wanted = self._indices()
        pending: collections.deque[_Pending] = collections.deque()
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="images")
        start, wall_before_s = time.perf_counter(), self.wall_s
        try:
            while True:
                while len(pending) <= self.prefetch and (step := next(wanted, None)) is not None:
                    pending.append(self._submit(pool, *step))
                if not pending:
                    return
                asked = time.perf_counter()
                batch = pending.popleft().wait()
                now = time.perf_counter()
                self.waited_s += now - asked
                self.wall_s = wall_before_s + now - start
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _indices(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (epoch, dataset indices) of each step."""
        step, per_epoch = self.start_step, self.steps_per_epoch
        while self.is_training or step < per_epoch:
            epoch, first = divmod(step, per_epoch)
            num = len(self.dataset)
            ranked = order(self.seed, epoch, num) if self.is_training else np.arange(num)
            for i in range(first, per_epoch):
                yield epoch, ranked[i * self.batch_size : (i + 1) * self.batch_size]
            step = (epoch + 1) * per_epoch

    def _submit(self, pool: ThreadPoolExecutor, epoch: int, indices: np.ndarray) -> "_Pending":
        num, side = len(indices), self.preprocess.compute
        images: np.ndarray = np.empty((num, side, side, 3), self.preprocess.dtype)
        labels = np.empty((num, self.dataset.num_questions), np.int64)
        batch = Batch(images, labels, indices.astype(np.int64))
        return _Pending(batch, [pool.submit(self._fill, batch, i, epoch) for i in range(num)])

    def _fill(self, batch: Batch, i: int, epoch: int) -> None:
        index = int(batch.ids[i])
        image, batch.labels[i] = self._cache.get(index) or self._read(index)
        draws = draw(self.seed, epoch, index) if self.augment != Augment() else np.empty(0)
        if self.augment.crop_area is not None:
            image = self.preprocess(self.augment.crop(image, draws))
        batch.images[i] = self.augment.mirror(image, draws)

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        example = self.dataset[index]
        image = example.image if self.augment.crop_area is not None else self.preprocess(example.image)
        image = np.ascontiguousarray(image)  # a view would keep the whole picture in memory
        self._cache.put(index, (image, example.label))
        return image, example.label

    def _check(self) -> None:
        least = {"batch_size": 1, "start_step": 0, "num_threads": 1, "prefetch": 0, "seed": 0}
        faults = [f"{name}={getattr(self, name)} must be {low} or more" for name, low in least.items()
                  if getattr(self, name) < low]  # fmt: skip
        if self.is_training and self.batch_size > len(self.dataset):
            faults.append(f"batch_size={self.batch_size} is more than the {len(self.dataset)} images of "
                          f"{self.dataset.name}, split {self.dataset.split}")  # fmt: skip
        if faults:
            raise ValueError("; ".join(faults))


@dataclasses.dataclass(frozen=True)
class _Pending:
    batch: Batch
    parts: list[Future[None]]

    def wait(self) -> Batch:
        for part in self.parts:
            part.result()
        return self.batch


class _Cache:
    """Examples by index, until they fill `limit` bytes; then no more are kept."""

    def __init__(self, limit: int) -> None:
        self.limit, self.num_bytes = limit, 0
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        return self._kept.get(index)

    def put(self, index: int, example: tuple[np.ndarray, np.ndarray]) -> None:
        size = sum(array.nbytes for array in example)
        with self._lock:
            if index not in self._kept and self.num_bytes + size <= self.limit:
                self._kept[index] = example
                self.num_bytes += size
