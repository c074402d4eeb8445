"""Which versions of transformers were found to work.

The tests of loading pass with 5.4.0, 5.8.0, 5.17.0 and 5.23.0. 5.0.0 leaves Mixtral's experts
random, 5.2.0 reads transposed codes of square layers wrongly, 5.3.0 fails on state dicts in memory.
Those of generation pass with 5.17.0 and 5.23.0; up to 5.12.0 the static cache lacks what a step
needs (5.13 to 5.16 were not tried).
"""

from __future__ import annotations

import transformers
from packaging.version import Version

LOADS, GENERATES = Version("5.4"), Version("5.17")


def too_old(least: Version) -> str | None:
    """Why the transformers that is installed will not do, or None."""
    found = transformers.__version__
    return f"needs transformers>={least}, found {found}" if Version(found) < least else None
