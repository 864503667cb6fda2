"""vitcmp's backend on PyTorch: device, numerics, compiled steps, memory."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from torch_models.attention import flex_errors
from torch_models.bit import BiT
from torch_models.bit_v1 import BiTV1
from torch_models.ceilings import make_copy, make_matmul
from torch_models.convnext import ConvNeXt
from torch_models.fit import Trainer
from torch_models.flops import count_flops
from torch_models.foreign import ForeignModel, build_foreign, export_foreign, library_versions, load_foreign
from torch_models.matmul import find_matmul_library, prefer_onednn, relative_error
from torch_models.params import export_params, load_params
from torch_models.processes import Group, Processes
from torch_models.resnet import ResNet
from torch_models.train import make_train_step
from torch_models.vit import ViT
from torch_models.vitdet import ViTDet
from vitcmp.backend import (
    ATTENTION,
    COMPILE,
    NUMERICS,
    Device,
    Unsupported,
    check_training,
    require_open,
    require_precision,
    why_unsupported,
)
from vitcmp.environment import cpu_memory_bytes, cpu_name, peak_rss_bytes, reset_peak_rss
from vitcmp.params import Weights
from vitcmp.recipe import Recipe
from vitcmp.specs import ForeignSpec, ResNetSpec, Spec

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": ViT,
    "vitdet": ViTDet,
    "resnet": ResNet,
    "bit": BiT,
    "bit_v1": BiTV1,
    "convnext": ConvNeXt,
}
MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# What torch's profiler calls each kernel of scaled_dot_product_attention, forward.
ATTENTION_OPERATORS = {
    "math": {"aten::_scaled_dot_product_attention_math"},
    "flash": {"aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"},
    "mem_efficient": {"aten::_scaled_dot_product_efficient_attention"},
    "cudnn": {"aten::_scaled_dot_product_cudnn_attention"},
}
# What flex_attention runs where nobody has compiled it.
UNFUSED_FLEX = {"aten::_safe_softmax", "aten::_softmax", "aten::softmax"}


def make_backend(platform: str) -> "TorchBackend":
    return TorchBackend(platform)


class TorchBackend:
    name = "torch"

    def __init__(self, platform: str) -> None:
        has_gpu = torch.cuda.is_available()
        if platform == "tpu" or (platform == "gpu" and not has_gpu):
            raise Unsupported(f"device={platform}: torch finds none; it finds {'gpu' if has_gpu else 'cpu'}")
        self.platform = "gpu" if has_gpu and platform != "cpu" else "cpu"
        self.device = torch.device("cuda" if self.platform == "gpu" else "cpu")
        self.open_numerics: str | None = None

    def describe(self) -> Device:
        versions = {"torch": torch.__version__, **library_versions()}
        if self.platform == "cpu":
            return Device(
                platform="cpu",
                name=cpu_name(),
                num_devices=1,
                memory_bytes=cpu_memory_bytes(),
                num_threads=torch.get_num_threads(),
                versions={**versions, "cpu_capability": torch.backends.cpu.get_cpu_capability()},
            )
        properties = torch.cuda.get_device_properties(self.device)
        return Device(
            platform="gpu",
            name=properties.name,
            num_devices=torch.cuda.device_count(),
            memory_bytes=properties.total_memory,
            num_threads=None,
            versions={**versions, "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())},
        )

    @contextlib.contextmanager
    def numerics(self, name: str) -> Iterator[dict[str, Any]]:
        use_tf32 = name == "tensorfloat32"
        if use_tf32 and (self.platform != "gpu" or torch.cuda.get_device_capability(self.device) < (8, 0)):
            raise Unsupported(f"numerics=tensorfloat32: NVIDIA GPUs since Ampere have it, this is a {self.platform}")
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        dtype, outer = getattr(torch, NUMERICS[name][1]), self.open_numerics
        kept = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
        torch.set_float32_matmul_precision("high" if use_tf32 else "highest")
        cudnn.allow_tf32 = use_tf32
        cudnn.benchmark = True  # choose the fastest convolution for a fixed shape, as XLA does
        try:
            choice = prefer_onednn() if self.platform == "cpu" and dtype == torch.float32 else {}
            precision = torch.get_float32_matmul_precision()
            errors = self._errors(dtype)
            require_precision(name, errors)
            self.open_numerics = name
            yield {
                "float32_matmul_precision": precision,
                **choice,
                "matmul_library": self._find_matmul_library(dtype, precision),
                "allow_bf16_reduced_precision_reduction": matmul.allow_bf16_reduced_precision_reduction,
                "allow_fp16_reduced_precision_reduction": matmul.allow_fp16_reduced_precision_reduction,
                "cudnn_allow_tf32": cudnn.allow_tf32,
                "cudnn_benchmark": cudnn.benchmark,
                **errors,
            }
        finally:
            self.open_numerics = outer
            torch.set_float32_matmul_precision(kept[0])
            cudnn.allow_tf32, cudnn.benchmark = kept[1:]

    def _find_matmul_library(self, dtype: torch.dtype, precision: str) -> str | None:
        if self.platform == "cpu":
            return find_matmul_library(dtype, precision)
        return torch.backends.cuda.preferred_blas_library().name  # by setting, not by sight

    def _errors(self, dtype: torch.dtype) -> dict[str, float]:
        """Measures the relative error of a matmul and of a convolution against float64."""
        rng = np.random.default_rng(0)
        a, b = (torch.from_numpy(x).to(dtype) for x in rng.standard_normal((2, 256, 256)))
        image = torch.from_numpy(rng.standard_normal((1, 64, 16, 16))).to(dtype)
        kernel = torch.from_numpy(rng.standard_normal((64, 64, 3, 3))).to(dtype)
        matmul = a.to(self.device) @ b.to(self.device)
        conv = nn.functional.conv2d(image.to(self.device), kernel.to(self.device))
        return {
            "matmul_error": relative_error(matmul, a.double() @ b.double()),
            "conv_error": relative_error(conv, nn.functional.conv2d(image.double(), kernel.double())),
        }

    def build(self, spec: Spec, *, attention: str | None = None) -> nn.Module:
        if isinstance(spec, ForeignSpec):
            return build_foreign(spec, attention=attention)
        kernel = attention or ATTENTION["torch"][0]
        options = {"attention": kernel} if spec.family in ("vit", "vitdet") else {}
        with torch.device("meta"):
            model = MODELS[spec.family](spec, **options)
        model.attention = options.get("attention")
        return model

    def load(self, model: nn.Module, weights: Weights | None, *, numerics: str, layout: str | None = None) -> nn.Module:
        param_dtype, compute_dtype = (getattr(torch, dtype) for dtype in NUMERICS[numerics])
        model.numerics, model.compute_dtype = numerics, compute_dtype
        model.memory_format = MEMORY_FORMATS[layout or "nchw"]
        if isinstance(model, ForeignModel):
            model.compute_dtype = param_dtype  # autocast wants float32 images
            load_foreign(model, weights, numerics=numerics, device=self.device)
        else:
            assert weights is not None
            load_params(model, model.spec, weights, dtype=param_dtype, device=self.device)
        return model.to(memory_format=model.memory_format)

    def count_params(self, model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    def export(self, model: nn.Module) -> Weights:
        return export_foreign(model) if isinstance(model, ForeignModel) else export_params(model, model.spec)

    def outputs(self, model: nn.Module, images: np.ndarray) -> dict[str, np.ndarray]:
        out: dict[str, torch.Tensor] = {}
        model.eval()
        with torch.inference_mode():
            model(self._put(images, model), out)
        return {name: _wide(x) for name, x in out.items()}

    def _put(self, images: np.ndarray, model: nn.Module) -> torch.Tensor:
        nchw = torch.from_numpy(np.ascontiguousarray(np.asarray(images).transpose(0, 3, 1, 2)))
        return nchw.to(self.device, model.compute_dtype).contiguous(memory_format=model.memory_format)

    def compile(self, model: nn.Module, images: np.ndarray, labels: np.ndarray, *, mode: str, compile: str) -> "Step":
        axes = {"platform": self.platform, "backend": self.name, "numerics": model.numerics, "mode": mode}
        if reason := why_unsupported(model.spec, **axes, attention=model.attention, compile=compile):
            raise Unsupported(reason)
        batch = self._put(images, model), torch.from_numpy(labels).to(self.device)
        if mode == "train":
            is_captured = compile == "cudagraphs"
            run = make_train_step(model, optimizer="adamw", compile=_compiler(compile), is_captured=is_captured)
        else:
            forward = _compiler(compile)(model.eval())
            run = torch.inference_mode()(lambda images, labels: forward(images))
        return Step(run, batch, compile, attention=model.attention)

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
        max_devices = None if self.platform == "cpu" else torch.cuda.device_count()  # on a CPU, processes
        options: dict[str, Any] = {"attention": attention, "compile": compile, "num_devices": num_devices}
        axes: dict[str, Any] = {"platform": self.platform, "backend": self.name, "max_devices": max_devices}
        check_training(spec, weights, recipe, **options, **axes)
        if compile == "cudagraphs":
            raise Unsupported("compile=cudagraphs: the learning rate of a captured step could not change")
        if num_devices > 1 and self.platform == "cpu" and isinstance(spec, ResNetSpec):
            raise Unsupported(f"num_devices={num_devices}: torch's SyncBatchNorm runs on GPUs only, this is a cpu")
        require_open(recipe.numerics, self.open_numerics)
        group = None
        if num_devices > 1:
            job = {"family": spec.family, "spec": dataclasses.asdict(spec), "recipe": dataclasses.asdict(recipe)}
            group = Processes(
                num_devices, platform=self.platform, job={**job, "attention": attention, "compile": compile}
            )
        return self.make_trainer(spec, weights, recipe, attention=attention, compile=compile, group=group)

    def make_trainer(
        self,
        spec: Spec,
        weights: Weights,
        recipe: Recipe,
        *,
        attention: str | None,
        compile: str | None,
        group: Group | None,
    ) -> Trainer:
        """Returns what each process trains with; the first process's group has the others begun."""
        model = self.load(self.build(spec, attention=attention), weights, numerics=recipe.numerics)
        if compile not in (None, COMPILE["torch"][0]):
            model.compile(mode=compile, fullgraph=True, dynamic=False)
        return Trainer(model, recipe, engine=self, group=group)

    def memory(self, model: nn.Module, step: "Step") -> dict[str, Any]:
        """Activation peak: what one call allocates beyond what was there before it; weights and inputs excluded."""
        parameters = {"parameters_bytes": sum(x.nbytes for x in model.state_dict().values())}
        if self.platform == "cpu":
            activations = {"activation_peak_bytes": _cpu_peak_bytes(step), "activation_source": "torch profiler"}
            reset_peak_rss()
            step()
            return {**parameters, **activations, "process_peak_bytes": peak_rss_bytes(), "process_source": "VmHWM"}
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        return {
            **parameters,
            **_cuda_activations(torch.cuda.max_memory_allocated(self.device) - before),
            "process_peak_bytes": torch.cuda.max_memory_reserved(self.device),
            "process_source": "CUDA allocator, reserved",
        }

    def count_flops(self, spec: Spec) -> int:
        return count_flops(self.build(spec), spec)

    def make_matmul(self, side: int, *, numerics: str) -> Callable[[], None]:
        return make_matmul(side, dtype=getattr(torch, NUMERICS[numerics][1]), device=self.device)

    def make_copy(self, num_bytes: int, *, numerics: str) -> Callable[[], None]:
        return make_copy(num_bytes, dtype=getattr(torch, NUMERICS[numerics][1]), device=self.device)


class Step:
    """A forward or train step on one batch: compiled, checked for the attention that runs, or captured, here."""

    def __init__(
        self,
        run: Callable[..., torch.Tensor],
        batch: tuple[torch.Tensor, ...],
        compile: str,
        *,
        attention: str | None = None,
    ) -> None:
        self.run, self.batch = run, batch
        self.compile_s: float | None = None
        self.compile_cache: str | None = None
        self.attention_ran: str | None = None
        self.first: np.ndarray | None = None  # of a train step, the loss before any update
        if compile not in ("eager", "cudagraphs"):
            with flex_errors() if attention == "flex" else contextlib.nullcontext():
                self._time_first(lambda: self.run(*self.batch))  # torch compiles at the first call
            self.compile_cache = _cache_state()
        if attention is not None:
            self.attention_ran = self._find_attention(attention)
        if compile == "cudagraphs":
            self._time_first(self._capture)

    def _time_first(self, call: Callable[[], torch.Tensor]) -> None:
        start = time.perf_counter()
        first = _wide(call())
        self.compile_s = time.perf_counter() - start
        self.first = first if self.first is None else self.first

    def _find_attention(self, attention: str) -> str:
        """Runs the step once; raises Unsupported where its attention is not the one asked for."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            first = _wide(self.run(*self.batch))
        self.first = first if self.first is None else self.first
        return name_attention(attention, {event.name for event in profile.events()})

    def _capture(self) -> torch.Tensor:
        """Captures the step's eager kernels in one CUDA graph, which runs from then on; returns the first output.

        Three calls on a side stream come before it, as torch's notes on CUDA graphs ask: they choose the algorithms and
        make the optimizer's state.
        """
        start, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(start)
        with torch.cuda.stream(stream):
            first, *_ = [self.run(*self.batch).clone() for _ in range(3)]
        start.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.run(*self.batch)

        def replay(*batch: torch.Tensor) -> torch.Tensor:  # the batch stays where it was captured
            graph.replay()
            return output

        self.run = replay
        return first

    def __call__(self) -> None:
        self.run(*self.batch)
        self._wait()

    def queue(self, num_calls: int) -> None:
        for _ in range(num_calls):
            self.run(*self.batch)
        self._wait()

    def result(self) -> np.ndarray:
        first, self.first = self.first, None
        return _wide(self.run(*self.batch)) if first is None else first

    def _wait(self) -> None:
        if self.batch[0].is_cuda:
            torch.cuda.synchronize(self.batch[0].device)


def _compiler(mode: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if mode == "eager":
        return lambda function: function
    return lambda function: torch.compile(function, mode=mode, fullgraph=True, dynamic=False)


def _wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32)).numpy()


def name_attention(attention: str, operators: set[str]) -> str:
    """Returns which attention is among the operators that ran; raises Unsupported where it is not the one asked for.

    Compiled math has no operator of its own: it is matmuls, and a softmax that the compiler has fused. inductor puts a
    flash kernel in its place where its patterns match, on a CPU in torch 2.15.
    """
    ran = {name.removesuffix("_backward") for name in operators if name.startswith("aten::_scaled_dot_product")}
    if attention == "flex" and not ran and not operators & UNFUSED_FLEX:
        return "flex_attention"
    if attention == "math" and not ran:
        return "matmul and softmax"
    if not ran or ran - ATTENTION_OPERATORS.get(attention, set()):
        instead = sorted(ran | operators & UNFUSED_FLEX)
        raise Unsupported(f"attention={attention}: {', '.join(instead) or 'no attention kernel'} ran in its place")
    return ", ".join(sorted(ran))


def _cache_state() -> str:
    from torch._dynamo.utils import counters  # here, because dynamo alone takes seconds to import

    return "warm" if counters["inductor"]["fxgraph_cache_hit"] else "cold"


def _cuda_activations(num_bytes: int) -> dict[str, Any]:
    """Names the figure; a replayed CUDA graph allocates nothing, because its pool was taken when it was captured."""
    if num_bytes > 0:
        return {"activation_peak_bytes": num_bytes, "activation_source": "CUDA allocator, allocated"}
    return {"activation_peak_bytes": None, "activation_source": "unknown: a CUDA graph has its pool already"}


def _cpu_peak_bytes(step: Step) -> int:
    """Sums the allocator's events during one call, and returns the highest sum."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
