"""Checks and times build/rotated/_rotated.so (rotated.mk) on a GPU machine.

    python3 benchmarks/ladder/cuda/rotated.py check|tiny|golden|many|... [--out DIR]

``check`` compares every operator with float64 on the same inputs; ``tune`` tries launch shapes
through the overrides of the ladder build; ``bench`` writes the published rows. Needs only torch and
the package's Python files.
"""

import argparse
import os
import sys
import time
from functools import partial

import rotated_checks as checks
import rotated_times as times

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="+")
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--commit", default="worktree")
    args = parser.parse_args()
    actions = {
        "check": checks.check,
        "tiny": partial(checks.check, True),
        "golden": checks.golden,
        "many": checks.many_tokens,
        "halves": checks.halves,
        "tune": times.tune,
        "hadamards": times.hadamards,
        "profile": times.profile,
        "bench": partial(times.bench, args.out, args.commit),
    }
    for what in args.what:
        if what not in actions:
            sys.exit(f"unknown {what}")
        start = time.time()
        actions[what]()
        print(f"-- {what}: {time.time() - start:.0f} s", flush=True)
