"""The table of TRL's releases: of those that are listed, and every difference has a name."""

import re
from pathlib import Path

from suites.test_training import CONTRACT
from tools.releases import DIFFERENCES, releases, row

TABLE = (Path(__file__).parents[1] / "RELEASES.md").read_text(encoding="utf-8")
CHECKS = [
    f"{invariant}-{names.replace(' ', '-')}"
    for invariant, runs in CONTRACT.items()
    for names in runs
]


def test_the_table_has_the_listed_releases_and_leaves_nothing_unexplained():
    rows = re.findall(r"^\| (\d[\d.]*) \| (\d+) of (\d+) \| (.*) \|$", TABLE, re.MULTILINE)
    assert [release for release, *_ in rows] == releases()
    assert {int(asked) for _, _, asked, _ in rows} == {len(CHECKS)}
    assert all("not explained" not in text for *_, text in rows)
    assert rows[-1][3] == "none"


def test_a_failure_without_a_name_is_told():
    told = {"loss_equals_the_oracles-halves": "broken", "weights_move-plain": "broken", "x": ""}
    line, unnamed = row("9.9", told)
    assert line.startswith("| 9.9 | 1 of 3 | with a generation batch of two steps")
    assert line.endswith("; not explained |")
    assert unnamed == ["weights_move-plain: broken"]
    assert row("9.9", {"x": ""}) == ("| 9.9 | 1 of 1 | none |", [])


def test_every_difference_is_of_some_checks_and_not_of_all():
    for difference in DIFFERENCES:
        shown = sum(map(difference.explains, CHECKS))
        assert 0 < shown < len(CHECKS) / 2
