"""What the measurements stand on, by device: its rates, measured and as its maker gives them, and the environment."""

import datetime
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vitcmp.devices import peak_bytes_per_s, peak_flops
from vitcmp.records import Record
from vitcmp.report.rows import device_label
from vitcmp.report.summary import Setting, by_keys

MACHINE = "platform", "device_name", "num_threads"
FLOPS, BYTES = "matmul_flops_per_s", "copy_bytes_per_s"
HOST = {"cpu": "CPU", "num_cpus": "CPUs", "os": "OS", "kernel": "kernel", "python": "Python", "numpy": "NumPy"}


def ceilings_of(settings: Sequence[Setting]) -> Iterator[dict[str, Any]]:
    """Yields the rates of each device, backend and numerics of which any is known; the largest that was measured."""
    for group in by_keys(settings, *MACHINE, "backend", "numerics"):
        case = group[0].case
        measured = [ceiling for record in _records(group) if (ceiling := record.get("ceilings"))]
        rates = {
            "flops_per_s": _rate(_fastest(measured, FLOPS), FLOPS),
            "bytes_per_s": _rate(_fastest(measured, BYTES), BYTES),
            "peak_flops_per_s": peak_flops(case["device_name"], case["numerics"]),
            "peak_bytes_per_s": peak_bytes_per_s(case["device_name"]),
        }
        if any(rates.values()):
            keys = {"device": device_label(case), "backend": case["backend"], "numerics": case["numerics"]}
            yield {**keys, **rates, "how": _how(measured)}


def environments_of(settings: Sequence[Setting]) -> Iterator[dict[str, Any]]:
    """Yields for each device the facts of its records, several values of one joined by commas."""
    for group in by_keys(settings, *MACHINE):
        facts: dict[str, set[str]] = {}
        records = list(_records(group))
        for record in records:
            for name, value in (*_host_facts(record), *_device_facts(record)):
                facts.setdefault(name, set()).add(value)
        days = sorted(datetime.datetime.fromisoformat(record["started_at"]).date().isoformat() for record in records)
        facts["measured"] = {" to ".join(dict.fromkeys((days[0], days[-1])))}
        pairs = [[name, ", ".join(sorted(values))] for name, values in facts.items()]
        yield {"device": device_label(group[0].case), "facts": pairs}


def _records(settings: Iterable[Setting]) -> Iterator[Record]:
    for setting in settings:
        yield from (*setting.ok, *setting.failed)


def _fastest(measured: Iterable[Any], key: str) -> Any:
    """Returns what holds the largest rate; None where none is known."""
    return max((ceiling for ceiling in measured if _rate(ceiling, key)), key=lambda c: _rate(c, key) or 0, default=None)


def _rate(ceiling: Any, key: str) -> float | None:
    rate = (ceiling or {}).get(key)
    return rate if isinstance(rate, int | float) and 0 < rate < 1e30 else None


def _how(measured: Sequence[Any]) -> str | None:
    """Returns how the largest rates were measured, of two records the part of each; or why there are none."""
    found = [c for key in (FLOPS, BYTES) if (c := _fastest(measured, key))] or measured
    words = list(dict.fromkeys(how for c in found if isinstance(how := c.get("how"), str)))
    if len(words) < 2 or found is measured:
        return next(iter(words), None)
    return f"{words[0].partition('; ')[0]}; {words[1].rpartition('; ')[2]}"  # as vitcmp.worker joins them


def _host_facts(record: Record) -> Iterator[tuple[str, str]]:
    host = record["environment"] or {}
    for key, name in HOST.items():
        if host.get(key) is not None:
            yield name, str(host[key])
    if isinstance(memory := host.get("memory_bytes"), int):
        yield "memory, GiB", f"{memory / 2**30:.1f}"
    if host.get("vitcmp"):
        yield "vitcmp", str(host["vitcmp"])
    if host.get("commit"):
        yield "commit", str(host["commit"])[:10] + (" with changes" if host.get("is_dirty") else "")
    for name, value in _items(host.get("flags")):
        if value and "/" not in value:  # a path says who measured where
            yield name, value


def _device_facts(record: Record) -> Iterator[tuple[str, str]]:
    device = record["device"] or {}
    if device.get("platform") not in (None, "cpu"):
        if isinstance(memory := device.get("memory_bytes"), int):
            yield "device memory, GiB", f"{memory / 2**30:.1f}"
        if device.get("num_devices") is not None:
            yield "devices", str(device["num_devices"])
    for name, version in _items(device.get("versions")):
        if version != device.get("platform"):  # the name of the runtime, which says nothing on a CPU
            yield name, version


def _items(values: Any) -> Iterator[tuple[str, str]]:
    for name, value in values.items() if isinstance(values, dict) else ():
        yield name, " ".join(str(value).split())
