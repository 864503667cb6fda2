"""JAX against torch on screen: are the outputs equal, and only then, which is faster."""

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from vitcmp.records import Record
from vitcmp.report.summary import (
    CONTEXT,
    Comparison,
    Setting,
    by_keys,
    comparisons_of,
    differing,
    settings_of,
    unmatched,
)
from vitcmp.report.text import UNKNOWN, Column, Fitted, duration, interval, model_name, number, parity_detail, power
from vitcmp.report.words import (
    POINT,
    STATED,
    bounds,
    choices,
    context,
    latency_ms,
    mark,
    marks_notes,
    named,
    plural,
    size,
)
from vitcmp.stats import Estimate, verdict

NAMES = {"jax": "JAX", "torch": "torch"}
COMPARISON = (
    (Column("model", "model", is_wrapped=True), Column("size", "image, batch")),
    (Column("numerics", "numerics"), Column("parity", "outputs", is_wrapped=True)),
    (Column("error", "error"), Column("bound", "bound")),
    (Column("jax", "JAX, ms", True), Column("jax_setting", "best setting", is_wrapped=True)),
    (Column("torch", "torch, ms", True), Column("torch_setting", "best setting", is_wrapped=True)),
    (Column("verdict", "latency", is_wrapped=True), Column("interval", "torch / JAX")),
    (Column("cpu", "CPU time"), Column("cpu_interval", "torch / JAX")),
)

TURN_S = 60.0  # sides that start this soon after one another took turns: between them lies the start of a process


def comparison_table(records: Sequence[Record]) -> Group:
    """Shows, for every point that both frameworks have, whether outputs are equal, and if so the ratio of times.

    Each side is represented by its setting of lowest median latency. Where their best numerics differ, a further row
    holds the best of any numerics against each other, if each is proved by the other framework at its own numerics.
    """
    contexts = by_keys(settings_of(records), *CONTEXT)
    return Group(*(_comparison(settings) for settings in contexts if comparisons_of(settings)), *_unmatched(records))


def _comparison(settings: Sequence[Setting]) -> Fitted:
    comparisons = comparisons_of(settings)
    sides = [side for c in comparisons for side in (c.jax, c.torch)]
    has_cpu = any(c.cpu for c in comparisons)
    stacks = COMPARISON if has_cpu else COMPARISON[:-1]
    notes = [*_comparison_notes(comparisons), *_differing_notes(settings), *marks_notes(sides)]
    title = f"The same model in JAX and in torch: {context(settings[0].case)}"
    return Fitted(title, stacks, [_comparison_row(c) for c in comparisons], notes, POINT)


def _comparison_row(comparison: Comparison) -> dict[str, str]:
    c, case, parity = comparison, comparison.jax.case, comparison.parity
    stated = STATED[1:] if parity else STATED
    error, bound = (parity.error, parity.bound) if parity else (None, None)
    sign = "" if error is None or bound is None else "< " if error <= bound else "> "
    return {
        "model": model_name(case["model"]),
        "size": size(case),
        "numerics": case["numerics"] if parity else "best of any",
        "parity": _parity_words(comparison),
        "error": UNKNOWN if error is None else power(error),
        "bound": UNKNOWN if bound is None else sign + power(bound),
        "jax": latency_ms(c.jax),
        "jax_setting": c.jax.describe(*stated),
        "torch": latency_ms(c.torch),
        "torch_setting": c.torch.describe(*stated),
        "verdict": _verdict_words(c),
        "interval": ratio_bounds(c.latency) if c.latency else "",
        "cpu": number(c.cpu.value, digits=3) if c.cpu else UNKNOWN,
        "cpu_interval": bounds(c.cpu, digits=3) if c.cpu else "",
    }


def _parity_words(comparison: Comparison) -> str:
    if comparison.parity is None:
        return "not proved" if comparison.refusal else "equal, each at its own"
    return {"missing": "not proved"}.get(comparison.parity.status, comparison.parity.status)


def _verdict_words(comparison: Comparison) -> str:
    if comparison.latency:
        return ratio_words(comparison.latency)
    detail = f" ({parity_detail(comparison.parity)})" if comparison.parity else ""
    return f"refused: {comparison.refusal}{detail}"


def ratio_words(ratio: Estimate) -> str:
    """Says a ratio of torch over JAX in words: `JAX 1.32x faster`, `ambiguous, 1.02x`."""
    match verdict((ratio.low, ratio.high)):
        case "slower":  # torch takes more time
            return f"JAX {number(ratio.value, digits=3)}x faster"
        case "faster":
            return f"torch {number(1 / ratio.value, digits=3)}x faster"
        case word:
            return f"{word}, {ratio.value:.2f}x"


def ratio_bounds(ratio: Estimate) -> str:
    """Returns the interval of what `ratio_words` says: of JAX over torch where torch is the faster one."""
    low, high = (1 / ratio.high, 1 / ratio.low) if verdict((ratio.low, ratio.high)) == "faster" else ratio[1:3]
    return interval(low, high, like=max(low, 1), digits=3) + mark(ratio)


def _comparison_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """Says what the table stands on, and how far the two sides were apart in time."""
    runs = sorted({len(side.ok) for c in comparisons for side in (c.jax, c.torch)})
    gaps = [c.gap_s for c in comparisons if c.gap_s > TURN_S]
    notes = [
        "outputs: logits of one photograph, same weights, evaluation mode; error: max |difference| / max |logit|; "
        "bound: what rounding can do.",
        "latency: ratio of medians; faster: its interval is beyond 3 %; same: within; ambiguous: it crosses that edge.",
        f"Runs (fresh processes) a side: {' to '.join(str(count) for count in dict.fromkeys((runs[0], runs[-1])))}.",
    ]
    if comparisons[0].jax.case["mode"] == "train":
        notes[0] += " Of a train step also its first loss; gradients are compared in the tests only."
    if runs[0] == 1:
        notes[-1] += " With one, what differs between processes is outside the interval: --runs 5 brings it in."
    if gaps:
        rows = f"{len(gaps)} of {plural(len(comparisons), 'row')}"
        notes.append(
            f"Not interleaved in {rows}: the sides ran up to {duration(max(gaps))} apart, so the machine's drift is "
            "inside those ratios: indicative. --backend jax,torch takes turns."
        )
    return notes


def _differing_notes(settings: Sequence[Setting]) -> list[str]:
    return [
        f"Outputs differ from the best {NAMES[best.case['backend']]} setting's: "
        f"{named(one.case)} {choices(one.case)}, {size(one.case)} ({parity_detail(parity)})."
        for one, best, parity in differing(settings)
    ]


def _unmatched(records: Sequence[Record]) -> list[Text]:
    """Says which measured points have no counterpart; where only the context differs, what in it."""
    alone = unmatched(settings_of(records))
    if len({setting.case["backend"] for setting in alone}) < 2:
        return []
    contexts = {key: {str(setting.case[key]) for setting in alone} for key in CONTEXT}
    differ = "; ".join(f"{key} {' and '.join(sorted(values))}" for key, values in contexts.items() if len(values) > 1)
    text = f"{plural(len(alone), 'point')} measured in one framework only, so not compared"
    return [Text(f"{text}. They differ in: {differ}.\n" if differ else f"{text}.\n", style="dim")]
