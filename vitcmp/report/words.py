"""How reports say a case, a setting and what its timing is worth."""

from collections.abc import Iterable, Sequence

from vitcmp.records import Record
from vitcmp.report.summary import CONTENDED, Case, Setting, describe_choices, split_methods
from vitcmp.report.text import UNKNOWN, interval, number, percent
from vitcmp.stats import Estimate

POINT = "model", "size"
STATED = "numerics", "attention", "compile", "layout", "batch_norm"  # the choices that a setting states


def context(case: Case) -> str:
    threads = f", {plural(case['num_threads'], 'thread')}" if case["num_threads"] else ""
    return f"{case['mode']} on {case['device_name']} ({case['platform']}{threads}), weights {case['weights']}"


def named(case: Case) -> str:
    return f"{case['backend']} {case['model']}"


def choices(case: Case) -> str:
    return describe_choices(case, *STATED)


def size(case: Case) -> str:
    return f"{case['image_size']} px, {case['batch_size']}"


def latency_ms(setting: Setting) -> str:
    """Returns the median latency, with its marks: `~` not converged, `!` others used the machine."""
    assert setting.latency is not None
    marks = "~" * (not setting.is_converged) + "!" * setting.is_contended
    return marks + number(1e3 * setting.latency.value)


def rate(setting: Setting) -> str:
    """Returns images/s with half the width of its interval, `110.8 ±1.2 %`."""
    estimate = setting.images_per_s
    if estimate is None:
        return UNKNOWN
    half = (estimate.high - estimate.low) / 2 / estimate.value
    return f"{number(estimate.value)} ±{percent(half)}{mark(estimate)}"


def mark(estimate: Estimate) -> str:
    """Returns `*` where the interval is no 95 % interval."""
    return "*" if estimate.confidence is None else ""


def bounds(estimate: Estimate, scale: float = 1.0, *, digits: int = 4) -> str:
    return interval(scale * estimate.low, scale * estimate.high, like=scale * estimate.value, digits=digits) + mark(
        estimate
    )


def scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def first_of(lines: Sequence[str], most: int) -> list[str]:
    """Returns the first lines, and how many more there are."""
    more = len(lines) - most
    return [*lines[:most], *([f"and {more} more"] if more > 0 else [])]


def marks_notes(settings: Iterable[Setting]) -> list[str]:
    """Explains the marks that the settings carry."""
    settings = list(settings)
    marks = {
        "~ not converged: the interval was still wider than the rule asks when the time was up.": [
            not setting.is_converged for setting in settings
        ],
        f"! others used more than {CONTENDED:.0%} of the machine meanwhile.": [s.is_contended for s in settings],
        "* not a 95 % interval but the range of what was seen: fewer than 6 calls or samples, or too few runs.": [
            any(estimate and estimate.confidence is None for estimate in (setting.latency, setting.images_per_s))
            for setting in settings
        ],
    }
    return [note for note, carried in marks.items() if any(carried)]


def older_note(records: Sequence[Record]) -> str | None:
    """Says how many records are left out, because a newer method version is there; None where none is."""
    newest, older = split_methods(records)
    if not older:
        return None
    versions = sorted({record["method_version"] for record in older})
    return (
        f"Left out: {plural(len(older), 'record')} of method version {', '.join(map(str, versions))}; these are of "
        f"version {newest[0]['method_version']}, and results of different versions do not compare."
    )
