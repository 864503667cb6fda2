"""Trees of arrays in one file: the weights inside what training programs write, and the subtrees of a file of several.

Arrays are named by `/`-joined paths. Source: google-research/big_vision, `utils.py` (load_params). Deviation: what is
dropped beside the weights must be known as training state, or not look like weights.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vitcmp.specs import did_you_mean

# Where training programs keep the weights, and what they keep beside them.
WRAPPERS = ("params", "opt/target", "optimizer/target", "target")
TRAINING_STATE = ("opt", "opt_state", "optimizer", "chrono", "step", "state", "states", "extra")
OPTIMIZERS = {"opt", "opt_state", "optimizer"}  # whose moments have the names of the weights
WEIGHTS = re.compile(r"(^|/)(kernel|bias|scale|gamma|beta|mean|var|cls|cls_token|probe|pos_embed\w*|embedding|latent)$")
# Where a model's own names begin inside a longer one.
BEGINNING = re.compile(
    r"(^|/)(embedding/kernel|pos_embedding$|Transformer/|root_block/|conv_root/|resnet/root_block/|"
    r"patch_embed[./]proj[./]|blocks[./]0[./]|stages[./]0[./]|layer1[./]0[./])"
)


def select_tree(state: Mapping[str, Any], subtree: str, source: str) -> Mapping[str, Any]:
    """Returns the arrays of a checkpoint's weights by their names inside, or of the `/`-joined `subtree` of them.

    Leaves WRAPPERS out of the names, and the training state beside them out of the arrays. Raises ValueError for a
    subtree that is not there, for weights beside the weights, for a model in a subtree that was not named, and where an
    optimizer's moments are all that there is.
    """
    tree = _named_subtree(state, subtree, source) if subtree else state
    while wrapper := _wrapper(tree):
        _refuse_weights_beside(tree, wrapper, source)
        tree = _below(tree, wrapper)
    trees = _trees_in(tree)
    if trees and "" not in trees:
        separator = "/" if subtree else ":"
        weights = [f"{source}{separator}{x}" for x in trees if not OPTIMIZERS & set(x.split("/"))]
        if not weights:
            raise ValueError(
                f"{source}: holds an optimizer's state ({', '.join(trees)}) and no weights; allowed are weights, bare "
                f"or under {', '.join(WRAPPERS)}"
            )
        raise ValueError(f"{source}: its weights are in subtrees; name one: {', '.join(weights)}")
    return tree


def _wrapper(tree: Mapping[str, Any]) -> str | None:
    return next((w for w in WRAPPERS if any(name.startswith(f"{w}/") for name in tree)), None)


def _below(tree: Mapping[str, Any], path: str) -> dict[str, Any]:
    prefix = f"{path}/"
    return {name.removeprefix(prefix): array for name, array in tree.items() if name.startswith(prefix)}


def _trees_in(names: Iterable[str]) -> list[str]:
    """Returns the paths at which a model's own names begin: `img` and `txt` of SigLIP, or the empty one."""
    return sorted({name[: match.start()] for name in names if (match := BEGINNING.search(name))})


def _named_subtree(state: Mapping[str, Any], subtree: str, source: str) -> Mapping[str, Any]:
    """Finds the subtree where big_vision looks for it, inside the wrappers, or by its whole path."""
    prefixes, tree = [""], state
    while wrapper := _wrapper(tree):
        tree = _below(tree, wrapper)
        prefixes.append(f"{prefixes[-1]}{wrapper}/")
    places = [f"{prefix}{subtree}" for prefix in prefixes if _below(state, f"{prefix}{subtree}")]
    if len(places) == 1:
        return _below(state, places[0])
    if places:
        raise ValueError(f"{source}: several subtrees go by that name; write one of {', '.join(places)}")
    is_array = any(f"{prefix}{subtree}" in state for prefix in prefixes)
    nodes = {name.split("/")[0] for name in tree if "/" in name}
    there = sorted(set(_trees_in(tree)) - {""} | nodes) or ["none"]
    what = "is an array, not a subtree" if is_array else f"is not there{did_you_mean(subtree, there)}"
    raise ValueError(f"{source}: {subtree!r} {what}; subtrees in the file: {', '.join(there[:20])}")


def _refuse_weights_beside(tree: Mapping[str, Any], wrapper: str, source: str) -> None:
    beside = [
        name
        for name in tree
        if not name.startswith(f"{wrapper}/") and name.split("/")[0] not in TRAINING_STATE and WEIGHTS.search(name)
    ]
    if beside:
        shown = ", ".join(beside[:3] + ["..."] * (len(beside) > 3))
        raise ValueError(
            f"{source}: has weights under {wrapper}/ and others beside it ({shown}); name the one that is "
            f"meant, as in FILE:{wrapper}"
        )
