"""How often does a comparison say `faster` or `slower` of nothing, and how often does it find a slow-down of 5 %?

Command: python -m experiments.noise                 (100 comparisons of each kind: about an hour on a 2-core CPU)
         python -m experiments.noise --smoke         (2 of each kind, a minute)
Expected: of equal sides at most 5 % are called faster or slower; of those with 5 % more work at least 95 % slower.
Outputs: records under --out, and tables of rates with exact binomial intervals. It goes on after a stop, kill -9 too.
Exit codes: 0 both hold, 1 one does not or a comparison failed, 2 bad usage, 130 interrupted.

Each comparison is what experiments/peers.py makes of ours and theirs: vitcmp.timing.PairRule, in fresh processes. In
each of them a small model is built, loaded and compiled twice, and the two programs are timed against each other. A
timed call is 20 forward passes; where ours is slowed down, it is 21, which is 5 % more at any speed of the machine (a
busy loop of fixed length would be less than 5 % once neighbours slow the model down). The children are pinned to one
CPU, so that CPU time decides; --num_threads=2 audits wall time.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from absl import flags
from rich.console import Console

from experiments import pairs
from experiments.pairs import Pair
from vitcmp.backend import require_choice
from vitcmp.compare import Comparison
from vitcmp.records import Record
from vitcmp.report.text import UNKNOWN, Column, Fitted, Stacks
from vitcmp.runner import Interrupt
from vitcmp.specs import get_spec
from vitcmp.stats import binomial_interval
from vitcmp.timing import PairRule
from vitcmp.usage import start

OUT = flags.DEFINE_string("out", "results/noise", "The folder of records; what is there already is not run again.")
NUM = flags.DEFINE_integer("num", 100, "Comparisons of each kind.", lower_bound=1)
BACKENDS = flags.DEFINE_list("backend", ["torch", "jax"], "The backends, in turn.")
NUM_THREADS = flags.DEFINE_integer("num_threads", 1, "CPUs that a child is pinned to.", lower_bound=1)
SMOKE = flags.DEFINE_boolean("smoke", False, "Two comparisons of each kind.")
TIMEOUT_S = flags.DEFINE_float("timeout_s", 300.0, "Seconds after which a child is ended.", 1.0, 2e6)
RETRY = flags.DEFINE_boolean("retry", False, "Tries again what failed.")

# Models of about a millisecond, by their attention in each backend.
MODELS: dict[str, dict[str, str | None]] = {
    "vit_ti16:depth=3": {"torch": "flash", "jax": "xla"},
    "resnet18:width=16,depths=1+1": {"torch": None, "jax": None},
    "convnext_atto:depths=1+1+2+1": {"torch": None, "jax": None},
}
CALLS = 20
KINDS = {"equal": CALLS, "5 % slower": CALLS + 1}  # calls of ours against CALLS of theirs
MOST_FALSE, LEAST_FOUND = 0.05, 0.95
PACKAGES = {"torch": ("torch",), "jax": ("jax", "jaxlib", "flax")}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One comparison: of which kind, of which model, and what came out; None where it failed."""

    kind: str
    name: str
    result: Comparison | None

    @property
    def is_hit(self) -> bool:
        """Of equal sides: called faster or slower. Of a slowed one: called slower."""
        wrong = ("faster", "slower") if self.kind == "equal" else ("slower",)
        return self.result is not None and self.result.verdict in wrong


def main(argv: Sequence[str]) -> int:
    console, num = Console(), 2 if SMOKE.value else NUM.value
    for backend in BACKENDS.value:
        require_choice("backend", backend, tuple(PACKAGES))
    wanted = make_pairs(num, BACKENDS.value)
    store = pairs.open_store(OUT.value)
    with store.lock(), Interrupt() as interrupt:
        results = pairs.run_pairs(
            wanted,
            child_module="experiments.noise_steps",
            store=store,
            interrupt=interrupt,
            rule=PairRule(),
            num_threads=pairs.check_threads(NUM_THREADS.value),
            timeout_s=TIMEOUT_S.value,
            retry=RETRY.value,
            progress=pairs.show_progress(console, len(wanted)),
        )
    outcomes = [judge(records) for records in results.values() if records and pairs.is_done(records)]
    holds = report(outcomes, console)
    if interrupt.requested:
        return 130
    return int(not holds)


def make_pairs(num: int, backends: Sequence[str]) -> list[Pair]:
    """Returns `num` comparisons of each kind: kinds, backends and models in turn, so that a stop leaves a fair part."""
    points = [(backend, model) for model in MODELS for backend in backends]
    return [
        {
            "experiment": "noise",
            "backend": backend,
            "point": {
                "model": model,
                "image_size": "64",
                "batch_size": 1,
                "attention": MODELS[model][backend],
                "kind": kind,
                "repeat": repeat,
                "built_first": pairs.SIDES[repeat // len(points) % 2],
            },
            "ours": {"name": f"{calls} calls", "calls": calls},
            "theirs": {"name": f"{CALLS} calls", "calls": CALLS},
            "versions": pairs.versions(*PACKAGES[backend]),
        }
        for repeat, (backend, model) in zip(range(num), itertools.cycle(points), strict=False)
        for kind, calls in KINDS.items()
    ]


def judge(records: Sequence[Record]) -> Outcome:
    pair = records[0]["pair"]
    is_ok = all(record["status"] == "ok" for record in records)
    name = f"{pair['backend']} {get_spec(pair['point']['model']).family}"
    return Outcome(pair["point"]["kind"], name, pairs.compare_records(records) if is_ok else None)


def report(outcomes: Sequence[Outcome], console: Console) -> bool:
    """Prints the rates and the ratios of each kind, and says whether both bounds hold."""
    holds = True
    for kind in KINDS:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        if not of_kind:
            continue
        console.print(make_table(kind, of_kind))
        rate = sum(outcome.is_hit for outcome in of_kind) / len(of_kind)
        is_within = rate <= MOST_FALSE if kind == "equal" else rate >= LEAST_FOUND
        what = f"false verdicts, at most {MOST_FALSE:.0%}" if kind == "equal" else f"found, at least {LEAST_FOUND:.0%}"
        num_failed = sum(outcome.result is None for outcome in of_kind)
        verdict = "pass" if is_within and not num_failed else "FAIL"
        failures = f"; {num_failed} comparisons failed" if num_failed else ""
        console.print(f"{kind}: {rate:.1%} {what}: {verdict}{failures}\n", highlight=False)
        holds &= verdict == "pass"
    return holds and bool(outcomes)


def make_table(kind: str, outcomes: Sequence[Outcome]) -> Fitted:
    """A row for each backend and model, and one for all of them."""
    by_name = collections.defaultdict(list)
    for outcome in outcomes:
        by_name[outcome.name].append(outcome)
    rows = [_row(name, part) for name, part in [*sorted(by_name.items()), ("all", list(outcomes))]]
    clocks = {"cpu_s": "CPU time", "wall_s": "wall time"}
    used = sorted({clocks[outcome.result.clock] for outcome in outcomes if outcome.result})
    return Fitted(f"Sides: {kind}; {' and '.join(used)} decides", make_columns(kind), rows)


def make_columns(kind: str) -> Stacks:
    return (
        (Column("name", "model"),),
        (Column("n", "n", is_number=True), Column("hits", "false" if kind == "equal" else "found", is_number=True)),
        (Column("interval", "95 % (exact)"),),
        (Column("ambiguous", "ambiguous", is_number=True), Column("processes", "processes", is_number=True)),
        (Column("ratios", "least, median, most"), Column("others", "by the other clock")),
    )


def _row(name: str, outcomes: Sequence[Outcome]) -> dict[str, str]:
    num_hits, results = sum(outcome.is_hit for outcome in outcomes), [o.result for o in outcomes if o.result]
    low, high = binomial_interval(num_hits, len(outcomes))
    others = [result.other_ratio for result in results if result.other_ratio]
    return {
        "name": name,
        "n": str(len(outcomes)),
        "hits": f"{num_hits} ({num_hits / len(outcomes):.1%})",
        "interval": f"{low:.1%} to {high:.1%}",
        "ambiguous": str(sum(result.verdict == "ambiguous" for result in results)),
        "processes": f"{np.mean([result.num_processes for result in results]):.1f}" if results else UNKNOWN,
        "ratios": _spread([result.ratio for result in results]),
        "others": _spread(others),
    }


def _spread(ratios: Sequence[float]) -> str:
    return " ".join(f"{quantile:.3f}" for quantile in np.quantile(ratios, (0, 0.5, 1))) if ratios else UNKNOWN


if __name__ == "__main__":
    start(main)
