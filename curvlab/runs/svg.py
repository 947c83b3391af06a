# SPDX-License-Identifier: Apache-2.0
"""Make matplotlib's SVG a good citizen of a page: one neutral ink that follows the page, unique ids, scoped style."""

from __future__ import annotations

import html
import re

# The one neutral color of figures; lighter neutrals are this one with opacity, so that a single replacement by
# `currentColor` turns a whole figure light or dark (also in viewers that know no CSS variables).
INK = "#1f2937"
DARK_INK = "#e5e7eb"

_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def themed_svg(raw: str, name: str, *, title: str, description: str) -> str:
    """An inline ``<svg>`` from matplotlib's output.

    Ink becomes ``currentColor``, every id gets ``name`` in front (several figures stand on one page), the style element
    is scoped to this figure, size gives way to the view box, and title and description are there for screen readers.
    """
    body = raw[raw.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(re.escape(INK), "currentColor", body, flags=re.IGNORECASE)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"<style([^>]*)>\*\{", rf"<style\1>#{name} *{{", body)
    body = body.replace("'DejaVu Sans'", _FONTS)
    head, rest = body.split(">", 1)
    view_box = re.search(r'viewBox="[^"]+"', head)
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" id="{name}" '
        f'{view_box.group(0) if view_box else ""} role="img" aria-labelledby="{name}-title {name}-desc">'
    )
    words = (
        f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-desc">{html.escape(description)}</desc>'
    )
    return opening + words + rest.strip()


def standalone_svg(svg: str) -> str:
    """A file of its own from :func:`themed_svg`: ink by the viewer's preference for light or dark."""
    style = f"<style>:root{{color:{INK}}}@media (prefers-color-scheme: dark){{:root{{color:{DARK_INK}}}}}</style>"
    head, rest = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>{style}{rest}\n'
