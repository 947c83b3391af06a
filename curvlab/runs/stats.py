# SPDX-License-Identifier: Apache-2.0
"""All statistics of the studies in one list; each name's file holds its formula and its source.

Which one: one number a seed → ``mean_interval`` (t; ``bca_bootstrap`` where n ≥ 8). Two arms → ``paired`` on common
seeds, with ``welch`` beside it; several at once → ``holm``. "No loss" → ``non_inferiority`` or ``equivalence`` with a
stated margin. A trend → ``page_trend`` (common seeds) or ``jonckheere``. Ratios → ``log_ratio_interval``, with
``pooled_log_sd`` where a group has one seed. Power laws → ``loglog_slope``. Accuracies of seeds on one test set →
``hierarchical_bootstrap``.
"""

from curvlab.runs.bootstrap import bca_bootstrap, hierarchical_bootstrap
from curvlab.runs.comparisons import (
    Comparison,
    equivalence,
    holm,
    jonckheere,
    non_inferiority,
    page_trend,
    paired,
    welch,
)
from curvlab.runs.estimates import (
    Estimate,
    PooledSD,
    geometric_mean_interval,
    log_ratio_interval,
    mean_interval,
    pooled_log_sd,
    pooled_sd,
    ratio_of_means,
)
from curvlab.runs.slopes import LogLogFit, loglog_fit, loglog_slope
from curvlab.runs.verdicts import Survives, ToleranceJudgement, Verdict, judge, judge_tolerance

__all__ = [
    "Comparison",
    "Estimate",
    "LogLogFit",
    "PooledSD",
    "Survives",
    "ToleranceJudgement",
    "Verdict",
    "bca_bootstrap",
    "equivalence",
    "geometric_mean_interval",
    "hierarchical_bootstrap",
    "holm",
    "jonckheere",
    "judge",
    "judge_tolerance",
    "log_ratio_interval",
    "loglog_fit",
    "loglog_slope",
    "mean_interval",
    "non_inferiority",
    "page_trend",
    "paired",
    "pooled_log_sd",
    "pooled_sd",
    "ratio_of_means",
    "welch",
]
