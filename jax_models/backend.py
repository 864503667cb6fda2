"""vitcmp's backend on JAX: device, numerics, compiled steps, memory."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax import nnx

from jax_models.bit import BiT
from jax_models.bit_v1 import BiTV1
from jax_models.ceilings import make_copy, make_matmul
from jax_models.convnext import ConvNeXt
from jax_models.fit import Trainer
from jax_models.flops import count_flops
from jax_models.foreign import ForeignModel, build_foreign, export_foreign, library_versions, load_foreign
from jax_models.layers import Conv
from jax_models.params import export_params, load_params
from jax_models.resnet import ResNet
from jax_models.train import make_train_step
from jax_models.vit import ViT
from jax_models.vitdet import ViTDet
from vitcmp.backend import (
    ATTENTION,
    NUMERICS,
    Device,
    Unsupported,
    check_training,
    require_open,
    require_precision,
)
from vitcmp.environment import cpu_memory_bytes, cpu_name, num_cpus, peak_rss_bytes, reset_peak_rss
from vitcmp.params import Weights
from vitcmp.recipe import Recipe
from vitcmp.specs import ForeignSpec, Spec

MODELS: dict[str, Callable[..., nnx.Module]] = {
    "vit": ViT,
    "vitdet": ViTDet,
    "resnet": ResNet,
    "bit": BiT,
    "bit_v1": BiTV1,
    "convnext": ConvNeXt,
}
# jax_default_matmul_precision by numerics. float32: "highest" is the one name that means float32 in a dot *and* in a
# convolution on CPU, GPU and TPU; a dot-algorithm name (F32_F32_F32) leaves convolutions at their default, which is
# TF32 on GPU. tensorfloat32: the algorithm by name for dots, and thereby the default, TF32, for convolutions.
PRECISION = {"float32": "highest", "float64": "highest", "tensorfloat32": "TF32_TF32_F32"}


def make_backend(platform: str) -> "JaxBackend":
    return JaxBackend(platform)


class JaxBackend:
    name = "jax"

    def __init__(self, platform: str) -> None:
        try:
            self.device = jax.devices(None if platform == "auto" else platform)[0]
        except RuntimeError as error:
            raise Unsupported(f"device={platform}: jax finds none; it finds {jax.devices()[0].platform}") from error
        # jax: platform is the name of the runtime (cuda, rocm) on some GPU versions
        self.platform = self.device.platform if self.device.platform in ("cpu", "tpu") else "gpu"
        # How our models' convolutions are computed: XLA's own, but on a CPU in other forms where those are faster.
        self.convolution = "expanded" if self.platform == "cpu" else "native"
        self.open_numerics: str | None = None

    def describe(self) -> Device:
        on_cpu = self.platform == "cpu"
        limit = None if on_cpu else (self.device.memory_stats() or {}).get("bytes_limit")
        return Device(
            platform=self.platform,
            name=cpu_name() if on_cpu else self.device.device_kind,
            num_devices=jax.device_count(),
            memory_bytes=cpu_memory_bytes() if on_cpu else limit,
            num_threads=num_cpus() if on_cpu else None,
            versions={
                "jax": jax.__version__,
                "jaxlib": jaxlib.__version__,
                "flax": flax.__version__,
                "platform": self.device.client.platform_version.strip(),
                **library_versions(),
            },
        )

    @contextlib.contextmanager
    def numerics(self, name: str) -> Iterator[dict[str, Any]]:
        if name == "tensorfloat32" and self.platform != "gpu":
            raise Unsupported(f"numerics=tensorfloat32: only NVIDIA GPUs have it, this is a {self.platform}")
        if name == "float64" and self.platform == "tpu":
            raise Unsupported("numerics=float64: TPUs do not have it")
        precision = PRECISION.get(name, "default")
        with jax.enable_x64(name == "float64"), jax.default_matmul_precision(precision):
            errors = self._errors(jnp.dtype(NUMERICS[name][1]))
            require_precision(name, errors)
            kept, self.open_numerics = self.open_numerics, name
            try:
                yield {
                    "jax_default_matmul_precision": precision,
                    "jax_enable_x64": name == "float64",
                    "convolution": self.convolution,
                    **errors,
                }
            finally:
                self.open_numerics = kept

    def _errors(self, dtype: jnp.dtype) -> dict[str, float]:
        """Measures the relative error of a matmul and of a convolution against float64."""
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((2, 256, 256))
        image, kernel = rng.standard_normal((1, 16, 16, 64)), rng.standard_normal((3, 3, 64, 64))
        matmul = jax.jit(lambda a, b: a @ b)(self._put(a, dtype), self._put(b, dtype))
        convolve = jax.jit(
            lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )
        conv = convolve(self._put(image, dtype), self._put(kernel, dtype))
        windows = np.lib.stride_tricks.sliding_window_view(_rounded(image, dtype)[0], (3, 3), axis=(0, 1))
        exact_conv = np.einsum("hwcij,ijco->hwo", windows, _rounded(kernel, dtype))
        return {
            "matmul_error": _relative_error(matmul, _rounded(a, dtype) @ _rounded(b, dtype)),
            "conv_error": _relative_error(conv[0], exact_conv),
        }

    def _put(self, array: np.ndarray, dtype: jnp.dtype) -> jax.Array:
        return jax.device_put(np.asarray(array).astype(dtype), self.device)

    def build(self, spec: Spec, *, attention: str | None = None) -> nnx.Module:
        if isinstance(spec, ForeignSpec):
            return build_foreign(spec, attention=attention)
        kernel = attention or ATTENTION["jax"][0]
        options = {"attention": kernel} if spec.family in ("vit", "vitdet") else {}
        model = nnx.eval_shape(lambda: MODELS[spec.family](spec, **options))
        model.set_attributes(Conv, method=self.convolution)
        return model

    def load(
        self, model: nnx.Module, weights: Weights | None, *, numerics: str, layout: str | None = None
    ) -> nnx.Module:
        param_dtype, compute_dtype = NUMERICS[numerics]
        model.compute_dtype = jnp.dtype(compute_dtype)
        if isinstance(model, ForeignModel):
            return load_foreign(model, weights, numerics=numerics, device=self.device)
        assert weights is not None
        return load_params(model, model.spec, weights, dtype=jnp.dtype(param_dtype), device=self.device)

    def count_params(self, model: nnx.Module) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    def export(self, model: nnx.Module) -> Weights:
        return export_foreign(model) if isinstance(model, ForeignModel) else export_params(model, model.spec)

    def outputs(self, model: nnx.Module, images: np.ndarray) -> dict[str, np.ndarray]:
        graph, state = nnx.split(model)

        def run(state: nnx.State, images: jax.Array) -> dict[str, jax.Array]:
            out: dict[str, jax.Array] = {}
            model = nnx.merge(graph, state)
            model.eval()
            model(images, out)
            return {name: x.astype(jnp.promote_types(x.dtype, jnp.float32)) for name, x in out.items()}

        out = jax.jit(run)(state, self._put(images, model.compute_dtype))
        return {name: np.asarray(x) for name, x in out.items()}

    def compile(
        self, model: nnx.Module, images: np.ndarray, labels: np.ndarray, *, mode: str, compile: str
    ) -> "ForwardStep | TrainStep":
        arrays = self._put(images, model.compute_dtype), jax.device_put(labels, self.device)
        return TrainStep(model, *arrays) if mode == "train" else ForwardStep(model, arrays[0])

    def trainer(
        self,
        spec: Spec,
        weights: Weights,
        recipe: Recipe,
        *,
        attention: str | None = None,
        compile: str | None = None,
        num_devices: int = 1,
    ) -> Trainer:
        devices = jax.devices(self.device.platform)
        options: dict[str, Any] = {"attention": attention, "compile": compile, "num_devices": num_devices}
        axes: dict[str, Any] = {"platform": self.platform, "backend": self.name, "max_devices": len(devices)}
        check_training(spec, weights, recipe, **options, **axes)
        if attention == "pallas" and num_devices > 1:
            raise Unsupported("attention=pallas: XLA cannot share its kernel out to several devices")
        require_open(recipe.numerics, self.open_numerics)
        model = self.load(self.build(spec, attention=attention), weights, numerics=recipe.numerics)
        return Trainer(model, recipe, engine=self, devices=devices[:num_devices])

    def memory(self, model: nnx.Module, step: "ForwardStep | TrainStep") -> dict[str, Any]:
        """Activation peak: XLA's temporaries and outputs, less what it writes in place; weights and inputs excluded."""
        analysis = step.compiled.memory_analysis()
        temporaries = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return {
            "parameters_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))),
            "activation_peak_bytes": temporaries,
            "activation_source": "XLA temp + output - alias",
            **self._process_peak(step),
        }

    def _process_peak(self, step: "ForwardStep | TrainStep") -> dict[str, Any]:
        if self.platform != "cpu":
            peak = (self.device.memory_stats() or {}).get("peak_bytes_in_use")
            return {"process_peak_bytes": peak, "process_source": "device peak_bytes_in_use"}
        reset_peak_rss()
        step()
        return {"process_peak_bytes": peak_rss_bytes(), "process_source": "VmHWM"}

    def count_flops(self, spec: Spec) -> int:
        return count_flops(self.build(spec), spec)

    def make_matmul(self, side: int, *, numerics: str) -> Callable[[], None]:
        return make_matmul(side, dtype=jnp.dtype(NUMERICS[numerics][1]), device=self.device)

    def make_copy(self, num_bytes: int, *, numerics: str) -> Callable[[], None]:
        return make_copy(num_bytes, dtype=jnp.dtype(NUMERICS[numerics][1]), device=self.device)


class ForwardStep:
    """The logits of one batch, compiled ahead of time."""

    compile_cache = None  # jax: the persistent compilation cache is off unless the user turns it on

    def __init__(self, model: nnx.Module, images: jax.Array) -> None:
        start = time.perf_counter()
        model.eval()
        graph, state = nnx.split(model)
        leaves, structure = jax.tree.flatten(state)
        run = jax.jit(lambda leaves, images: nnx.merge(graph, jax.tree.unflatten(structure, leaves))(images))
        self.inputs = leaves, images
        self.compiled = run.lower(*self.inputs).compile()
        self.compile_s = time.perf_counter() - start

    def __call__(self) -> None:
        self.compiled(*self.inputs).block_until_ready()

    def queue(self, num_calls: int) -> None:
        for _ in range(num_calls):
            logits = self.compiled(*self.inputs)
        logits.block_until_ready()

    def result(self) -> np.ndarray:
        return _wide(self.compiled(*self.inputs))


class TrainStep:
    """One AdamW step on one batch, its state donated so that it is updated in place."""

    compile_cache = None

    def __init__(self, model: nnx.Module, images: jax.Array, labels: jax.Array) -> None:
        start = time.perf_counter()
        run, state = make_train_step(model, optimizer="adamw")
        self.state, self.batch = jax.tree.map(jnp.copy, state), (images, labels)
        self.compiled = jax.jit(run, donate_argnums=0).lower(self.state, *self.batch).compile()
        self.compile_s = time.perf_counter() - start

    def __call__(self) -> None:
        self.state, loss = self.compiled(self.state, *self.batch)
        loss.block_until_ready()

    def queue(self, num_calls: int) -> None:
        for _ in range(num_calls):
            self.state, loss = self.compiled(self.state, *self.batch)
        loss.block_until_ready()

    def result(self) -> np.ndarray:
        self.state, loss = self.compiled(self.state, *self.batch)
        return _wide(loss)


def _wide(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.promote_types(array.dtype, jnp.float32)))


def _rounded(array: np.ndarray, dtype: jnp.dtype) -> np.ndarray:
    return array.astype(dtype).astype(np.float64)


def _relative_error(approximate: jax.Array, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(approximate, np.float64) - exact) / np.linalg.norm(exact))
