# SPDX-License-Identifier: Apache-2.0
"""``python -m experiments list | run | estimate | report | verify``."""

import sys

try:
    import curvlab  # noqa: F401 (an unbuilt tree says in one line what to type)
except ImportError as error:
    sys.exit(str(error))

from experiments.base.cli import main

if __name__ == "__main__":
    sys.exit(main())
