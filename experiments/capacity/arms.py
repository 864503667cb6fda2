"""The arms: cells of {information} x {compute}, each a spec and the sizes that an image is resized to for it.

    low      information low   compute low     resized to `low`
    down_up  information low   compute high    resized to `low`, then to `high`
    high     information high  compute high    resized to `high`
    patch    information high  compute low     resized to `high`; patches high / low times as large, so `low`'s tokens

The first three are those of PaliGemma (arXiv:2407.07726, section 5.7.1 and figure 9); `patch` is the cell that its
2 x 2 lacks. It exists for a ViT and a ViTDet whose patch grows to a whole number of pixels; a CNN has no patch.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from vitcmp.flops import count_flops
from vitcmp.initial import fit_patch_size
from vitcmp.params import Weights, check_weights, fit_image_size
from vitcmp.specs import ForeignSpec, Spec, ViTSpec, did_you_mean, format_image_size, get_spec, parse_image_size

Side = Literal["low", "high"]
Size = tuple[int, int]  # height, width


class Cell(NamedTuple):
    information: Side
    compute: Side


CELLS = {
    "low": Cell("low", "low"),
    "down_up": Cell("low", "high"),
    "high": Cell("high", "high"),
    "patch": Cell("high", "low"),
}
# What may differ between the specs of two arms. The window is one number of tokens; what it covers follows the grid.
FREE_FIELDS = {"image_size", "patch_size"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    name: str
    information: Side
    compute: Side
    sizes: tuple[Size, ...]  # that an image is resized to, one after the other; the last is the spec's
    spec: Spec

    @property
    def flops(self) -> int:
        """FLOPs of one image's forward pass, 2 per multiply-add."""
        return count_flops(self.spec).total

    @property
    def num_tokens(self) -> int | None:
        """Tokens of the model; None for one that has none."""
        return self.spec.num_tokens if isinstance(self.spec, ViTSpec) else None


def make_arms(spec: Spec | str, low: Any, high: Any, names: Iterable[str] = tuple(CELLS)) -> dict[str, Arm]:
    """Returns the arms of the model by name; those that it cannot have are left out (`undefined_arms` says why).

    low, high: image sizes, as 224, "96x160" or (height, width), each side of `low` below that of `high`. `spec` gives
    the patch size and everything else; its own image size does not matter. A ViTDet's `window_size` is in tokens, so at
    `high` a window covers less of the image; with `window_policy="divide"` the windows fit each grid anew.

    Raises ValueError for an unknown arm, for one named twice or none, low >= high, a size that the patch does not
    divide or that is too small for the model, and a model of another library, whose weights fit one size only.
    """
    spec, names = get_spec(spec), _check_names(names)
    low, high = _check_sizes(spec, low, high)
    reasons = _reasons(spec, low, high)
    arms = {name: _make_arm(spec, low, high, name) for name in names if name not in reasons}
    if not arms:
        raise ValueError(f"arms={','.join(names)}: none is left: {'; '.join(reasons[name] for name in names)}")
    return arms


def undefined_arms(spec: Spec | str, low: Any, high: Any, names: Iterable[str] = tuple(CELLS)) -> dict[str, str]:
    """Returns why the model cannot have an arm, by its name; raises ValueError as `make_arms`."""
    spec, names = get_spec(spec), _check_names(names)
    reasons = _reasons(spec, *_check_sizes(spec, low, high))
    return {name: reasons[name] for name in names if name in reasons}


def arm_weights(weights: Mapping[str, np.ndarray], base_spec: Spec | str, arm: Arm) -> Weights:
    """Returns one checkpoint's weights as an arm starts from them: the same for every arm, resampled to its grid.

    `weights` are those of `base_spec`, at any image size. The patch embedding is resampled first (`fit_patch_size`),
    then position embeddings and relative positions (`fit_image_size`); arrays that fit are passed on as they are.
    Raises ValueError where the two specs differ in more than the sizes of image and patch, and for weights that do not
    fit `base_spec`.
    """
    base_spec = get_spec(base_spec)
    _check_alike(base_spec, arm.spec)
    check_weights(weights, base_spec)
    fitted = dict(weights)
    if isinstance(arm.spec, ViTSpec):
        fitted = fit_image_size(fit_patch_size(fitted, arm.spec), arm.spec)
    check_weights(fitted, arm.spec, source=f"weights of {base_spec.family} for arm {arm.name}")
    return fitted


def weights_sha256(weights: Mapping[str, np.ndarray]) -> str:
    """Returns the hash of the arrays by name, dtype, shape and values, in whatever order: what all arms start from."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def carry_weights(weights: Mapping[str, np.ndarray], trained: Arm, tested: Arm) -> Weights:
    """Returns the weights that one arm ended with as the model of another, to be tested on that one's images."""
    return arm_weights(weights, trained.spec, tested)


def cross_pairs(arms: Mapping[str, Arm]) -> Iterator[tuple[Arm, Arm]]:
    """Yields (trained, tested) for every two different arms: the matrix without its diagonal, row by row."""
    yield from itertools.permutations(arms.values(), 2)


def _make_arm(spec: Spec, low: Size, high: Size, name: str) -> Arm:
    cell = CELLS[name]
    changes: dict[str, Any] = {"image_size": low if name == "low" else high}
    if name == "patch":
        assert isinstance(spec, ViTSpec)
        changes["patch_size"] = spec.patch_size * high[0] // low[0]
    sizes = (low, high) if name == "down_up" else (changes["image_size"],)
    return Arm(name=name, **cell._asdict(), sizes=sizes, spec=dataclasses.replace(spec, **changes))


def _reasons(spec: Spec, low: Size, high: Size) -> dict[str, str]:
    """Returns why arms are not defined; only `patch` can be so."""
    if not isinstance(spec, ViTSpec):
        return {"patch": f"patch is not defined: a CNN ({spec.family}) has no patch"}
    between = f"between {format_image_size(low)} and {format_image_size(high)} px"
    if low[0] * high[1] != low[1] * high[0]:
        return {"patch": f"patch is not defined: {between} height and width grow by different factors"}
    if spec.patch_size * high[0] % low[0]:
        size = f"{spec.patch_size} x {high[0]} / {low[0]}"
        return {"patch": f"patch is not defined: {between} a patch would be of {size} px, which is no whole number"}
    return {}


def _check_names(names: Iterable[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in CELLS:
            raise ValueError(f"unknown arm {name!r}{did_you_mean(name, CELLS)}; allowed: {', '.join(CELLS)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"arms={','.join(names)!r} must name one or more of {', '.join(CELLS)}, each once")
    return names


def _check_sizes(spec: Spec, low: Any, high: Any) -> tuple[Size, Size]:
    low, high = _parse("low", low), _parse("high", high)
    if isinstance(spec, ForeignSpec):
        raise ValueError(f"model {spec.family}:{spec.name} has no arms: only its library knows how its weights resize")
    if not all(a < b for a, b in zip(low, high, strict=True)):
        given = f"low={format_image_size(low)} and high={format_image_size(high)}"
        raise ValueError(f"{given}: each side of low must be less than that of high, in pixels")
    if isinstance(spec, ViTSpec):
        _check_divisible(spec.patch_size, low=low, high=high)
    for size in (low, high):
        dataclasses.replace(spec, image_size=size)  # raises where it is too small for the model
    return low, high


def _check_divisible(patch_size: int, **sizes: Size) -> None:
    is_cut = {name: any(side % patch_size for side in size) for name, size in sizes.items()}
    cut = [f"{name}={format_image_size(size)}" for name, size in sizes.items() if is_cut[name]]
    if cut:
        raise ValueError(
            f"{' and '.join(cut)}: each side must be a multiple of the patch size of {patch_size} pixels, or the arms "
            "would lose different pixels at the edges"
        )


def _check_alike(base_spec: Spec, spec: Spec) -> None:
    base, own = ({"family": each.family, **dataclasses.asdict(each)} for each in (base_spec, spec))
    differ = [
        f"{name}={base.get(name)!r} and {own.get(name)!r}"
        for name in base | own
        if name not in FREE_FIELDS and base.get(name) != own.get(name)
    ]
    if differ:
        raise ValueError(f"the weights are of another model than the arm: {', '.join(differ)}")


def _parse(argument: str, value: Any) -> Size:
    try:
        return parse_image_size(value)
    except ValueError as error:
        raise ValueError(str(error).replace("image_size", argument, 1)) from None
