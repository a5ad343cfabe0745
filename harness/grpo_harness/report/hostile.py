"""Untrusted text in HTML: shown as it is, escaped once, invisible characters made visible."""

import re

from markupsafe import Markup, escape

from grpo_harness.text import visible

_UNSEEN = re.compile(r"[^\x20-\x7e\n]")
"""What may be invisible: all but printable ASCII and line breaks, which need no look."""


def harmless(text: str, longest: int | None = None) -> Markup:
    r"""Return a text as HTML; an invisible character becomes a marked ``\uXXXX``.

    Line breaks stay. Beyond ``longest`` characters, the middle is left out, with a note.
    """
    if longest is not None and len(text) > longest:
        half = longest // 2
        note = Markup("<i> … %d characters left out … </i>") % (len(text) - 2 * half)
        return harmless(text[:half]) + note + harmless(text[-half:])
    shown = _UNSEEN.sub(_shown, str(escape(text)))
    # What CI systems read as a command, should someone print the page there.
    shown = shown.replace("##", "#&#35;").replace("::", ":&#58;")
    return Markup(shown)  # noqa: S704 - escaped above


def line(text: str) -> Markup:
    """Return a text for an attribute or a picture, where nothing can be marked, on one line."""
    return escape("".join(c if c == "\\" else visible(c) for c in text))


def _shown(match: re.Match[str]) -> str:
    character = match.group()
    seen = visible(character)
    return character if seen == character else f"<b>{seen}</b>"
