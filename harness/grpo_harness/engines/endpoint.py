"""Where a policy is served: the table ``[tool.grpo-harness.serve.NAME]``."""

import os
from typing import Annotated

import msgspec
from msgspec import Meta

from grpo_harness.engines.engine import EngineError

KEY = "GRPO_HARNESS_API_KEY"
"""The environment variable that holds the key, unless the table names another."""

_Url = Annotated[str, Meta(pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$")]
_MUST_BE = "http://HOST:PORT/v1, or a list of such addresses that serve the same; no key in it"


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model at one or more addresses of an OpenAI-compatible server."""

    url: Annotated[_Url | Annotated[list[_Url], Meta(min_length=1)], Meta(description=_MUST_BE)]
    model: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(description="the model's name there; the only one that it lists if left out"),
    ] = None
    key: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z_]\w*$",
            description="the name of the environment variable that holds the key",
        ),
    ] = KEY
    seconds: Annotated[
        float, Meta(gt=0, le=86400, description="seconds that a request may take, up to 86400")
    ] = 600.0
    seed: Annotated[bool, Meta(description="whether requests have a seed")] = True

    @property
    def urls(self) -> list[str]:
        """The addresses, each once, without a slash at the end."""
        given = [self.url] if isinstance(self.url, str) else self.url
        return list(dict.fromkeys(url.rstrip("/") for url in given))

    def secret(self) -> str:
        """Return the key, or an empty text. Raises ``EngineError``, which does not show it."""
        key = os.environ.get(self.key, "").strip()
        if not key and self.key != KEY:
            raise EngineError(
                f"the key of {self.urls[0]} is looked for in the environment variable {self.key}, "
                "which is not set: set it, or name another as key in [tool.grpo-harness.serve]"
            )
        if not (key.isascii() and key.isprintable()):
            raise EngineError(
                f"the environment variable {self.key} holds no key: it has characters that no "
                "header can have"
            )
        return key

    def censored(self, text: str) -> str:
        """Return a text of the server, or about it, with stars in place of the key."""
        key = self.secret()
        return text.replace(key, "***") if key else text
