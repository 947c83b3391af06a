# SPDX-License-Identifier: Apache-2.0
"""From named runs on disk to a page with verdicts; knows no networks and never imports torch.

``config`` names a run, ``store`` keeps its rows, ``stats`` and ``verdicts`` judge them, ``tables``, ``figures`` and
``report`` show them. Import the module that you need: ``from curvlab.runs.store import RunStore``.
"""
