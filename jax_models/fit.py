"""Training: optimizer steps by a recipe, on one or more devices, with figures, evaluation and a state to go on from."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_models.params import flax_name
from vitcmp.backend import require_open
from vitcmp.environment import peak_rss_bytes
from vitcmp.params import Weights, expected_params
from vitcmp.recipe import MOMENTS, Recipe, State, StepStats, check_batch, check_finite, check_images, check_state

Arrays = dict[str, jax.Array]  # by canonical name
# What optax calls what an optimizer keeps.
MOMENT_NAMES = {"adamw": ("mu", "nu"), "sgd": ("trace",)}


class Trainer:
    """Trains a model by data parallelism: parameters on every device, each batch in equal shares.

    jax: one program for all devices; XLA sums gradients, and BatchNorm's statistics, over the whole batch.
    """

    def __init__(
        self,
        model: nnx.Module,
        recipe: Recipe,
        *,
        engine: Any,  # the backend
        devices: list[jax.Device],
    ) -> None:
        self.spec, self.recipe, self.engine = model.spec, recipe, engine
        self.compute_dtype, self.num_devices, self.device = model.compute_dtype, len(devices), devices[0]
        self.step = 0
        self.pending: list[tuple[int, jax.Array, jax.Array]] = []
        mesh = Mesh(np.array(devices), ("devices",))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.shared = NamedSharding(mesh, PartitionSpec(None, "devices"))  # of (micro-batch, image, ...)
        apply, params, statistics = make_apply(model)
        self.rule = make_optimizer(recipe)
        params, statistics = jax.device_put((params, statistics), self.replicated)
        self.values = params, statistics, jax.jit(self.rule.init, out_shardings=self.replicated)(params)
        self.run_train = jax.jit(make_update(apply, self.rule, recipe), donate_argnums=0)
        self.run_predict = jax.jit(make_predict(apply, recipe))
        self.compiled: dict[tuple[Any, ...], Any] = {}  # by kind, shape and dtype: numerics are compiled in

    def train(self, images: np.ndarray, labels: np.ndarray) -> None:
        require_open(self.recipe.numerics, self.engine.open_numerics)
        if self.step >= self.recipe.total_steps:
            raise ValueError(f"step {self.step} is past the recipe's total_steps={self.recipe.total_steps}")
        check_batch(images, labels, spec=self.spec, recipe=self.recipe, num_devices=self.num_devices)
        rate = self.recipe.learning_rate_at(self.step)
        self.values, loss, norm = self._run("train", self.values, self._share(images), self._share(labels), rate)
        self.pending.append((self.step, loss, norm))
        self.step += 1

    def drain(self) -> list[StepStats]:
        pending, self.pending = self.pending, []
        stats = [StepStats(step, float(loss), float(norm)) for step, loss, norm in pending]
        return check_finite(stats, self.recipe)

    def predict(self, images: np.ndarray) -> np.ndarray:
        require_open(self.recipe.numerics, self.engine.open_numerics)
        check_images(images, spec=self.spec)
        rest = -len(images) % self.num_devices
        padded = np.concatenate([images, np.zeros((rest, *images.shape[1:]), images.dtype)]) if rest else images
        batch = jax.device_put(padded[None], self.shared, may_alias=False)
        return np.array(self._run("predict", self.values[:2], batch))[: len(images)]

    def state(self) -> State:
        params, _, moments = self.values
        state = {"step": np.array(self.step), **{f"params/{name}": x for name, x in self.weights().items()}}
        for kind, theirs in zip(MOMENTS[self.recipe.optimizer], MOMENT_NAMES[self.recipe.optimizer], strict=True):
            kept = optax.tree.get(moments, theirs)
            state |= {f"{kind}/{name}": _numpy(kept[name]) for name in params}
        return state

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        require_open(self.recipe.numerics, self.engine.open_numerics)
        check_state(state, spec=self.spec, recipe=self.recipe)
        params, statistics, moments = self.values
        new_params, new_statistics = (self._fill(state, "params", old) for old in (params, statistics))
        for kind, theirs in zip(MOMENTS[self.recipe.optimizer], MOMENT_NAMES[self.recipe.optimizer], strict=True):
            moments = optax.tree.set(moments, **{theirs: self._fill(state, kind, optax.tree.get(moments, theirs))})
        self.step, self.pending = int(state["step"]), []
        if self.recipe.optimizer == "adamw":
            count = jax.device_put(np.int32(self.step), self.replicated)
            moments = optax.tree.set(moments, count=count)
        self.values = new_params, new_statistics, moments

    def weights(self) -> Weights:
        params, statistics, _ = self.values
        arrays = params | statistics
        return {name: _numpy(arrays[name]) for name in expected_params(self.spec)}

    def memory(self) -> dict[str, Any]:
        params, statistics, moments = self.values
        on_cpu = self.device.platform == "cpu"
        peak = peak_rss_bytes() if on_cpu else (self.device.memory_stats() or {}).get("peak_bytes_in_use")
        analyses = [run.memory_analysis() for (kind, *_), run in self.compiled.items() if kind == "train"]
        temporaries = [x.temp_size_in_bytes + x.output_size_in_bytes - x.alias_size_in_bytes for x in analyses]
        return {
            "parameters_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves((params, statistics))),
            "optimizer_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(moments)),
            "activation_peak_bytes": max(temporaries, default=None),
            "activation_source": "XLA temp + output - alias" if temporaries else "unknown: no step was taken",
            "process_peak_bytes": peak,
            "process_source": "VmHWM" if on_cpu else "device peak_bytes_in_use",
        }

    def close(self) -> None:
        """jax: does nothing, because one process has all devices."""

    def _run(self, kind: str, values: Any, batch: jax.Array, *more: Any) -> Any:
        # jax: compiled ahead, so that memory() can ask what a step takes
        function = self.run_train if kind == "train" else self.run_predict
        if more:
            wide = jnp.promote_types(self.compute_dtype, jnp.float32)
            more = (*more[:-1], jax.device_put(np.asarray(more[-1], wide), self.replicated))
        key = kind, batch.shape, batch.dtype
        if key not in self.compiled:
            self.compiled[key] = function.lower(values, batch, *more).compile()
        return self.compiled[key](values, batch, *more)

    def _share(self, array: np.ndarray) -> jax.Array:
        """Returns the batch as (micro-batch, its images, ...), each micro-batch in equal shares."""
        micro = array.reshape(self.recipe.accumulate, -1, *array.shape[1:])
        return jax.device_put(micro, self.shared, may_alias=False)  # jax: the caller may write to it meanwhile

    def _fill(self, state: Mapping[str, np.ndarray], kind: str, old: Arrays) -> Arrays:
        return {
            name: jax.device_put(np.asarray(state[f"{kind}/{name}"]).astype(x.dtype), self.replicated, may_alias=False)
            for name, x in old.items()
        }


def make_apply(model: nnx.Module) -> tuple[Callable[..., tuple[jax.Array, Arrays]], Arrays, Arrays]:
    # jax: nnx's state as flat dicts, and the model as a function of them: (logits, the statistics that it keeps)
    slots = {flax_name(path): (path, variable) for path, variable in nnx.to_flat_state(nnx.state(model))}
    graphs = {}
    for is_training in (True, False):
        model.train() if is_training else model.eval()
        graphs[is_training] = nnx.split(model)[0]
    compute_dtype = model.compute_dtype

    def apply(params: Arrays, statistics: Arrays, images: jax.Array, *, is_training: bool) -> tuple[jax.Array, Arrays]:
        arrays = params | statistics
        filled = [(path, variable.replace(arrays[name])) for name, (path, variable) in slots.items()]
        net = nnx.merge(graphs[is_training], nnx.from_flat_state(filled), copy=True)
        logits = net(normalise(images, compute_dtype))
        kept = {flax_name(path): x.get_value() for path, x in nnx.to_flat_state(nnx.state(net, nnx.BatchStat))}
        return logits, kept

    values: tuple[Arrays, Arrays] = {}, {}
    for name, (_, variable) in slots.items():
        values[isinstance(variable, nnx.BatchStat)][name] = variable.get_value()
    return apply, *values


def normalise(images: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Maps pixels from [0, 255] to [-1, 1], in float32 at least."""
    wide = images.astype(jnp.promote_types(dtype, jnp.float32))
    return (wide / 127.5 - 1).astype(dtype)


def read_answers(logits: jax.Array, num_questions: int) -> jax.Array:
    """Returns the head's outputs (b k*c) as (b k c), float32 at least."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return wide.reshape(len(logits), num_questions, -1)


def loss_fn(logits: jax.Array, labels: jax.Array, label_smoothing: float) -> jax.Array:
    """Mean cross-entropy of logits (b k c) and labels (b k), smoothed."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def clip_gradients(gradients: Arrays, clip_norm: float | None) -> tuple[Arrays, jax.Array]:
    """Returns the gradients times min(1, clip / norm), and their norm before, all together, in float32 at least."""
    wide = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in gradients.values())
    norm = jnp.sqrt(sum((x**2).sum() for x in wide))
    if clip_norm is None:
        return gradients, norm
    factor = jnp.minimum(1, clip_norm / norm)
    return {name: x * factor.astype(x.dtype) for name, x in gradients.items()}, norm


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Returns the recipe's rule, whose updates are still to be multiplied by minus the learning rate."""
    decay = optax.add_decayed_weights(
        recipe.weight_decay, mask=lambda params: {name: name.endswith("/kernel") for name in params}
    )
    if recipe.optimizer == "sgd":
        return optax.chain(decay, optax.trace(recipe.momentum))
    b1, b2 = recipe.betas
    return optax.chain(optax.scale_by_adam(b1, b2, recipe.eps), decay)


def make_update(apply: Callable[..., Any], rule: optax.GradientTransformation, recipe: Recipe) -> Callable[..., Any]:
    """Returns `update(values, images, labels, rate) -> (values, loss, norm)`, of (micro-batch, image, ...)."""
    # jax: a function to compile; torch's trainer does this in train_share

    def loss_and_statistics(
        params: Arrays, statistics: Arrays, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, Arrays]:
        logits, statistics = apply(params, statistics, images, is_training=True)
        loss = loss_fn(read_answers(logits, recipe.num_questions), labels, recipe.label_smoothing)
        return loss / recipe.accumulate, statistics

    def update(values: Any, images: jax.Array, labels: jax.Array, rate: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        params, statistics, moments = values

        def add(sums: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            loss, gradients, statistics = sums
            run = jax.value_and_grad(loss_and_statistics, has_aux=True)
            (more, statistics), new = run(params, statistics, *batch)
            return (loss + more, jax.tree.map(jnp.add, gradients, new), statistics), None

        nothing = jnp.zeros((), rate.dtype), jax.tree.map(jnp.zeros_like, params), statistics
        if recipe.accumulate == 1:  # without a loop, in which XLA's convolutions are up to 40 times as slow on a CPU
            (loss, gradients, statistics), _ = add(nothing, (images[0], labels[0]))
        else:
            (loss, gradients, statistics), _ = jax.lax.scan(add, nothing, (images, labels))
        gradients, norm = clip_gradients(gradients, recipe.clip_norm)
        updates, moments = rule.update(gradients, moments, params)
        updates = jax.tree.map(lambda x: -rate * x, updates)
        return (optax.apply_updates(params, updates), statistics, moments), loss, norm

    return update


def make_predict(apply: Callable[..., Any], recipe: Recipe) -> Callable[..., jax.Array]:
    # jax: a function to compile
    def predict(values: tuple[Arrays, Arrays], images: jax.Array) -> jax.Array:
        logits, _ = apply(*values, images[0], is_training=False)
        return read_answers(logits, recipe.num_questions)

    return predict


def _numpy(array: jax.Array) -> np.ndarray:
    # a copy, because a train step works in place; by numpy, because JAX outside of float64's numerics would round
    return np.array(array, np.float32 if array.dtype.itemsize < 4 else array.dtype)
