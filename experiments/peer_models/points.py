"""The points of experiments/peers.py: which pairs there are, in what order, how long they take, what is expected."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from experiments import pairs
from experiments.pairs import Pair
from experiments.peer_models.registry import MODELS, PEERS, default_attention
from vitcmp.backend import COMPILE, LAYOUT, MODES, NUMERICS, require_choice
from vitcmp.flops import count_flops
from vitcmp.records import Record
from vitcmp.specs import get_spec, parse_image_size
from vitcmp.timing import PairRule

PACKAGES = {"torch": ("torch",), "jax": ("jax", "jaxlib", "flax", "optax")}
EXPECTED_TO_DIFFER = ("keras", "resnet50")  # v1, with its strides elsewhere
# For estimates alone. Seconds to import a library and build both sides, and for which a program compiles, on a 2-core
# CPU; FLOP/s that one thread of a CPU and an accelerator reach in these models.
START_S, COMPILE_S = {"torch": 10.0, "jax": 20.0}, {"forward": 3.0, "train": 12.0}
FLOPS_PER_S = {"cpu": 8e10, "gpu": 1e14, "tpu": 1e14}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What is asked for; None stands for the backend's first, and for all of its libraries."""

    backend: str
    peers: tuple[str, ...] | None = None
    models: tuple[str, ...] = MODELS
    image_sizes: tuple[str, ...] = ("224", "512")
    batch_sizes: tuple[int, ...] = (1, 8)
    modes: tuple[str, ...] = MODES
    device: str = "cpu"
    numerics: str = "float32"
    attention: str | None = None
    layout: str | None = None
    compile: str | None = None

    def make_pairs(self) -> list[Pair]:
        """Returns a pair for each point and library: the cheapest cells of the grid first, each with all its models."""
        self._check()
        cells = itertools.product(self.modes, self.image_sizes, self.batch_sizes)
        return [
            self._make_pair(peer, model, *cell)
            for cell in sorted(cells, key=lambda cell: _cost(*cell))
            for model in self.models
            for peer in self.peers or self._all_peers()
            if model in PEERS[peer].models
        ]

    def _all_peers(self) -> tuple[str, ...]:
        return tuple(name for name, peer in PEERS.items() if peer.backend == self.backend)

    def _check(self) -> None:
        """Raises ValueError for what is not known."""
        require_choice("backend", self.backend, tuple(PACKAGES))
        allowed = {"peers": self._all_peers(), "models": MODELS, "modes": MODES}
        for argument, choices in allowed.items():
            for value in getattr(self, argument) or ():
                require_choice(argument, value, choices)
        params, activations = NUMERICS[self.numerics]
        if params != activations:
            raise ValueError(f"numerics={self.numerics}: libraries' parameters and activations have one dtype only")

    def _make_pair(self, peer: str, model: str, mode: str, image_size: str, batch_size: int) -> Pair:
        overrides = PEERS[peer].models[model]
        text = f"{model}:{overrides}" if overrides else model
        where = {"platform": self.device, "mode": mode, "numerics": self.numerics}
        kernel = default_attention(get_spec(text), peer=peer, **where)
        setting = {
            "device": self.device,
            "numerics": self.numerics,
            "attention": kernel and (self.attention or kernel),
            "layout": self.layout or LAYOUT[self.backend][0],
            "compile": self.compile or COMPILE[self.backend][0],
        }
        return {
            "experiment": "peers",
            "backend": self.backend,
            "ours": {"name": "vitcmp", "model": text},
            "theirs": {"name": peer},
            "point": {"model": model, "image_size": image_size, "batch_size": batch_size, "mode": mode},
            "setting": setting,
            "versions": pairs.versions(*PACKAGES[self.backend], PEERS[peer].package),
        }


def _cost(mode: str, image_size: str, batch_size: int) -> float:
    height, width = parse_image_size(image_size)
    return height * width * batch_size * (3 if mode == "train" else 1)


def make_rule(num_processes: int | None) -> PairRule:
    """Returns the rule of a comparison, with as many processes for each point where a number is given."""
    if num_processes is None:
        return PairRule()
    return PairRule(min_processes=num_processes, max_processes=num_processes)


def estimate_s(pair: Pair, rule: PairRule, num_threads: int, num_done: int = 0) -> float:
    """Estimates the seconds of a pair's processes to come: import, build, compile, compare, warm up, time."""
    point, setting = pair["point"], pair["setting"]
    spec = dataclasses.replace(get_spec(pair["ours"]["model"]), image_size=parse_image_size(point["image_size"]))
    rate = FLOPS_PER_S[setting["device"]] * (num_threads if setting["device"] == "cpu" else 1)
    call_s = count_flops(spec, mode=point["mode"]).total * point["batch_size"] / rate
    is_compiled = setting["compile"] != "eager"
    make_s = START_S[pair["backend"]] + 2 * COMPILE_S[point["mode"]] * is_compiled + 8 * call_s
    round_s = 4 * max(rule.block_s, call_s)
    times_s = max(round_s, min(rule.max_s, 3 * rule.min_rounds * round_s))
    return max(1, rule.min_processes - num_done) * (make_s + times_s)


def seconds_left(
    wanted: Sequence[Pair], records: Iterable[Record], rule: PairRule, num_threads: int, *, retry: bool
) -> list[float]:
    """Returns an estimate for each pair, which is 0 where the records have all its processes."""
    done = pairs.by_pair(records)
    found = [done.get(pairs.pair_id(pair, rule, num_threads), {}) for pair in wanted]
    return [
        0.0
        if pairs.next_process(have, rule, retry=retry) is None
        else estimate_s(pair, rule, num_threads, sum(record["status"] == "ok" for record in have.values()))
        for pair, have in zip(wanted, found, strict=True)
    ]


def is_expected(records: Sequence[Record]) -> bool:
    """Says whether a pair came out as it should: nothing slower, nothing failed, and one library that differs."""
    pair = records[-1]["pair"]
    if any(record["status"] != "ok" for record in records):
        is_other = (pair["theirs"]["name"], pair["point"]["model"]) == EXPECTED_TO_DIFFER
        return is_other and records[-1]["status"] == "differs"
    return pairs.compare_records(records).verdict != "slower"
