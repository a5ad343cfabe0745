"""A page as one file that loads nothing: its template, its style, its script, what it may do.

Whatever a template shows is escaped, once: by Jinja, or by `hostile.harmless`. The page's
Content-Security-Policy allows its own style and script alone, by their digests.
"""

import base64
import hashlib
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from grpo_harness.report.hostile import harmless, line

_SHORTENED = 200
"""Characters of a text in a table."""

_FILES = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """Return a page made by ``<template>.html.jinja``, with its ``css``, ``js`` and ``policy``."""
    css, js = ((_FILES / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(css)}'; script-src '{_digest(js)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    own = {"css": Markup(css), "js": Markup(js), "policy": policy}  # noqa: S704 - our own files
    made: str = _environment().get_template(f"{template}.html.jinja").render(**own, **values)
    return made


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FILES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["harmless"] = harmless
    environment.filters["line"] = line
    environment.filters["value"] = _value
    environment.filters["shortened"] = partial(harmless, longest=_SHORTENED)
    return environment


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
