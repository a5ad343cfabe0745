"""Untrusted text: parse it, display it safely. Standard library only.

A completion is untrusted input, and so is every name from outside: of a policy, a task type, a
file. Functions that read a completion are linear in its length and never raise. Untrusted text is
displayed through :func:`escape` (a terminal, a log) or :func:`markdown`.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence

_FENCE = "```"
_INTEGER = re.compile(r"-?\d+")

# CPython's default limit for int(str). Pinned here so that an interpreter without the limit
# gives the same scores, and so that the quadratic int() stays bounded.
_MOST_DIGITS = 4300

# Letters, marks and symbols by their Unicode category, but invisible: the grapheme
# joiner, Hangul fillers, Khmer and Mongolian marks, the blank Braille pattern, variation selectors.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)

# Characters that Markdown may interpret inside a line. An underscore within a word is not one;
# the dot after www makes a link of what follows.
_MARK = re.compile(r"[!\"#$&*:<>@\[\\\]^`{|}~]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.", re.IGNORECASE)

# CI systems read as a command: two colons that begin a line, and two hashes anywhere.
_COMMAND = re.compile(r"^\s*::|##(?=\[|vso)", re.MULTILINE)


def first_line(completion: str) -> str:
    """Return the first line of the text, or of its closed code fence if it starts with one.

    White space is trimmed. Inside a fence, a first line of letters only is a language tag and is
    skipped if another line follows it. Returns the empty string when nothing is left.
    """
    text = completion.strip()
    if text.startswith(_FENCE):
        end = text.find(_FENCE, len(_FENCE))
        if end >= 0:
            lines = text[len(_FENCE) : end].splitlines()
            if len(lines) >= 2 and lines[0].isalpha():
                del lines[0]
            text = lines[0].strip() if lines else ""
    lines = text.splitlines()
    return lines[0].strip() if lines else ""


def integers(text: str) -> Iterator[int | None]:
    """Yield every integer written in ``text``, in order; ``None`` for one too long to convert.

    Digits are all Unicode decimal digits, as for Python's ``int``.
    """
    for match in _INTEGER.finditer(text):
        digits = match.group()
        yield int(digits) if len(digits.lstrip("-")) <= _MOST_DIGITS else None


def unquoted(text: str) -> str:
    """Drop one pair of equal surrounding quotes, if there is one."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def escape(text: str, limit: int = 200) -> str:
    r"""Make a completion safe and readable on one line of a terminal, log or report.

    Control characters, line breaks, bidirectional marks and all other invisible characters except
    the space become ``\n``-style or ``\uXXXX`` escapes; a backslash is doubled, so that the escaped
    text is unambiguous. The markers that CI systems read as commands (``::``, ``##[``, ``##vso``)
    are broken up. Longer texts are cut to ``limit`` characters with a note of how many were left
    out.
    """
    left_out = len(text) - limit
    if left_out > 0:
        text = text[:limit]
    shown = "".join(map(visible, text))
    shown = shown.replace("::", ":\\u003a").replace("##", "#\\u0023")
    return shown if left_out <= 0 else f"{shown}… ({left_out} more characters)"


def together(texts: Sequence[str]) -> str:
    """Join names as a sentence does: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(part for part in (", ".join(texts[:-1]), *texts[-1:]) if part)


def plain(text: str) -> str:
    r"""Escape every invisible character in a message of the harness.

    For text whose untrusted parts should be escaped already, but which may still hold a path or a
    name that is not. Unlike in :func:`escape`, backslashes and line breaks stay and nothing is cut.
    """
    shown = "".join(
        character if character == "\n" or character == "\\" else visible(character)
        for character in text
    )
    return _COMMAND.sub(lambda mark: mark.group()[:-1] + f"\\u{ord(mark.group()[-1]):04x}", shown)


def markdown(text: str, limit: int = 1000) -> str:
    """Make untrusted text safe in Markdown: escaped as by :func:`escape`, and shown literally.

    Every character that Markdown, HTML or GitHub's own links could interpret becomes a numeric
    character reference, so that no part of it is a link, an image, a tag or a table.
    """
    return _MARK.sub(lambda mark: f"&#{ord(mark.group())};", escape(text, limit))


def one_line(error: BaseException) -> str:
    """Return an error of other code on one line, escaped, for the end of a message."""
    text = " ".join(shown(error, str).split())
    return f"{type(error).__name__}: {escape(text, 300)}" if text else type(error).__name__


def shown(value: object, how: Callable[[object], str] = repr) -> str:
    """Return the repr of a foreign object, or its type's name if that raises."""
    try:
        return how(value)
    except Exception:
        return f"<{type(value).__name__}>"


def digest(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal; half of a surrogate pair is allowed."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def visible(character: str) -> str:
    """Return a character as an escape, if it is invisible or a backslash."""
    if character == "\\":
        return "\\\\"
    if character.isprintable() and not _INVISIBLE.match(character):
        return character
    return ascii(character)[1:-1]  # \n, \t, \xXX, \uXXXX or \UXXXXXXXX
