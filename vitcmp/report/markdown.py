"""The README's result table as Markdown, from records: the question at a glance. Equal records give equal bytes."""

import datetime
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vitcmp.cases import PRESETS, Grid, get_preset
from vitcmp.records import Record
from vitcmp.report.comparison import NAMES, ratio_bounds, ratio_words
from vitcmp.report.summary import (
    CONTEXT,
    Comparison,
    Setting,
    best_of,
    by_keys,
    comparisons_of,
    points_of,
    settings_of,
    split_methods,
)
from vitcmp.report.text import UNKNOWN, number, parity_detail
from vitcmp.report.words import STATED, bounds, context, latency_ms, marks_notes, older_note, plural, rate, scaled

HEAD = (
    "model",
    "image, px",
    "batch",
    "numerics",
    "GFLOP",
    "param., M",
    *(f"{name}: latency, ms" for name in NAMES.values()),
    "faster, by latency",
    *(f"{name}: images/s" for name in NAMES.values()),
    *(f"{name}: activations, MB" for name in NAMES.values()),
    "outputs",
)
BLOCK = re.compile(r"<!-- results: begin ?(?P<folder>[^ ]*) -->\n(?P<body>.*?)<!-- results: end -->", re.DOTALL)
ESCAPES = {c: f"&#{ord(c)};" for c in "&<|`[*"}
# The flags of a sweep, by what they are called in a case.
AXES = {
    "models": "model",
    "image_sizes": "image_size",
    "batch_sizes": "batch_size",
    "numerics": "numerics",
    "attention": "attention",
    "compile": "compile",
    "layout": "layout",
    "batch_norm": "batch_norm",
}
NOTES = (
    "Of each framework the setting of lowest median latency, named under it. Latency: median of calls, the device idle "
    "after each, with its 95 % interval and the number of runs (fresh processes) x calls; images/s: measured apart, "
    "with calls queued, ± half the width of its 95 % interval.",
    "Faster: the interval of the ratio of latencies is beyond 3 %; same: within; ambiguous: it crosses that edge. A "
    "ratio is given only where the outputs are equal: the largest difference of the logits of one photograph, over the "
    "largest logit, is no more than rounding can do.",
    "GFLOP: forward of one image, 2 per multiply-add. MB: 10^6 bytes.",
)


def results_table(records: Sequence[Record]) -> str:
    """Returns a table for each device, kind of step and set of weights, and under them what they stand on.

    Only records of the newest method version are in it. Raises ValueError where nothing has been measured.
    """
    records = [harmless(record) for record in records]
    settings = settings_of(records)
    if not any(setting.latency for setting in settings):
        raise ValueError("no record holds a measurement: there is nothing to show")
    records, _ = split_methods(older := records)
    parts = [part for group in by_keys(settings, *CONTEXT) for part in (_title(group), _table(group))]
    timed = [setting for setting in settings if setting.latency]
    notes = [*NOTES, *_activation_notes(timed), *marks_notes(timed), *filter(None, [older_note(older)])]
    commands = "\n".join(sweep_commands(settings))
    facts = "\n".join(f"- {fact}" for fact in (*_facts(records), *notes))
    return "\n\n".join([*parts, facts, f"The command that asks for these cases:\n\n```\n{commands}\n```"]) + "\n"


def harmless(value: Any) -> Any:
    """Returns the value with all texts in it as a page may have them: no tag, no link, no end of a cell or of code."""
    if isinstance(value, str):
        return "".join(ESCAPES.get(c, c) if c.isprintable() else " " for c in value)
    if isinstance(value, dict):
        return {harmless(key): harmless(item) for key, item in value.items()}
    return value


def _title(settings: Sequence[Setting]) -> str:
    return f"**{context(settings[0].case)}**"


def _table(settings: Sequence[Setting]) -> str:
    rule = ["---", *["---:"] * (len(HEAD) - 2), "---"]
    rows = [_row(point) for point in points_of(settings)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (HEAD, rule, *rows))


def _row(point: Sequence[Setting]) -> list[str]:
    sides = [[setting for setting in point if setting.case["backend"] == backend] for backend in NAMES]
    best = [best_of(side) for side in sides]
    some = next(filter(None, best), point[0])
    comparisons = comparisons_of(point)
    flops, params = scaled(some.image_flops, 1e-9), scaled(some.first("num_params"), 1e-6)
    return [
        f"`{some.case['model']}`",
        some.case["image_size"],
        str(some.case["batch_size"]),
        some.case["numerics"],
        number(flops),
        number(params),
        *(_latency(setting, side) for setting, side in zip(best, sides, strict=True)),
        _verdict(comparisons),
        *(rate(setting) if setting else UNKNOWN for setting in best),
        *(_activations(setting) for setting in best),
        _parity(comparisons),
    ]


def _latency(best: Setting | None, side: Sequence[Setting]) -> str:
    """Returns `12.31 [12.20, 12.40]`, the setting, and n; or what became of the attempts."""
    if best is None or best.latency is None:
        return ", ".join(dict.fromkeys(record["status"] for setting in side for record in setting.failed)) or UNKNOWN
    runs, calls = best.latency.num_runs[0], best.latency.num_values[0]
    of_each = sorted({len(wall_s) for wall_s in best.wall_s})
    n = f"{runs} x {of_each[0]}" if len(of_each) == 1 else f"{runs} runs, {calls} calls"
    return f"{latency_ms(best)} {bounds(best.latency, 1e3)}<br>{best.describe(*STATED[1:])}<br>{n}"


def _activations(setting: Setting | None) -> str:
    num_bytes = setting.first("memory", "activation_peak_bytes") if setting else None
    return number(scaled(num_bytes, 1e-6), digits=3)


def _verdict(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return UNKNOWN
    [comparison] = comparisons
    if comparison.latency is None:
        return f"refused: {comparison.refusal}"
    return f"{ratio_words(comparison.latency)}<br>{ratio_bounds(comparison.latency)}"


def _parity(comparisons: Sequence[Comparison]) -> str:
    if not comparisons or not (parity := comparisons[0].parity):
        return UNKNOWN
    return f"{'not proved' if parity.status == 'missing' else parity.status}<br>{parity_detail(parity)}"


def _activation_notes(settings: Iterable[Setting]) -> list[str]:
    sources = {f"{s.first('memory', 'activation_source')} ({s.case['backend']})" for s in settings}
    apart = ": never compare the two" if len(sources) > 1 else ""
    return [f"Activations: one call's peak beyond weights and inputs, as {', '.join(sorted(sources))}{apart}."]


def _facts(records: Sequence[Record]) -> list[str]:
    """Says on what, with what and when the records were measured, and at which commit."""
    hosts = [record["environment"] for record in records if record["environment"]]
    devices = [record["device"] for record in records if record["device"]]
    versions = {word for device in devices for word in _versions(device)}
    versions |= {f"{name} {host[name]}" for host in hosts for name in ("vitcmp", "numpy") if host.get(name)}
    versions |= {f"Python {host['python']}" for host in hosts if host.get("python")}
    days = sorted({datetime.datetime.fromisoformat(record["started_at"]).date().isoformat() for record in records})
    machines = sorted({_machine(host) for host in hosts} | {_accelerator(device) for device in devices})
    facts = {
        "Machine": ["; ".join(filter(None, machines))],
        "Versions": sorted(versions),
        "Measured": [" to ".join(dict.fromkeys((days[0], days[-1])))],
        "Commit": sorted({_commit(host) for host in hosts}),
    }
    return [f"{name}: {', '.join(filter(None, values)) or 'unknown'}." for name, values in facts.items()]


def _machine(host: dict[str, Any]) -> str:
    memory = scaled(host.get("memory_bytes"), 2**-30)
    parts = (host.get("cpu"), plural(host["num_cpus"], "CPU") if host.get("num_cpus") else None)
    return ", ".join(filter(None, (*parts, f"{memory:.0f} GiB" if memory else None, host.get("os"))))


def _versions(device: dict[str, Any]) -> Iterator[str]:
    """Yields `jax 0.10.2`; the name of the runtime says nothing on a CPU, and may have several lines elsewhere."""
    for name, version in (device["versions"] or {}).items():
        if version != device["platform"]:
            yield f"{name} {' '.join(version.split())}"


def _accelerator(device: dict[str, Any]) -> str:
    if device["platform"] in (None, "cpu"):
        return ""
    memory = scaled(device["memory_bytes"], 2**-30)
    return f"{device['name']}{f', {memory:.0f} GiB' if memory else ''}"


def _commit(host: dict[str, Any]) -> str:
    if not host.get("commit"):
        return "unknown"
    return host["commit"][:10] + (" with changes" if host.get("is_dirty") else "")


def sweep_commands(settings: Sequence[Setting]) -> list[str]:
    """Returns the command of vitcmp.run that asks for these cases, one for each kind of step and cap of sampling."""
    timed_alike = by_keys(settings, "mode", "max_sampling_s", "platform")
    return [shlex.join(["python", "-m", "vitcmp.run", *_flags(group)]) for group in timed_alike]


def _flags(settings: Sequence[Setting]) -> list[str]:
    """Returns the flags that differ from the first preset with this cap of sampling."""
    case = settings[0].case
    grids = {name: get_preset(name, case["platform"]) for name in PRESETS}
    preset = next((name for name in PRESETS if grids[name].max_sampling_s == case.get("max_sampling_s")), PRESETS[0])
    backends = list(dict.fromkeys(setting.case["backend"] for setting in settings))
    flags = {"backend": backends, "preset": [] if preset == PRESETS[0] else [preset]}
    flags |= {axis: _changed(axis, settings, grids[preset], backends) for axis in AXES}
    flags["mode"] = [case["mode"]] if case["mode"] != "forward" else []
    num_runs = 1 + max(record["run"] for setting in settings for record in (*setting.ok, *setting.failed))
    flags["runs"] = [str(num_runs)] if num_runs > 1 else []
    return [word for name, values in flags.items() if values for word in (f"--{name}", ",".join(values))]


def _changed(axis: str, settings: Sequence[Setting], preset: Grid, backends: Sequence[str]) -> list[str]:
    """Returns the values of the axis that the cases have, or none where they are the preset's."""
    values = [setting.case.get(AXES[axis]) for setting in settings]
    seen = list(dict.fromkeys(str(value) for value in values if value is not None))
    offered: Any = getattr(preset, axis)
    if isinstance(offered, dict):
        offered = [value for backend in backends for value in offered.get(backend, ())]
    return [] if not seen or set(seen) == set(map(str, offered)) else seen


def named_folders(text: str) -> list[str]:
    """Returns the folders of records that a page's markers name, in order."""
    return [match["folder"] for match in BLOCK.finditer(text) if match["folder"]]


def replace_table(text: str, folder: str, table: str) -> str:
    """Puts the table between the markers that name the folder, or else between those that name none.

    Raises ValueError where the page has neither.
    """
    places = {match["folder"]: match for match in BLOCK.finditer(text)}
    match = places.get(folder) or places.get("")
    if match is None:
        have = f"there are those of {', '.join(places)}" if places else "there are none"
        raise ValueError(f"no markers <!-- results: begin {folder} --> and <!-- results: end -->; {have}")
    block = f"<!-- results: begin {folder} -->\n\n{table}\n<!-- results: end -->"
    return text[: match.start()] + block + text[match.end() :]
