"""Reading specs as text: image sizes, `field=value` overrides, and the did-you-mean of errors."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np


def parse_overrides(cls: type, base: str, overrides: str) -> dict[str, Any]:
    hints, parsed = get_type_hints(cls), {}
    allowed = sorted(field.name for field in dataclasses.fields(cls))
    for item in filter(None, overrides.split(",")):
        field, equals, value = (part.strip() for part in item.partition("="))
        if field not in allowed:
            fields = f"the fields of {base} are: {', '.join(allowed)}"
            raise ValueError(f"unknown field {item!r}{did_you_mean(field, allowed)}; write field=value, {fields}")
        if not equals or not value:
            raise ValueError(f"{field} has no value; write {field}=value")
        parsed[field] = _parse_value(field, value, hints[field])
    return parsed


def parse_image_size(text: Any) -> tuple[int, int]:
    """Returns (height, width) in pixels from 224, "224", "80x176" or (80, 176)."""
    parts = text.split("x") if isinstance(text, str) else text
    parts = list(parts) if isinstance(parts, list | tuple) else [parts]
    sides = [_whole(part) for part in parts]
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(
            f"image_size={text!r} must be a side (224) or height x width (80x176), in pixels, each 1 or more"
        )
    return sides[0], sides[-1]


def format_image_size(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def require_small(fields: Mapping[str, Any]) -> None:
    """Raises ValueError for sizes that are slips of the keyboard: with a depth of 10**12 no list of weights ends."""
    for name, value in fields.items():
        limit = 1000 if name in ("depth", "depths") else 1_000_000
        parts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(part, int | np.integer) and part > limit for part in parts):
            raise ValueError(f"{name}={value!r} must be {limit:,} at most")


def did_you_mean(word: Any, allowed: Any) -> str:
    """Returns "; did you mean 'x'?" for the nearest allowed word, or an empty string."""
    word = str(word)
    names = [str(item) for item in allowed]
    same_letters = [name for name in names if name.lower() == word.lower()]
    close = same_letters or difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _parse_value(field: str, text: str, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        return text  # __post_init__ names the choices
    if field == "image_size":
        return parse_image_size(text)
    booleans = {"true": True, "false": False, "on": True, "off": False}
    if hint is bool or (field == "rep_size" and text.lower() in booleans):
        if text.lower() not in booleans:
            raise ValueError(f"{field}={text!r} must be true or false")
        return booleans[text.lower()]
    if hint is float:
        return _number(field, text, float)
    if hint is int or (get_origin(hint) is not tuple and int in get_args(hint) and text.isdigit()):
        return _number(field, text, int)
    parts = text[:-1] if text.endswith("+") else text  # `2+` is the tuple of one
    return tuple(_number(field, part, int) for part in re.split(r"[x+]", parts))


def _whole(part: Any) -> int:
    """Returns the number of pixels, or 0 for what is none."""
    if isinstance(part, str):
        return int(part) if re.fullmatch(r"\s*[0-9]+\s*", part) else 0
    return int(part) if isinstance(part, int | np.integer) and not isinstance(part, bool) else 0


def _number(field: str, text: str, kind: type) -> Any:
    pattern = r"[0-9.]+(e[+-]?[0-9]+)?" if kind is float else "[0-9]+"
    try:
        if re.fullmatch(pattern, text, re.IGNORECASE):
            return kind(text)
    except ValueError:  # such as 1.2.3
        pass
    raise ValueError(f"{field}={text!r} must be {'a number' if kind is float else 'a whole number'}, 0 or more")
