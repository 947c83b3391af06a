# SPDX-License-Identifier: Apache-2.0
"""One self-contained page: claim → paper → measured [interval], n → verdict → survives control? → cost → command."""

from curvlab.runs.report.page import Claim, Study, write_report

__all__ = ["Claim", "Study", "write_report"]
