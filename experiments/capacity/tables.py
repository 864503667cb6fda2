"""Splits as tables and sentences, for the terminal and as Markdown. What is printed has its interval, n and units."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console

from experiments.capacity.analysis import CONTRASTS, Gain, Interval, Split, splits_of
from experiments.capacity.arms import CELLS, undefined_arms
from experiments.capacity.curves import CurvePair, curve_pairs
from experiments.capacity.groups import Group
from experiments.capacity.power import MAX_SEEDS
from experiments.capacity.schema import Record
from vitcmp.report.text import UNKNOWN, Column, Fitted, number, percent, power
from vitcmp.report.text import interval as bounds

ARM_COLUMNS = (
    (Column("arm", "arm"), Column("cell", "information, compute", is_wrapped=True)),
    (Column("gflop", "GFLOP", is_number=True), Column("params", "param., M", is_number=True)),
    (Column("accuracy", "accuracy, %", is_number=True), Column("loss", "loss", is_number=True)),
    (Column("step", "step, ms", is_number=True), Column("memory", "process, MB", is_number=True)),
    (Column("input", "input-bound", is_number=True), Column("n", "seeds x examples", is_number=True)),
)
GAIN_COLUMNS = (
    (Column("name", "of the gain"),),
    (Column("words", "what is seen", is_wrapped=True),),
    (Column("detectable", "would see", is_number=True), Column("needs", "for 1 point", is_wrapped=True)),
    (Column("n", "seeds x examples", is_number=True),),
)
OVERVIEW_COLUMNS = (
    (Column("dataset", "data"), Column("model", "model", is_wrapped=True)),
    (Column("backend", "framework"), Column("sizes", "low, high, px")),
    tuple(Column(arm, f"{arm}, %", is_number=True) for arm in CELLS),
    (
        Column("capacity", "capacity, points", is_number=True),
        Column("resolution", "resolution, points", is_number=True),
    ),
    (Column("n", "seeds x examples", is_number=True),),
)
CURVE_COLUMNS = (
    (Column("run", "run", is_wrapped=True),),
    (Column("seeds", "seeds", is_number=True), Column("steps", "steps", is_number=True)),
    (Column("first", "loss, step 0", is_number=True), Column("step", "loss, at step", is_number=True)),
    (Column("loss", "loss", is_number=True), Column("relative", "relative", is_number=True)),
    (Column("norm", "grad. norm, rel.", is_number=True),),
    (Column("accuracy", "accuracy, points", is_number=True), Column("differing", "differ", is_number=True)),
)
ARM_NOTES = (
    "Brackets: 95 % over seeds and test examples, as if both were drawn anew. GFLOP: forward of one image. Step: the "
    "median of a training step without its wait for images. Process: its largest peak, MB of 10^6 bytes.",
)
GAIN_NOTES = (
    "Each interval is of 95 % by itself, paired in seeds and examples. Effect: it excludes 0. Would see: the true "
    "effect that comes out as one 4 times in 5. For 1 point: what would see an effect of 1 point so often, judged by "
    "the spread of these seeds, of which few know little.",
)
OVERVIEW_NOTES = (
    "An arm's accuracy is its mean over seeds. Capacity: what down_up gains over low, resolution: what high gains over "
    "down_up; brackets: 95 % over seeds and test examples. Where they hold 0 there is no effect at this power.",
)
CROSS_NOTES = ("Accuracy in %, mean ± standard deviation over seeds; weights carried to the tested arm's sizes.",)
CURVE_NOTES = (
    "The largest |JAX - torch| over the steps, of the seed where it is largest. Differ: test examples that only one of "
    "the two gets right.",
)
NAMES = {
    "capacity": "capacity",
    "resolution": "resolution",
    "total": "total",
    "resolution_at_low": "resolution at low's compute",
    "interaction": "interaction",
}


def print_report(records: Sequence[Record], console: Console | None = None) -> None:
    """Prints every table of the records, each group by itself, what was left out, and last the overview."""
    console = console or Console()
    splits, notes = splits_of(records)
    for table in (*tables_of(splits), *curve_tables(curve_pairs(records))):
        console.print(table)
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False)
    if splits:
        console.print(overview_table(splits))


def markdown_report(records: Sequence[Record]) -> str:
    """Returns the same tables as Markdown, the overview first; equal records give equal text."""
    splits, notes = splits_of(records)
    overview = [overview_table(splits)] if splits else []
    tables = [*overview, *tables_of(splits), *curve_tables(curve_pairs(records))]
    return "\n\n".join([*(table.to_markdown() for table in tables), *notes]) + "\n"


def tables_of(splits: Iterable[Split]) -> Iterator[Fitted]:
    for split in splits:
        yield arms_table(split)
        if split.gains:
            yield gains_table(split)
        if table := cross_table(split.group):
            yield table


def overview_table(splits: Sequence[Split]) -> Fitted:
    """Returns a row for each split: what its arms reached, and the two gains; a model's frameworks stand together."""
    kinds = [(split.group.shared["dataset"], split.group.shared["model"]) for split in splits]
    together = sorted(range(len(splits)), key=lambda i: kinds.index(kinds[i]))
    rows = [_overview_row(splits[i]) for i in together]
    return Fitted("Resolution, or only compute?", OVERVIEW_COLUMNS, rows, OVERVIEW_NOTES)


def arms_table(split: Split) -> Fitted:
    """Returns a row for each arm, those that the model cannot have among them."""
    group, absent = split.group, undefined_arms(*(split.group.shared[key] for key in ("model", "low", "high")))
    rows = [_arm_row(split, arm) for arm in split.arms]
    rows += [_absent_row(arm, reason) for arm, reason in absent.items() if arm not in split.arms]
    return Fitted(group.title, ARM_COLUMNS, rows, (*ARM_NOTES, *group.notes))


def gains_table(split: Split) -> Fitted:
    rows = [_gain_row(gain, split.metric) for gain in split.gains.values()]
    return Fitted(f"Who gains what: {split.group.title}", GAIN_COLUMNS, rows, (share_words(split), *GAIN_NOTES))


def cross_table(group: Group) -> Fitted | None:
    """Returns the matrix of arms trained and tested, or None where no model was tested across."""
    crossed = {arm for runs in group.runs.values() for run in runs.values() for arm in run["cross"] or ()}
    if not crossed:
        return None
    tested = [arm for arm in CELLS if arm in crossed or arm in group.runs]
    columns = ((Column("trained", "trained as"),), *((Column(arm, f"as {arm}", is_number=True),) for arm in tested))
    rows = [{"trained": arm} | {other: _cross_cell(group, arm, other) for other in tested} for arm in group.runs]
    return Fitted(f"Trained as one arm, tested as another: {group.title}", columns, rows, CROSS_NOTES)


def curve_tables(pairs: Sequence[CurvePair]) -> Iterator[Fitted]:
    """Yields a table with a row for each arm of a model, of the seed that is farthest apart; none without pairs."""
    alike: dict[str, list[CurvePair]] = {}
    for pair in pairs:
        alike.setdefault(_curve_name(pair), []).append(pair)
    if alike:
        rows = [_curve_row(name, some) for name, some in alike.items()]
        yield Fitted("The same runs in JAX and torch", CURVE_COLUMNS, rows, CURVE_NOTES)


def gain_words(gain: Gain, metric: str = "accuracy") -> str:
    """Returns a gain as one would quote it: `down_up gains 3.1 points [1.9, 4.3] over low: capacity`."""
    is_lost = gain.verdict == "effect" and gain.value < 0
    amount = _amount(Interval(-gain.value, -gain.high, -gain.low) if is_lost else _interval_of(gain), metric)
    if gain.name == "interaction":
        words = f"resolution is worth {amount} {'less' if is_lost else 'more'} at high compute than at low"
    else:
        over, under = CONTRASTS[gain.name]
        words = f"{over} loses {amount} against {under}" if is_lost else f"{over} gains {amount} over {under}"
    return f"{words}: {_verdict_words(gain, metric)}"


def gain_amount(gain: Gain, metric: str = "accuracy") -> str:
    """Returns the number alone, in points of accuracy or of loss: `+3.1 [1.9, 4.3]`."""
    value, low, high = (_size(end, _interval_of(gain), metric) for end in _interval_of(gain))
    return f"{'+' * (gain.value > 0)}{value} [{low}, {high}]"


def share_words(split: Split) -> str:
    """Returns how much of the total is capacity, or why nobody can say."""
    if split.share is None:
        return f"The share that is capacity is not known: {split.why_no_share}."
    return f"Of the total, {share_amount(split.share)} is capacity, the rest resolution."


def share_amount(share: Interval) -> str:
    value, low, high = (100 * end for end in share)
    return f"{value:.0f} % [{low:.0f}, {high:.0f}]"


def needs_words(gain: Gain) -> str:
    """Returns what would show an effect of 1 point: `5 seeds`."""
    if gain.needs is None:
        return UNKNOWN
    if gain.needs.num_seeds:
        return f"{gain.needs.num_seeds} seeds"
    if gain.needs.num_examples:
        return f"more than {gain.needs.num_examples:,} test examples, no seeds alone"
    return f"more than {MAX_SEEDS:,} seeds"


def _verdict_words(gain: Gain, metric: str) -> str:
    if gain.verdict == "not judged":
        return "not judged, of one seed"
    if gain.verdict == "effect":
        return NAMES[gain.name] + (", for the worse" if gain.value < 0 else "")
    assert gain.detectable is not None
    return f"{gain.verdict} (would have seen {_size(gain.detectable, _interval_of(gain), metric)})"


def _interval_of(gain: Gain) -> Interval:
    return Interval(gain.value, gain.low, gain.high)


def _amount(of: Interval, metric: str) -> str:
    value, low, high = (_size(end, of, metric) for end in of)
    return f"{value} {'points' if metric == 'accuracy' else 'of loss'} [{low}, {high}]"


def _size(value: float, of: Interval, metric: str) -> str:
    """Returns points of accuracy, or loss, to the decimals that the interval is worth."""
    half = (of.high - of.low) / 2
    if metric == "accuracy":
        return f"{100 * value:.{1 if half >= 0.001 or half == 0 else 2}f}"
    return number(value, digits=2, like=half or value)


def _overview_row(split: Split) -> dict[str, str]:
    shared, arms = split.group.shared, split.arms
    gains = {name: split.gains.get(name) for name in ("capacity", "resolution")}
    counts = {(len(gain.seeds), gain.num_examples) for gain in gains.values() if gain}
    counts = counts or {(len(result.seeds), result.num_examples) for result in arms.values()}
    return {
        **{key: shared[key] for key in ("dataset", "backend")},
        "model": " ".join([shared["model"], *(f"({one})" for one in split.group.differs)]),
        "sizes": f"{shared['low']}, {shared['high']}",
        **{arm: f"{100 * arms[arm].accuracy.value:.1f}" if arm in arms else UNKNOWN for arm in CELLS},
        **{name: gain_amount(gain, split.metric) if gain else UNKNOWN for name, gain in gains.items()},
        "n": ", ".join(f"{num_seeds} x {num_examples:,}" for num_seeds, num_examples in sorted(counts)),
    }


def _arm_row(split: Split, arm: str) -> dict[str, str]:
    result = split.arms[arm]
    return {
        "arm": arm,
        "cell": _cell(split.group, arm),
        "gflop": UNKNOWN if result.flops is None else number(result.flops * 1e-9),
        "params": number(result.num_params * 1e-6),
        "accuracy": _with_bounds(Interval(*(100 * end for end in result.accuracy))),
        "loss": _with_bounds(result.loss),
        "step": _with_bounds(Interval(*(1e3 * end for end in result.step_s))) if result.step_s else UNKNOWN,
        "memory": UNKNOWN if result.memory_bytes is None else f"{result.memory_bytes * 1e-6:.0f}",
        "input": percent(result.input_bound_share),
        "n": f"{len(result.seeds)} x {result.num_examples:,}",
    }


def _absent_row(arm: str, reason: str) -> dict[str, str]:
    empty = {column.key: UNKNOWN for stack in ARM_COLUMNS for column in stack}
    return empty | {"arm": arm, "cell": reason.removeprefix(f"{arm} is ")}


def _cell(group: Group, arm: str) -> str:
    information, compute = (group.shared[side] for side in CELLS[arm])
    return f"{information}, {compute}"


def _gain_row(gain: Gain, metric: str) -> dict[str, str]:
    return {
        "name": NAMES[gain.name],
        "words": gain_words(gain, metric),
        "detectable": _size(gain.detectable, _interval_of(gain), metric) if gain.detectable is not None else UNKNOWN,
        "needs": needs_words(gain),
        "n": f"{len(gain.seeds)} x {gain.num_examples:,}",
    }


def _cross_cell(group: Group, trained: str, tested: str) -> str:
    runs = group.runs[trained].values()
    accuracies = [
        100 * (run["final"] if tested == trained else (run["cross"] or {}).get(tested, {})).get("accuracy", math.nan)
        for run in runs
    ]
    known = [accuracy for accuracy in accuracies if not math.isnan(accuracy)]
    if not known:
        return UNKNOWN
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


def _curve_name(pair: CurvePair) -> str:
    run = pair.run
    return " ".join(filter(None, (run["dataset"], run["model"], run["recipe"].get("numerics"), run["arm"])))


def _curve_row(name: str, pairs: Sequence[CurvePair]) -> dict[str, str]:
    worst = pairs[0]
    return {
        "run": name,
        "seeds": str(len(pairs)),
        "steps": f"{worst.num_steps:,}",
        "first": power(worst.first_loss),
        "loss": power(worst.loss.difference),
        "relative": power(worst.loss.relative),
        "step": f"{worst.loss.step:,}",
        "norm": power(worst.gradient_norm.relative),
        "accuracy": UNKNOWN if worst.accuracy is None else f"{100 * worst.accuracy:+.1f}",
        "differing": UNKNOWN if worst.num_differing is None else f"{worst.num_differing:,}",
    }


def _with_bounds(of: Interval, digits: int = 3) -> str:
    return f"{number(of.value, digits=digits)} {bounds(of.low, of.high, like=of.value, digits=digits)}"
