# SPDX-License-Identifier: Apache-2.0
"""The rules of PyTorch's layers; importing this package registers them."""

from curvlab.operators.engines.layer_rules import (
    activation as activation,
)
from curvlab.operators.engines.layer_rules import (
    conv as conv,
)
from curvlab.operators.engines.layer_rules import (
    embedding as embedding,
)
from curvlab.operators.engines.layer_rules import (
    linear as linear,
)
from curvlab.operators.engines.layer_rules import (
    norm as norm,
)
from curvlab.operators.engines.layer_rules import (
    pool as pool,
)
from curvlab.operators.engines.layer_rules import (
    shape as shape,
)
