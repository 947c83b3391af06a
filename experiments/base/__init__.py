# SPDX-License-Identifier: Apache-2.0
"""What every study shares.

``study``: what a study is; ``scheduler``: how its units are run; ``archive``: where its results go; ``cli``: how it is
commanded; ``rows``, ``scaling``, ``settings``: how rows are read; ``survival``: what a control must show; ``paper``:
published numbers; the other files belong to single studies, after which they are named.
"""

from experiments.base import paper
from experiments.base.rows import difference, finals, groups
from experiments.base.study import Law, StudyModule, Tools, UsageError

__all__ = ["Law", "StudyModule", "Tools", "UsageError", "difference", "finals", "groups", "paper"]
