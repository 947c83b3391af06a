# SPDX-License-Identifier: Apache-2.0
"""The studies: one question per file, and the commands that run them (``python -m experiments``)."""
