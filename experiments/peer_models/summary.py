"""The pairs of experiments/peers.py, a row for each library: how often ours is faster, and by how much."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from experiments import pairs
from experiments.peer_models.registry import PEERS
from vitcmp.records import Record
from vitcmp.report.text import UNKNOWN, Column, Fitted

VERDICTS = ("faster", "same", "ambiguous", "slower")
COLUMNS = (
    (Column("backend", "framework"), Column("library", "library")),
    (Column("setting", "setting", is_wrapped=True),),
    (Column("models", "models", is_wrapped=True),),
    (Column("points", "points", is_number=True), Column("processes", "processes a point", is_number=True)),
    (
        *(Column(verdict, verdict, is_number=True) for verdict in VERDICTS),
        Column("ruled_out", "slower ruled out", is_number=True),
    ),
    tuple(Column(key, key, is_number=True) for key in ("differs", "failed", "unfinished")),
    tuple(
        Column(key, title, is_number=True) for key, title in (("median", "median ratio"), ("range", "least to most"))
    ),
)
NOTES = (
    "A point is a model, an image size, a batch size and a kind of step; the ratio is the time of ours over theirs, of "
    "equal weights, outputs compared first. Faster, slower: its 95 % interval is beyond 3 %; same: within; ambiguous: "
    "it crosses that edge, or a single process had too few rounds to tell. Slower ruled out: the interval ends below "
    "+3 %, so that ours is faster, the same, or one of these two. Differs: another model, not timed.",
)


def summary_table(records: Iterable[Record]) -> Fitted:
    """Returns a row for each framework, library and machine that the records have."""
    points = [list(processes.values()) for processes in pairs.by_pair(records).values()]
    known = list(dict.fromkeys(filter(None, map(_machine, points))))
    libraries: dict[tuple[str, str, str], list[list[Record]]] = defaultdict(list)
    for some in points:
        pair, num_threads = some[0]["pair"], some[0]["num_threads"]
        # What failed before it saw its device is counted with the others where these have one machine.
        machine = _machine(some) or (known[0] if len(known) == 1 else pair["setting"]["device"])
        setting = f"{machine}, {pair['setting']['numerics']}, threads: {num_threads}"
        libraries[pair["backend"], _library(pair), setting].append(some)
    rows = [_row(*key, libraries[key]) for key in sorted(libraries, key=lambda key: (key[0] != "torch", key[2]))]
    return Fitted("Our models against other libraries'", COLUMNS, rows, (*_slower_notes(libraries.values()), *NOTES))


def _library(pair: pairs.Pair) -> str:
    """Returns its name with its version, if it has one."""
    name = pairs.name_of(pair["theirs"])
    return " ".join(filter(None, (name, pair["versions"].get(PEERS[name].package))))


def _machine(processes: Sequence[Record]) -> str | None:
    """Returns the name of the device that a point was timed on; None where no process got so far."""
    return next((record["facts"]["device"]["name"] for record in processes if record.get("facts")), None)


def _row(backend: str, library: str, setting: str, points: Sequence[list[Record]]) -> dict[str, str]:
    timed = [pairs.compare_records(some) for some in points if _status(some) == "ok"]
    verdicts, statuses = Counter[str](result.verdict for result in timed), Counter(map(_status, points))
    ratios = [result.ratio for result in timed]
    numbers = sorted({result.num_processes for result in timed})
    return {
        "backend": backend,
        "library": library,
        "setting": setting,
        "models": ", ".join(dict.fromkeys(some[0]["pair"]["point"]["model"] for some in points)),
        "points": str(len(points)),
        "processes": UNKNOWN if not numbers else "-".join(map(str, sorted({numbers[0], numbers[-1]}))),
        **{verdict: str(verdicts[verdict]) for verdict in VERDICTS},
        "ruled_out": str(sum(result.rules_out_slower for result in timed)),
        "differs": str(statuses["differs"]),
        "failed": str(len(points) - len(timed) - statuses["differs"] - statuses["interrupted"]),
        "unfinished": str(statuses["interrupted"]),
        "median": f"{statistics.median(ratios):.2f}" if ratios else UNKNOWN,
        "range": f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else UNKNOWN,
    }


def _status(processes: Sequence[Record]) -> str:
    """Returns what is wrong with a point, or ok."""
    return next((record["status"] for record in processes if record["status"] != "ok"), "ok")


def _slower_notes(libraries: Iterable[Sequence[list[Record]]]) -> list[str]:
    timed = [some for points in libraries for some in points if _status(some) == "ok"]
    slower = [
        f"{pairs.describe(some[0]['pair'])} ({pairs.compare_records(some).ratio:.2f})"
        for some in timed
        if pairs.compare_records(some).verdict == "slower"
    ]
    return [f"Slower: {'; '.join(slower)}." if slower else f"Of {len(timed)} points that were timed none is slower."]
