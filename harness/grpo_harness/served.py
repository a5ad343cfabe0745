"""Which policies are served, and where: the tables below ``[tool.grpo-harness.serve]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from grpo_harness.engines.endpoint import Endpoint
from grpo_harness.tables import SettingsError, converted
from grpo_harness.text import escape

if TYPE_CHECKING:
    from grpo_harness.policy import PolicyName

Role = Literal["base", "trained"]


def served(
    table: Mapping[str, Any],
    addresses: Mapping[Role, list[str] | None],
    policies: Mapping[Role, Sequence[PolicyName]],
    configured: Set[str],
    where: str,
) -> dict[PolicyName, Endpoint]:
    """Return the endpoints of the policies that are served. Raises ``SettingsError``.

    ``table`` has a table for a role or a policy's name, and that of the name counts first.
    ``addresses`` are those of the command line, by role, and ``policies`` those of the run. The
    table may also name ``configured`` policies, in whose place the command line has others.
    """
    endpoints = {name: _endpoint(of, f"{where}.{escape(name)}] ") for name, of in table.items()}
    for role, urls in addresses.items():
        if urls:
            before = msgspec.structs.asdict(endpoints[role]) if role in endpoints else {}
            endpoints[role] = _endpoint({**before, "url": urls}, f"--grpo-serve-{role}: ")
    own = {name.text for names in policies.values() for name in names}
    known = {*policies, *configured, *own}
    for name in endpoints:
        if name not in known:
            raise SettingsError(
                f"{where}] has '{escape(name)}', which is no role and no policy of this run: it "
                f"may have {', '.join(escape(other, 60) for other in sorted(known))}"
            )
    found = {}
    for role, names in policies.items():
        by_role = [name for name in names if name.text not in endpoints]
        if role in endpoints and len(by_role) > 1:
            raise SettingsError(
                f"{where}] {role} serves one policy, and there are {len(by_role)}: give each a "
                f"table by its name, such as {where}.'{escape(by_role[0].text, 60)}']"
            )
        for policy in names:
            key = role if policy in by_role else policy.text
            if key in endpoints:
                found[policy] = endpoints[key]
    return found


def _endpoint(given: Any, where: str) -> Endpoint:
    if not isinstance(given, dict):
        raise SettingsError(f"{where}is {escape(repr(given))}: it must be a table with a url")
    return converted(given, Endpoint, lambda _: where)
