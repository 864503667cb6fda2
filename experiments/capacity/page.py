"""What the page's section "Resolution or compute?" shows, as one JSON value: a pure function of records and examples.

Every number and sentence of the split is that of `analysis` and `tables`. Shares are of 1, times in seconds, memory in
bytes; a float has 5 digits; the unknown is null. The order of the records does not matter.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from experiments.capacity.analysis import CONTRASTS, ArmResult, Interval, Split, split
from experiments.capacity.arms import CELLS, undefined_arms
from experiments.capacity.curves import CurvePair, curve_pairs
from experiments.capacity.examples import Examples
from experiments.capacity.groups import METRICS, Group, groups_of
from experiments.capacity.kinds import KINDS, PER_KIND, group_key, num_alone, ranked, right_shares
from experiments.capacity.schema import Record
from experiments.capacity.tables import NAMES, gain_amount, gain_words, needs_words, share_amount, share_words

TITLE = "Resolution or compute?"
MOST_POINTS = 80  # of a loss curve
Row = dict[str, Any]
GROUP_KEYS = ("dataset", "model", "backend", "low", "high")


def make_capacity(records: Iterable[Record], examples: Examples | None = None) -> Row | None:
    """Returns the value of `payload["capacity"]`; None where there is no record."""
    records = sorted(records, key=_moment)
    if not records:
        return None
    examples = examples or Examples()
    found, notes = groups_of(records)
    groups = sorted(found, key=_order)
    number = {run["run_id"]: i for i, group in enumerate(groups) for run in _runs(group)}
    rows = [_group(group, examples) for group in groups]
    return _rounded(
        {
            "title": TITLE,
            "lead": _lead(groups),
            "arms": [{"name": name, **cell._asdict()} for name, cell in CELLS.items()],
            "gains": [{"name": name, "title": NAMES[name], "of": of} for name, of in CONTRASTS.items()],
            "groups": rows,
            "pairs": [
                _pair(pair, number)
                for pair in curve_pairs(records)
                if {pair.jax["run_id"], pair.torch["run_id"]} <= set(number)
            ],
            "pictures": {name: examples.pictures[name] for name in sorted(_shown(rows))},
            "notes": notes,
        }
    )


def _moment(record: Record) -> tuple[str, ...]:
    return record["started_at"], record["run_id"], record["ended_at"] or "", record["status"]


def _order(group: Group) -> tuple[Any, ...]:
    return (*(group.shared[key] for key in GROUP_KEYS), group.differs, group_key(group))


def _runs(group: Group) -> Iterator[Record]:
    for by_seed in group.runs.values():
        yield from by_seed.values()
    yield from group.failed


def _lead(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in _runs(group)]
    names = [sorted({group.shared[key] for group in groups}) for key in ("dataset", "model", "backend")]
    counts = [_plural(len(some), word) for some, word in zip(names, ("data set", "model", "framework"), strict=True)]
    lost = sum(run["status"] != "ok" for run in runs)
    failed = f" {_plural(lost, 'run')} did not go well, and {'is' if lost == 1 else 'are'} named." if lost else ""
    return f"{_plural(len(runs), 'training run')} on {counts[0]}, of {counts[1]}, in {counts[2]}.{failed}"


def _group(group: Group, examples: Examples) -> Row:
    key = group_key(group)
    return {
        **{name: group.shared[name] for name in GROUP_KEYS},
        "key": key,
        "title": group.title,
        "differs": list(group.differs),
        "chance": _chance(group.shared["data"]),
        "facts": _facts(group.shared),
        **_results(group),
        "absent": _absent(group),
        "cross": list(_cross(group)),
        "curves": [_curve(run) for run in _runs(group) if run["curve"] and run["curve"]["loss"]],
        "failed": [_failure(run) for run in group.failed],
        "notes": [note for note in group.notes if not note.startswith(tuple(_names_of(group.failed)))],
        **_kinds(group, examples.groups.get(key, {})),
    }


def _facts(shared: Mapping[str, Any]) -> list[list[str]]:
    """Returns (name, text) of what all runs of the group share, as a reader would look for it."""
    recipe, data, preprocessing = (shared[key] for key in ("recipe", "data", "preprocessing"))
    device = f"{shared['device_name']} ({shared['platform']})"
    threads = f", {_plural(shared['num_threads'], 'thread')}" if shared["num_threads"] else ""
    facts = {
        "device": f"{shared['num_devices']} x {device}{threads}",
        "versions": shared["versions"],
        "first weights": shared["weights"],
        "data": {name: value for name, value in data.items() if not name.endswith("sha256")},
        "recipe": recipe,
        "preprocessing": preprocessing,
        "attention": shared["attention"],
    }
    return [[name, _said(value)] for name, value in facts.items() if value is not None]


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(item)}" for name, item in sorted(value.items()) if item is not None)
    return value if isinstance(value, str) else json.dumps(value)


def _chance(data: Mapping[str, Any]) -> float | None:
    """Returns the accuracy of who draws every answer by lot."""
    classes, questions = data.get("num_classes"), data.get("num_questions")
    return (
        float(classes) ** -questions
        if isinstance(classes, int) and isinstance(questions, int) and classes > 0
        else None
    )


def _results(group: Group) -> Row:
    """Returns the arms and the split by each metric; nothing of a group in which no run went well."""
    if not group.runs:
        return {"arms": [], "splits": {}}
    splits = {metric: split(group, metric=metric) for metric in METRICS}
    arms = [_arm(group, result) for result in splits["accuracy"].arms.values()]
    return {"arms": arms, "splits": {metric: _split(one) for metric, one in splits.items()}}


def _arm(group: Group, result: ArmResult) -> Row:
    finals = {seed: run["final"] for seed, run in group.runs[result.name].items()}
    return {
        "arm": result.name,
        "seeds": [{"seed": seed, "accuracy": f["accuracy"], "loss": f["loss"]} for seed, f in sorted(finals.items())],
        "num_examples": result.num_examples,
        "accuracy": _interval(result.accuracy),
        "loss": _interval(result.loss),
        "flops": result.flops,
        "num_params": result.num_params,
        "step_s": _interval(result.step_s),
        "memory_bytes": result.memory_bytes,
        "input_bound_share": result.input_bound_share,
    }


def _interval(of: Interval | None) -> Row | None:
    return of and of._asdict()


def _split(one: Split) -> Row:
    gains = [
        {
            **{key: getattr(gain, key) for key in ("name", "value", "low", "high", "verdict", "num_examples")},
            "detectable": gain.detectable,
            "seeds": list(gain.seeds),
            "words": gain_words(gain, one.metric).removesuffix(
                f": {NAMES[gain.name]}"
            ),  # the page says its name before
            "amount": gain_amount(
                gain, one.metric
            ),  # said here, or a tie may be rounded one way here and another there
            "needs": needs_words(gain) if gain.needs else None,
        }
        for gain in one.gains.values()
    ]
    share = {"share": _interval(one.share), "share_amount": share_amount(one.share) if one.share else None}
    return {"gains": gains, **share, "share_words": share_words(one)}


def _absent(group: Group) -> list[Row]:
    """Returns the arms that nothing is known of, and why."""
    try:
        undefined = undefined_arms(*(group.shared[key] for key in ("model", "low", "high")))
    except ValueError:  # a model that this version does not know
        undefined = {}
    reasons = {arm: undefined.get(arm, "no run of it went well") for arm in CELLS if arm not in group.runs}
    tried = {run["run"]["arm"] for run in group.failed}
    return [
        {"arm": arm, "reason": reason if arm in undefined or arm in tried else "it was not trained"}
        for arm, reason in reasons.items()
    ]


def _cross(group: Group) -> Iterator[Row]:
    for trained, by_seed in group.runs.items():
        for tested in CELLS:
            of_seeds = [
                run["final"] if tested == trained else (run["cross"] or {}).get(tested) for run in by_seed.values()
            ]
            known = [result for result in of_seeds if result]
            if known:
                metrics = {metric: _mean([result[metric] for result in known]) for metric in METRICS}
                yield {"trained": trained, "tested": tested, "num_seeds": len(known), **metrics}


def _mean(values: Sequence[float]) -> Row:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def _curve(record: Record) -> Row:
    run, losses = record["run"], record["curve"]["loss"]
    width = math.ceil(len(losses) / MOST_POINTS)
    blocks = [losses[i : i + width] for i in range(0, len(losses), width)]
    keys = ("epoch", "step", "accuracy", "loss")
    return {
        "arm": run["arm"],
        "seed": run["seed"],
        "status": record["status"],
        "num_steps": len(losses),
        "width": width,
        "loss": [statistics.fmean(block) for block in blocks],
        "evaluations": [[evaluation.get(key) for key in keys] for evaluation in record["evaluations"] or []],
    }


def _names_of(failed: Iterable[Record]) -> Iterator[str]:
    """Yields how the notes of a group begin that tell of a failure: the page has a row for each."""
    for record in failed:
        yield f"{record['run']['arm']}, seed {record['run']['seed']}: {record['status']}"


def _failure(record: Record) -> Row:
    run, error = record["run"], record["error"] or {}
    message = " ".join((error.get("message") or "").split())
    return {"arm": run["arm"], "seed": run["seed"], "status": record["status"], "message": message[:300]}


def _kinds(group: Group, stored: Mapping[int, Row]) -> Row:
    """Returns how many examples are of each kind, and those whose pixels are stored."""
    shares = right_shares(group)
    found = {kind: ranked(shares, kind) for kind in KINDS}
    kinds = [
        {"kind": kind, "count": len(indices), "examples": _examples(indices, shares, stored)}
        for kind, indices in found.items()
    ]
    return {"kinds": kinds if shares else [], "alone": num_alone(shares), "has_pixels": bool(stored)}


def _examples(indices: Sequence[int], shares: Mapping[str, Any], stored: Mapping[int, Row]) -> list[Row]:
    shown = [stored[index] for index in indices if index in stored][:PER_KIND]
    return [
        {
            "index": one["index"],
            "id": one["id"],
            "answer": ", ".join(map(str, one["answer"])),
            "right": {arm: float(share[one["index"]]) for arm, share in shares.items()},
            "pictures": {arm: one["pictures"][arm] for arm in CELLS if arm in one["pictures"]},
        }
        for one in shown
    ]


def _shown(groups: Iterable[Row]) -> set[str]:
    examples = (one for group in groups for kind in group["kinds"] for one in kind["examples"])
    return {name for one in examples for name in one["pictures"].values()}


def _pair(pair: CurvePair, number: Mapping[str, int]) -> Row:
    return {
        **{side: number[getattr(pair, side)["run_id"]] for side in ("jax", "torch")},
        "arm": pair.run["arm"],
        "seed": pair.run["seed"],
        "num_steps": pair.num_steps,
        "difference": pair.loss.difference,
        "step": pair.loss.step,
        "relative": pair.loss.relative,
        "norm_relative": pair.gradient_norm.relative,
        "first": pair.first_loss,
        "accuracy": pair.accuracy,
        "num_differing": pair.num_differing,
    }


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _rounded(value: Any) -> Any:
    """Rounds every float to 5 digits, as `vitcmp.report.payload` does."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
