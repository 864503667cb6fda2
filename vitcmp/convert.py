"""Converts a checkpoint between canonical, timm's and big_vision's names and layouts.

  python -m vitcmp.convert siglip.npz:img siglip.safetensors --to timm
  python -m vitcmp.convert timm_vit.pth vit.npz --to big_vision --scan
  python -m vitcmp.convert timm:vit_base_patch16_224 vit.npz      to canonical names

SRC is a .safetensors, .npz, .pth, .pt or .bin file, FILE:SUBTREE, timm:NAME or timm:NAME:FILE. DST is a .npz or
.safetensors file; an older one is replaced in one step, and SRC is never written to. float64 stays float64, 16-bit
arrays become float32. Exit codes: 0 written, 2 nothing was written.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from absl import flags

from vitcmp.backend import require_choice
from vitcmp.checkpoints import Layout, layout_of, read_state, save_weights, to_big_vision, to_timm, weights_of
from vitcmp.infer import infer_spec, name_of
from vitcmp.params import Weights, count_params
from vitcmp.specs import NAME_PATTERNS, Spec, get_spec
from vitcmp.timm_hub import is_timm, split_timm
from vitcmp.usage import start
from vitcmp.weight_files import check_target, split_subtree

LAYOUTS = get_args(Layout)

flags.DEFINE_string("model", None, f"The spec of SRC, where its arrays do not tell it: {NAME_PATTERNS}.")
flags.DEFINE_string("to", "canonical", f"Names and layouts of DST: {', '.join(LAYOUTS)}.")
flags.DEFINE_boolean("scan", False, "Of big_vision: the blocks stacked along a first axis.")
FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> int:
    source, target = check_arguments(argv)
    print(convert(source, target, model=FLAGS.model, to=FLAGS.to, scan=FLAGS.scan))
    return 0


def convert(source: str, target: str, *, model: str | None = None, to: str = "canonical", scan: bool = False) -> str:
    """Converts the file and returns a line that says what was read and what was written; errors as `load_weights`."""
    state = read_state(source)
    layout = layout_of(state, source)
    spec = get_spec(model) if model else infer_spec(state, source=source)
    if to == "timm" and not model and getattr(spec, "pos_embed", None) == "sincos2d":
        raise ValueError(
            f"{source}: timm has a sincos2d embedding written out, at an image_size that these arrays do not tell; "
            f"give it as --model={name_of(spec)},image_size=HEIGHTxWIDTH"
        )
    weights = weights_of(state, spec, source=source)
    written = _renamed(weights, spec, to=to, scan=scan)
    save_weights(target, written)
    dtypes = "+".join(sorted({str(array.dtype) for array in written.values()}))
    return (
        f"{source}: {layout}, {len(state)} arrays of {name_of(spec)} -> {target}: {to}{' (scan)' if scan else ''}, "
        f"{len(written)} arrays, {count_params(spec):,} parameters, {dtypes}"
    )


def check_arguments(argv: Sequence[str]) -> tuple[str, str]:
    """Returns SRC and DST; raises one ValueError with everything that is wrong with the command line."""
    faults = []
    if len(argv) != 3:
        faults.append(f"expected SRC and DST, got {len(argv) - 1} arguments: {' '.join(argv[1:]) or 'none'}")
    if FLAGS.scan and FLAGS.to != "big_vision":
        faults.append(f"--scan is of --to=big_vision, not of --to={FLAGS.to}")
    checks: list[tuple[Any, ...]] = [(require_choice, "--to", FLAGS.to, LAYOUTS), (get_spec, FLAGS.model or "vit_b16")]
    if len(argv) == 3:
        checks += [(check_target, argv[2]), (_refuse_the_same, argv[1], argv[2])]
    for function, *arguments in checks:
        try:
            function(*arguments)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return argv[1], argv[2]


def _refuse_the_same(source: str, target: str) -> None:
    path = split_timm(source)[1] if is_timm(source) else split_subtree(source)[0]
    source_path, target_path = (Path(os.path.expanduser(name)) for name in (path, target))
    if path and source_path.exists() and target_path.exists() and source_path.samefile(target_path):
        raise ValueError(f"{target}: is SRC itself, which is never overwritten; write to another path")


def _renamed(weights: Weights, spec: Spec, *, to: str, scan: bool) -> Weights:
    if to == "timm":
        return to_timm(weights, spec)
    return to_big_vision(weights, spec, scan=scan) if to == "big_vision" else weights


if __name__ == "__main__":
    start(main, takes_words=True)
