"""Cases: everything that decides a number, their ids, and the grids and presets that make them."""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
from typing import Any

from vitcmp.backend import ATTENTION, BACKENDS, BATCH_NORM, COMPILE, LAYOUT, MODES, NUMERICS, Device, why_unsupported
from vitcmp.flops import count_flops
from vitcmp.records import METHOD_VERSION, SCHEMA, Record
from vitcmp.specs import (
    ForeignSpec,
    ResNetSpec,
    Spec,
    TimmSpec,
    ViTSpec,
    did_you_mean,
    format_image_size,
    get_spec,
    parse_image_size,
)

SEED_WEIGHTS = "seed:0"
# The sizes of "On the speed of ViTs and CNNs" (Beyer 2024), and its ViTDet: windows that divide the grid, no rel-pos.
ARTICLE_SIZES = ("128", "224", "256", "384", "448", "512", "768", "896", "1024")
ARTICLE_VITDET = "vitdet_b16:window_policy=divide,window_size=16,rel_pos=false"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One point of the sweep. Nothing that changes a number may be left out of it."""

    backend: str
    model: str  # as get_spec takes it
    spec: dict[str, Any]  # every field of the spec, the family, and the image size of this case
    image_size: str  # 224, or 96x160 (height x width)
    batch_size: int
    mode: str
    numerics: str
    attention: str | None  # None for a model without attention, and for a foreign one that chooses by itself
    compile: str
    layout: str
    batch_norm: str | None = None  # kept or folded; None for a model that has none, and in records of method 1
    platform: str
    device_name: str
    num_threads: int | None  # None on an accelerator
    framework_version: str
    weights: str  # seed:0, or sha256:... of the file (checkpoints.weights_id)
    max_sampling_s: float  # the stopping rule's cap

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Case":
        return cls(**fields)

    @functools.cached_property
    def case_id(self) -> str:
        """The sha256 of the case's canonical JSON and of the method's version."""
        content = {"method_version": METHOD_VERSION, "case": self.to_json()}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def resolve_spec(self) -> Spec:
        """Returns the spec of the model at the case's image size."""
        return dataclasses.replace(get_spec(self.model), image_size=parse_image_size(self.image_size))

    def new_record(self, run: int) -> Record:
        """Returns a record of an attempt that has not ended: what is not known is null."""
        unknown = (
            "device environment effective num_params flops compile_s compile_cache warmup latency throughput memory "
            "contention clocks outputs stages_s"
        )
        return {
            "schema": SCHEMA,
            "method_version": METHOD_VERSION,
            "case_id": self.case_id,
            "run": run,
            "status": "error",
            "error": None,
            "started_at": timestamp(),
            "ended_at": None,
            "case": self.to_json(),
            **dict.fromkeys(unknown.split()),
        }

    def describe(self) -> str:
        """Returns one line for people: `torch vit_ti16 224 px x 1 forward float32 math eager`."""
        parts = (self.backend, self.model, f"{self.image_size} px x {self.batch_size}", self.mode, self.setting)
        return " ".join(parts)

    @property
    def setting(self) -> str:
        """What of the case is a choice of how to compute, not of what."""
        is_folded = "folded" if self.batch_norm == "folded" else None
        return " ".join(filter(None, (self.numerics, self.attention, self.compile, self.layout, is_folded)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What a sweep asks for. `attention`, `compile` and `layout` are by backend; a model takes of them what it has."""

    models: tuple[str, ...]
    image_sizes: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    numerics: tuple[str, ...]
    attention: dict[str, tuple[str, ...]]
    compile: dict[str, tuple[str, ...]]
    layout: dict[str, tuple[str, ...]]
    batch_norm: tuple[str, ...] = BATCH_NORM[:1]
    mode: str = "forward"
    weights: str = SEED_WEIGHTS
    max_sampling_s: float = 20.0
    named: tuple[str, ...] = ()  # axes that were asked for by name: what the device lacks there is not left out


def _first(options: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {backend: names[:1] for backend, names in options.items()}


CPU_QUICK = Grid(
    models=("vit_ti16", "vitdet_ti16", "resnet18", "convnext_atto"),
    image_sizes=("128", "224"),
    batch_sizes=(1,),
    numerics=("float32",),
    attention={"jax": ("xla",), "torch": ("flash",)},
    compile=_first(COMPILE),
    layout=_first(LAYOUT),
    max_sampling_s=5.0,
)
ACCELERATOR_QUICK = Grid(
    models=("vit_b16", "vitdet_b16", "resnet50", "convnext_base"),
    image_sizes=("224", "512", "1024"),
    batch_sizes=(1, 8),
    numerics=("bfloat16",),
    attention={"jax": ("xla", "cudnn", "pallas"), "torch": ("flash", "mem_efficient", "cudnn")},
    compile={"jax": ("jit",), "torch": ("default",)},
    layout={"jax": ("nhwc",), "torch": ("channels_last",)},
)
# The article's grid, and the settings that it left out: channels_last, max-autotune, cuDNN's attention, ResNet-50.
ARTICLE = Grid(
    models=("vit_b16", ARTICLE_VITDET, "resnet50", "convnext_base"),
    image_sizes=ARTICLE_SIZES,
    batch_sizes=(1, 8, 32),
    numerics=("float32", "tensorfloat32", "bfloat16", "float16"),
    attention=ATTENTION,
    compile={"jax": ("jit",), "torch": ("reduce-overhead", "max-autotune")},
    layout=LAYOUT,
)
FULL = dataclasses.replace(
    ARTICLE,
    models=(
        *(f"vit_{size}16" for size in ("ti", "s", "b", "l")),
        "vit_h14",
        *(f"vitdet_{size}16" for size in ("ti", "s", "b", "l")),
        ARTICLE_VITDET,
        *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
        *(f"convnext_{size}" for size in ("atto", "tiny", "small", "base", "large")),
    ),
    batch_sizes=(1, 8, 32, 128),
    numerics=("float32", "tensorfloat32", "bfloat16", "float16", "bfloat16_mixed"),
    compile={"jax": ("jit",), "torch": COMPILE["torch"]},
)
# Figure 12 of the ViT paper (arXiv:2010.11929), whose ResNets are BiT's (section 4.1): the peak speed over batch sizes,
# and the largest batch that fits.
VIT_PAPER = Grid(
    models=("bit_r50x1", "bit_r50x2", "bit_r152x4", "vit_b32", "vit_l32", "vit_b16", "vit_l16", "vit_h14"),
    image_sizes=("64", "128", "224", "384", "512"),
    batch_sizes=(1, 8, 32, 128, 512, 2048),
    numerics=("bfloat16",),
    attention=ACCELERATOR_QUICK.attention,
    compile=ACCELERATOR_QUICK.compile,
    layout=ACCELERATOR_QUICK.layout,
)
PRESETS = ("quick", "article", "vit_paper", "full")


def get_preset(name: str, platform: str) -> Grid:
    """Returns the preset's grid; `quick` is about two minutes on a CPU, and larger models on an accelerator."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}; allowed: {', '.join(PRESETS)}")
    if name == "quick":
        return CPU_QUICK if platform == "cpu" else ACCELERATOR_QUICK
    return {"article": ARTICLE, "vit_paper": VIT_PAPER, "full": FULL}[name]


def timestamp() -> str:
    """Returns the time in UTC as ISO 8601, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def check_names(grid: dict[str, Any], backends: tuple[str, ...]) -> None:
    """Raises one ValueError with every fault of the axes that were given, before a device is asked for.

    `grid` holds the axes by name, as lists of strings; an absent or None axis is the preset's.
    """
    faults: list[str] = []
    for backend in backends:
        _check_choices(faults, "backend", [backend], BACKENDS)
    known = [backend for backend in backends if backend in BACKENDS]
    empty = [axis for axis, values in grid.items() if values is not None and not values]
    faults += [f"{axis} is empty: name one or more, joined by commas, or leave the flag out" for axis in empty]
    _check_choices(faults, "mode", [grid.get("mode") or "forward"], MODES)
    _check_choices(faults, "numerics", grid.get("numerics") or (), tuple(NUMERICS))
    _check_choices(faults, "batch_norm", grid.get("batch_norm") or (), BATCH_NORM)
    for axis, options in (("attention", ATTENTION), ("compile", COMPILE), ("layout", LAYOUT)) if known else ():
        _check_settings(faults, axis, grid.get(axis) or (), {backend: options[backend] for backend in known})
    for text in grid.get("image_sizes") or ():
        _collect(faults, parse_image_size, text)
    for text in grid.get("batch_sizes") or ():
        if not str(text).isdigit() or int(text) < 1:
            faults.append(f"batch_sizes={text!r} must be a whole number, 1 or more")
    for model in grid.get("models") or ():
        spec = _collect(faults, get_spec, model)
        if isinstance(spec, ForeignSpec) and known and spec.backend not in known:
            faults.append(f"model {model!r} needs backend {spec.backend}, the sweep has {', '.join(known)}")
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))


def _check_settings(faults: list[str], axis: str, values: Any, options: dict[str, tuple[str, ...]]) -> None:
    """Checks an axis whose values are each framework's own: each is known to one, and each has one."""
    offered = tuple(dict.fromkeys(itertools.chain.from_iterable(options.values())))
    _check_choices(faults, f"{axis} for {' and '.join(options)}", values, offered)
    for backend, names in options.items():
        if values and not set(values) & set(names):
            faults.append(f"{axis}={','.join(values)} leaves nothing for {backend}; it has: {', '.join(names)}")


def make_cases(grid: Grid, backend: str, device: Device, *, framework_version: str) -> list[Case]:
    """Returns one backend's cases, each once. Raises one ValueError for all models that cannot take an image size."""
    faults: list[str] = []
    cases: dict[str, Case] = {}
    for size, model, batch_size, numerics in itertools.product(
        grid.image_sizes, grid.models, grid.batch_sizes, grid.numerics
    ):
        spec = _collect(faults, _resize_spec, model, size)
        if spec is None:
            continue
        if grid.mode == "train" and not spec.num_classes:
            faults.append(f"model {model!r}: num_classes=0 has no loss to train on")
        if grid.mode == "train" and isinstance(spec, ResNetSpec) and spec.is_folded:
            faults.append(f"model {model!r}: is_folded=true cannot be trained, its BatchNorm is gone")
        if isinstance(spec, ForeignSpec) and spec.backend != backend:
            continue
        spec_json = {"family": spec.family, **json.loads(json.dumps(dataclasses.asdict(spec)))}
        choices = _kernels(grid, backend, spec), grid.compile[backend], _layouts(grid, backend, spec)
        for kernel, compile, layout, batch_norm in itertools.product(*choices, _batch_norms(grid, spec)):
            if _is_left_out(grid, spec, device.platform, backend, numerics, kernel, compile):
                continue
            case = Case(
                backend=backend,
                model=model,
                spec=spec_json,
                image_size=format_image_size(spec.image_size),
                batch_size=batch_size,
                mode=grid.mode,
                numerics=numerics,
                attention=kernel,
                compile=compile,
                layout=layout,
                batch_norm=batch_norm,
                platform=device.platform,
                device_name=device.name,
                num_threads=device.num_threads,
                framework_version=_version(framework_version, device, spec),
                weights=grid.weights,
                max_sampling_s=grid.max_sampling_s,
            )
            cases[case.case_id] = case
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))
    return list(cases.values())


def interleave(cases: list[Case]) -> list[Case]:
    """Orders cases so that the backends' sides of one point run one after the other; the order is otherwise kept."""
    order: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        order.setdefault((case.image_size, case.model, case.batch_size, case.mode, case.numerics), []).append(case)
    return list(itertools.chain.from_iterable(order.values()))


def estimate_s(case: Case) -> float:
    """Guesses the seconds that a case takes: starting a process, compiling, and the samples of the stopping rule."""
    speed = {"cpu": 4e10 * (case.num_threads or 1)}.get(case.platform, 5e13)  # FLOP/s, a cautious share of the peak
    spec = case.resolve_spec()
    if isinstance(spec, ForeignSpec):  # unknown until its library is asked: taken for a ViT-B, by its FLOPs a pixel
        image_flops = 7e5 * math.prod(spec.image_size) * (3 if case.mode == "train" else 1)
    else:
        image_flops = count_flops(spec, mode=case.mode).total
    call_s = image_flops * case.batch_size / speed
    quick_s = {"jit": 2.0, "eager": 0.0, "cudagraphs": 1.0}
    compile_s = 90.0 if case.compile.startswith("max-autotune") else quick_s.get(case.compile, 25.0)
    return 3.0 + compile_s + 2 * min(max(30 * call_s, 1.5), case.max_sampling_s) + 10 * call_s


def _is_left_out(
    grid: Grid, spec: Spec, platform: str, backend: str, numerics: str, attention: str | None, compile: str
) -> bool:
    """Says whether the device is known not to have this, and nobody asked for it by name."""
    axes = {"platform": platform, "backend": backend, "numerics": numerics, "mode": grid.mode}
    if why_unsupported(spec, **axes, attention=None):
        return "numerics" not in grid.named
    if why_unsupported(spec, **axes, attention=attention):
        return "attention" not in grid.named
    return (
        "compile" not in grid.named and why_unsupported(spec, **axes, attention=attention, compile=compile) is not None
    )


def _resize_spec(model: str, size: str) -> Spec:
    try:
        return dataclasses.replace(get_spec(model), image_size=parse_image_size(size))
    except ValueError as error:
        raise ValueError(f"model {model!r} at {size} px: {error}") from None


def _kernels(grid: Grid, backend: str, spec: Spec) -> tuple[str | None, ...]:
    """A timm model chooses by itself unless kernels were asked for by name; big_vision's has none to choose."""
    if isinstance(spec, ViTSpec) or (isinstance(spec, TimmSpec) and "attention" in grid.named):
        return grid.attention[backend]
    return (None,)


def _version(framework_version: str, device: Device, spec: Spec) -> str:
    """Adds the version of the library that a foreign model is of, which decides its numbers too."""
    library = device.versions.get(spec.family) if isinstance(spec, ForeignSpec) else None
    return f"{framework_version} ({spec.family} {library})" if library else framework_version


def _layouts(grid: Grid, backend: str, spec: Spec) -> tuple[str, ...]:
    """A ViT has one convolution, its first: it is swept in one layout only."""
    return grid.layout[backend] if not isinstance(spec, ViTSpec) else grid.layout[backend][:1]


def _batch_norms(grid: Grid, spec: Spec) -> tuple[str | None, ...]:
    """A model without BatchNorm has no choice, and nothing is folded in training, unless that was asked for by name."""
    if not isinstance(spec, ResNetSpec) or spec.is_folded:
        return (None,)
    if grid.mode == "train" and "batch_norm" not in grid.named:
        return BATCH_NORM[:1]
    return grid.batch_norm


def _check_choices(faults: list[str], argument: str, values: Any, allowed: tuple[str, ...]) -> None:
    for value in values:
        if value not in allowed:
            faults.append(f"unknown {argument}: {value!r}{did_you_mean(value, allowed)}; allowed: {', '.join(allowed)}")


def _collect(faults: list[str], function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:
        faults.append(str(error))
        return None
