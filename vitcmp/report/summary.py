"""What reports show, from records: settings, the best of them, failures, and JAX against torch. Pure functions.

What is unknown is None, and never 0.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vitcmp.backend import NUMERICS
from vitcmp.devices import peak_flops
from vitcmp.parity import ParityResult, compare_outputs
from vitcmp.records import Record, latest
from vitcmp.specs import FOREIGN, parse_image_size
from vitcmp.stats import Estimate, pooled_median, ratio_interval

Case = Mapping[str, Any]
Runs = list[list[float]]
# What may be chosen for a point, which is the rest of a case: the two frameworks meet in a point.
CHOICES = ("backend", "attention", "compile", "layout", "batch_norm", "framework_version", "max_sampling_s")
# What is shown together: one device, one kind of step, one set of weights.
CONTEXT = ("mode", "platform", "device_name", "num_threads", "weights")
CONTENDED = 0.05  # share of the machine that others used, above which a timing is marked


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """One case with the last record of each of its runs (fresh processes), those that are ok and those that are not."""

    case: Case
    ok: tuple[Record, ...]
    failed: tuple[Record, ...]

    @functools.cached_property
    def latency(self) -> Estimate | None:
        """Seconds a call, the device idle after each."""
        return pooled_median(self.wall_s) if self.wall_s else None

    @functools.cached_property
    def call_s(self) -> Estimate | None:
        """Seconds a call where calls are queued: the inverse of throughput."""
        runs = [r["throughput"] for r in self.ok if r["throughput"]]
        return pooled_median([[s / run["calls_per_sample"] for s in run["wall_s"]] for run in runs]) if runs else None

    @functools.cached_property
    def images_per_s(self) -> Estimate | None:
        if self.call_s is None:
            return None
        value, low, high, batch_size = *self.call_s[:3], self.case["batch_size"]
        return self.call_s._replace(value=batch_size / value, low=batch_size / high, high=batch_size / low)

    @property
    def image_flops(self) -> int | None:
        """FLOPs of one image's forward pass: from the spec, or as the framework counts another library's model."""
        return self.first("flops", "analytic") or self.first("flops", "counted")

    @property
    def peak_share(self) -> float | None:
        """Share of the device's peak at these numerics that throughput reaches; None where the peak is unknown."""
        peak = peak_flops(self.case["device_name"], self.case["numerics"])
        step = self.first("flops", "step")
        return step / self.call_s.value / peak if peak and step and self.call_s else None

    @property
    def wall_s(self) -> Runs:
        return [r["latency"]["wall_s"] for r in self.ok if r["latency"]]

    @property
    def cpu_s(self) -> Runs:
        """CPU time of the process a call; empty where a run does not know it."""
        runs = [r["latency"]["cpu_s"] for r in self.ok if r["latency"]]
        return runs if all(runs) and all(min(run) > 0 for run in runs) else []

    @property
    def is_converged(self) -> bool:
        return all(r["latency"]["converged"] for r in self.ok if r["latency"])

    @property
    def is_contended(self) -> bool:
        return self.others_cpu_share is not None and self.others_cpu_share > CONTENDED

    @property
    def others_cpu_share(self) -> float | None:
        """The largest share of the machine that others used during a run; None where no run knows it."""
        shares = [(r["contention"] or {}).get("others_cpu_share") for r in self.ok]
        return max((share for share in shares if share is not None), default=None)

    @property
    def span(self) -> tuple[datetime.datetime, datetime.datetime]:
        """When the first run started and the last one ended."""
        moments = [datetime.datetime.fromisoformat(r[key]) for r in self.ok for key in ("started_at", "ended_at")]
        return min(moments), max(moments)

    def first(self, *keys: str) -> Any:
        """Returns a nested value from the first run that knows it, or None."""
        for record in self.ok:
            value: Any = record
            for key in keys:
                value = (value or {}).get(key)
            if value is not None:
                return value
        return None

    def describe(self, *names: str) -> str:
        """Returns the choices by name, as `bfloat16 flash default nchw`."""
        return describe_choices(self.case, *names)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The settings of one model, image size and batch size on one backend, and the one of lowest median latency."""

    settings: tuple[Setting, ...]
    best: Setting | None  # None where nothing ran

    @property
    def case(self) -> Case:
        return (self.best or self.settings[0]).case

    @property
    def failed(self) -> list[Record]:
        return [record for setting in self.settings for record in setting.failed]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The best JAX setting of a point against the best torch setting; a ratio is torch over JAX.

    The ratios are None where outputs are not proved equal: `refusal` then says why.
    """

    jax: Setting
    torch: Setting
    parity: ParityResult | None  # None where the numerics differ: then each side is proved at its own
    refusal: str | None
    latency: Estimate | None = None
    cpu: Estimate | None = None

    @property
    def gap_s(self) -> float:
        """Seconds from the end of one side to the start of the other; 0 where their runs took turns."""
        (start_a, end_a), (start_b, end_b) = self.jax.span, self.torch.span
        return max(0.0, (start_b - end_a).total_seconds(), (start_a - end_b).total_seconds())


def describe_choices(case: Case, *names: str) -> str:
    """Returns the choices by name; a BatchNorm that is kept, as the model has it, goes without saying."""
    values = (case.get(name) for name in names)  # records of method version 1 have no batch_norm
    return " ".join(str(value) for value in values if value not in (None, "kept"))


def split_methods(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Splits records into those of the newest method version, and the older ones, which do not compare with them."""
    newest = max((record["method_version"] for record in records), default=0)
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        sides[record["method_version"] < newest].append(record)
    return sides


def settings_of(records: Sequence[Record]) -> list[Setting]:
    """Gathers records into settings, sorted by model as first seen, image size, batch size, backend and numerics.

    Of records of several method versions only the newest are gathered.
    """
    records, _ = split_methods(records)
    cases: dict[str, list[Record]] = {}
    for record in latest(list(records)).values():
        cases.setdefault(record["case_id"], []).append(record)
    models = list(dict.fromkeys(record["case"]["model"] for record in records))
    settings = [_setting(sorted(runs, key=lambda record: record["run"])) for runs in cases.values()]
    return sorted(settings, key=lambda setting: _order(setting.case, models))


def by_keys(settings: Iterable[Setting], *keys: str) -> list[list[Setting]]:
    """Splits settings into lists that agree in the keys of their cases, in order."""
    groups: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in settings:
        groups.setdefault(tuple(setting.case.get(key) for key in keys), []).append(setting)
    return list(groups.values())


def best_of(settings: Iterable[Setting]) -> Setting | None:
    """Returns the setting of lowest median latency among those with an ok record."""
    timed = [setting for setting in settings if setting.latency]
    return min(timed, key=lambda setting: setting.latency.value, default=None)  # type: ignore[union-attr]


def candidates_of(settings: Iterable[Setting]) -> list[Candidates]:
    groups = by_keys(settings, *CONTEXT, "model", "image_size", "batch_size", "backend")
    return [Candidates(tuple(group), best_of(group)) for group in groups]


def comparisons_of(settings: Sequence[Setting]) -> list[Comparison]:
    """Compares the frameworks at every point that both have, and where their best numerics differ, best with best."""
    comparisons = []
    for family in by_keys(settings, *CONTEXT, "model", "image_size", "batch_size"):
        pairs = [_best_pair(point) for point in points_of(family)]
        comparisons += [_compare(*pair) for pair in pairs if pair]
        overall = _best_pair(family)
        if overall and overall[0].case["numerics"] != overall[1].case["numerics"]:
            comparisons.append(_compare_overall(*overall, family))
    return comparisons


def points_of(settings: Iterable[Setting]) -> list[list[Setting]]:
    """Splits settings into points: those of one are choices of how to compute the same thing, in either framework."""
    points: dict[str, list[Setting]] = {}
    for setting in settings:
        point = {key: value for key, value in setting.case.items() if key not in CHOICES}
        points.setdefault(json.dumps(point, sort_keys=True), []).append(setting)
    return list(points.values())


def unmatched(settings: Sequence[Setting]) -> list[Setting]:
    """Returns one measured setting of every point that only one framework has, and that the other could have."""
    timed = [setting for setting in settings if setting.latency and setting.case["spec"].get("family") not in FOREIGN]
    return [p[0] for p in points_of(timed) if len({setting.case["backend"] for setting in p}) == 1]


def differing(settings: Sequence[Setting]) -> Iterator[tuple[Setting, Setting, ParityResult]]:
    """Gives every setting but the best whose outputs differ from those of the other framework's best, and that best."""
    for point in points_of(settings):
        pair = _best_pair(point) or ()
        for setting, best in ((s, b) for s in point for b in pair if s.ok and s not in pair):
            if best.case["backend"] != setting.case["backend"]:
                parity = _parity(setting, best)
                if parity.status == "differs":
                    yield setting, best, parity


def _setting(runs: list[Record]) -> Setting:
    ok = tuple(record for record in runs if record["status"] == "ok" and record["latency"])
    return Setting(runs[0]["case"], ok, tuple(record for record in runs if record["status"] != "ok"))


def _order(case: Case, models: list[str]) -> tuple[Any, ...]:
    height, width = parse_image_size(case["image_size"])
    numerics = list(NUMERICS).index(case["numerics"]) if case["numerics"] in NUMERICS else len(NUMERICS)
    return models.index(case["model"]), height * width, case["batch_size"], case["backend"], numerics


def _best_pair(settings: Sequence[Setting]) -> tuple[Setting, Setting] | None:
    jax, torch = (best_of(s for s in settings if s.case["backend"] == backend) for backend in ("jax", "torch"))
    return (jax, torch) if jax and torch else None


def _compare(jax: Setting, torch: Setting) -> Comparison:
    parity = _parity(jax, torch)
    if parity.status == "equal":
        return Comparison(jax, torch, parity, None, *_ratios(jax, torch))
    return Comparison(jax, torch, parity, "outputs differ" if parity.status == "differs" else "no parity")


def _compare_overall(jax: Setting, torch: Setting, family: Sequence[Setting]) -> Comparison:
    """Compares across numerics, where each side is proved equal to a setting of the other framework at its numerics."""
    unproved = [side for side in (jax, torch) if not _is_proved(side, family)]
    if unproved:
        names = " and ".join(side.describe("backend", "numerics", "attention", "compile") for side in unproved)
        return Comparison(jax, torch, None, f"nothing proves {names}")
    return Comparison(jax, torch, None, None, *_ratios(jax, torch))


def _is_proved(side: Setting, family: Sequence[Setting]) -> bool:
    [point] = [point for point in points_of(family) if side in point]
    others = [setting for setting in point if setting.ok and setting.case["backend"] != side.case["backend"]]
    return any(_parity(side, other).status == "equal" for other in others)


def _parity(a: Setting, b: Setting) -> ParityResult:
    """Returns the worst result of all pairs of runs: differs before missing before equal, then by error."""
    results = [compare_outputs(x, y) for x in a.ok for y in b.ok]
    severity = {"equal": 0, "missing": 1, "differs": 2}
    return max(results, key=lambda result: (severity[result.status], result.error or 0.0))


def _ratios(jax: Setting, torch: Setting) -> tuple[Estimate, Estimate | None]:
    latency = ratio_interval(torch.wall_s, jax.wall_s)
    has_cpu = jax.case["platform"] == "cpu" and jax.cpu_s and torch.cpu_s
    return latency, ratio_interval(torch.cpu_s, jax.cpu_s) if has_cpu else None
