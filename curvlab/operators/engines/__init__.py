# SPDX-License-Identifier: Apache-2.0
"""Ways to multiply by a curvature matrix, behind one protocol (``protocol.py``) and one choice (``select.py``)."""
