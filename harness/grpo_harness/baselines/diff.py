"""What changed between two recordings of a task, in a sentence.

The header of a recording has that of the recording before it, and ``grpo-harness diff`` shows it of
any two files or folders.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from grpo_harness.baselines.file import (
    Baseline,
    BaselineError,
    Header,
    Record,
    changed,
    flat,
    load,
    means,
    short,
)
from grpo_harness.gate import verdicts as gate
from grpo_harness.gate.bounds import ALPHA, MINIMUM_PROBLEMS
from grpo_harness.policy.checkpoint import NO_POLICY
from grpo_harness.text import escape, plain


def sentence(
    header: Header,
    records: Mapping[str, Record],
    before: Header,
    records_before: Mapping[str, Record],
) -> str:
    """Say how a recording differs from the one ``before`` it, or that it does not."""
    said = []
    if header.fingerprint != before.fingerprint:
        named = [f"{escape(of.policy, 60)} ({of.fingerprint})" for of in (before, header)]
        said.append(f"the policy was {named[0]} and is {named[1]}")
    said += changed(before.conditions, header.conditions)
    said += changed(flat(before.gate), flat(header.gate))
    gone, new = records_before.keys() - records.keys(), records.keys() - records_before.keys()
    said += [f"{len(new)} problems are new"] * bool(new)
    said += [f"{len(gone)} are gone"] * bool(gone)
    shared = sorted(records.keys() & records_before.keys())
    other = [name for name in shared if not _same(records[name], records_before[name])]
    if not other:
        return "; ".join(said) or "nothing"
    said.append(f"{len(other)} of {len(shared)} problems have other counts")
    now, then = ([of[name] for name in shared] for of in (records, records_before))
    if len(shared) >= MINIMUM_PROBLEMS:
        found = gate.judge(
            [r.correct for r in now], [r.k for r in now],
            [r.correct for r in then], [r.k for r in then],
            same_policy=header.fingerprint == before.fingerprint, alpha=ALPHA,
        )  # fmt: skip
        said.append(
            f"accuracy {found.then:.1%} -> {found.now:.1%}, {100 * found.delta:+.1f} points "
            f"({100 * found.lower:+.1f} to {100 * found.upper:+.1f})"
        )
    one, two = (means({name: of[name] for name in shared}) for of in (records_before, records))
    said.append(f"mean reward {one['mean_reward']:+.3f} -> {two['mean_reward']:+.3f}")
    said.append(f"length {one['mean_length']:.1f} -> {two['mean_length']:.1f} tokens")
    return "; ".join(said)


def summary(stored: Baseline) -> str:
    """Say what a recording holds, in a few lines of which each has one figure."""
    header, k = stored.header, sorted({record.k for record in stored.records.values()})
    drawn = f"{k[0]}" if len(k) == 1 else f"{k[0]} to {k[-1]}"
    lines = [
        f"{header.task_type} of {escape(header.policy, 200)}, fingerprint {header.fingerprint}",
        f"{len(stored.records)} problems × {drawn} completions",
        f"accuracy {header.accuracy:.2%}",
        f"mean reward {header.mean_reward:+.4f}",
        f"length {header.mean_length:.2f} tokens",
        f"anchor: accuracy {header.anchor.accuracy:.2%}, fingerprint {header.anchor.fingerprint}",
        *(f"{escape(name)} = {short(of)}" for name, of in sorted(header.conditions.items())),
    ]
    return "\n".join(lines)


def differences(old: Path, new: Path) -> Iterator[str]:
    """Yield a sentence for each task of two baselines, or of two folders with some.

    Raises ``BaselineError``.
    """
    pairs = _pairs(old, new)
    if not pairs:
        raise BaselineError(f"there is no baseline in {old} and none in {new}")
    for before, after in pairs:
        one, two = (load(path) if path else None for path in (before, after))
        stored = two or one
        assert stored is not None
        title = f"{escape(stored.header.policy, 200)} on {stored.header.task_type}"
        if one is None or two is None:
            yield f"{title}: {'new' if one is None else 'gone'}"
        else:
            said = sentence(two.header, two.records, one.header, one.records)
            yield plain(f"{title}: {said}")


def _pairs(old: Path, new: Path) -> list[tuple[Path | None, Path | None]]:
    for path in (old, new):
        if not path.exists():
            raise BaselineError(f"there is no file or folder {path}")
    if old.is_file() and new.is_file():
        return [(old, new)]
    if old.is_file() or new.is_file():
        raise BaselineError(f"{old} and {new}: name two files or two folders")
    files = [{p.relative_to(of): p for p in _baselines(of)} for of in (old, new)]
    names = sorted({*files[0], *files[1]})
    return [(files[0].get(name), files[1].get(name)) for name in names]


def _baselines(folder: Path) -> Iterator[Path]:
    """Yield the baselines of a folder, which may be that of one policy or of all."""
    for path in sorted(folder.rglob("*.json")):
        if not NO_POLICY & {*path.relative_to(folder).parts[:-1]}:
            yield path


def _same(one: Record, other: Record) -> bool:
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("k", "correct", "truncated", "unparsable", "length", "log_length", "reward")
    )
