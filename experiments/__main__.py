# SPDX-License-Identifier: Apache-2.0
"""``python -m experiments list | run | estimate | report | verify``."""

import signal
import sys

try:
    import curvlab  # noqa: F401 (an unbuilt tree says in one line what to type)
except ImportError as error:
    sys.exit(str(error))

from experiments.base.cli import main

if __name__ == "__main__":
    status = main()
    if status == 130:
        # All is said and on disk: a second Ctrl-C while the interpreter shuts down would only turn the status into -2.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)
