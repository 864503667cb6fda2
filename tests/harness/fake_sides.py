"""The child of a pair that ends in every way a child can, as the pair's `theirs` says."""

import os
import signal
import sys
import time

import numpy as np

from experiments import pairs
from vitcmp.backend import Unsupported


def make_sides(pair):
    match pair["theirs"]:
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            print("some last words")
            sys.exit(3)
        case "hang":
            time.sleep(600)
        case "oom":
            raise MemoryError("no room for theirs")
        case "unsupported":
            raise Unsupported("theirs has no such kernel")
        case "error":
            raise KeyError("theirs")
    output = np.arange(1.0, 7.0).reshape(2, 3)
    return pairs.Sides(
        ours=lambda: time.sleep(1e-3),
        theirs=lambda: time.sleep(2e-3 if pair["theirs"] == "slow" else 1e-3),
        ours_output=output,
        theirs_output=output + (0.1 if pair["theirs"] == "differs" else 1e-7),
        bound=1e-5,
        facts={"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]},
    )


if __name__ == "__main__":
    pairs.child_main(make_sides)
