"""A few test examples as each arm sees them: `examples.json`, beside the records, for a report without the data set.

    {"schema": "vitcmp-capacity-examples/1",
     "groups": {KEY: [{"index", "id", "answer": [text of each question], "pictures": {arm: NAME}}]},
     "pictures": {NAME: base64 of a PNG}}

KEY is `kinds.group_key`. NAME is the beginning of the file's sha256: arms, models and frameworks share pictures.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.capacity.arms import CELLS
from vitcmp.report.output import write_text

SCHEMA = "vitcmp-capacity-examples/1"
FILE = "examples.json"
NAME_LENGTH = 16
SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass
class Examples:
    """What the file holds: examples by group and index, and pictures by name."""

    groups: dict[str, dict[int, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    pictures: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, key: str, example: Mapping[str, Any], pictures: Mapping[str, str]) -> None:
        self.groups.setdefault(key, {})[example["index"]] = dict(example)
        self.pictures |= pictures

    def update(self, other: "Examples") -> None:
        for key, examples in other.groups.items():
            for example in examples.values():
                self.add(key, example, {name: other.pictures[name] for name in example["pictures"].values()})

    def to_json(self) -> str:
        groups = {key: [some[i] for i in sorted(some)] for key, some in sorted(self.groups.items())}
        value = {"schema": SCHEMA, "groups": groups, "pictures": dict(sorted(self.pictures.items()))}
        return json.dumps(value, separators=(",", ":"))


def read_examples(path: Path) -> Examples:
    """Returns what the file holds that is whole; nothing of one that is not there or of another kind."""
    found = Examples()
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, AttributeError, KeyError):
        value = json.loads(path.read_bytes())
        if value["schema"] == SCHEMA:
            pictures = {name: data for name, data in value["pictures"].items() if _is_picture(name, data)}
            for key, examples in value["groups"].items():
                for example in filter(_is_example, examples):
                    own = {arm: name for arm, name in example["pictures"].items() if arm in CELLS and name in pictures}
                    used = {name: pictures[name] for name in own.values()}
                    found.add(key, {**example, "pictures": own}, used)
    return found


def write_examples(path: Path, examples: Examples) -> None:
    """Writes the file whole or not at all. Raises OSError."""
    write_text(str(path), examples.to_json())


def picture_name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:NAME_LENGTH]


def _is_picture(name: Any, data: Any) -> bool:
    """Says whether it is a PNG under its own name: what another hand wrote there is shown to nobody."""
    try:
        content = base64.b64decode(data, validate=True)
    except (TypeError, ValueError):
        return False
    return content.startswith(SIGNATURE) and picture_name(content) == name


def _is_example(example: Any) -> bool:
    kinds = {"index": int, "id": str, "answer": list, "pictures": dict}
    return isinstance(example, dict) and all(isinstance(example.get(key), kind) for key, kind in kinds.items())
