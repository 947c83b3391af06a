# SPDX-License-Identifier: Apache-2.0
"""Comparisons with peers, and the tables they make.

``python -m benchmarks NAME [--threads 1] [--quick] [--json FILE]``. A benchmark is a file ``bench_<name>.py`` with
``TITLE`` and ``cases(quick)``. The same cases run under pytest-benchmark: ``pytest benchmarks --benchmark-only``.
"""
