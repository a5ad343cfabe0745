"""A report as a comment: all that matters is in it, it fits, and nothing in it is interpreted."""

import html
import json
import re
from html.parser import HTMLParser

import pytest

from grpo_harness.cli import main
from grpo_harness.report.comment import LONGEST, MARKER, comment
from grpo_harness.report.files import ReportError, read, write
from grpo_harness.report.report import Report
from tests.test_report import HOSTILE, RUN, evidence, rows


def report(*verdicts, changed=(), failed=(), status="finished"):
    found = Report(RUN, status=status, failed=dict(failed))
    for number, verdict in enumerate(verdicts):
        for row in rows(task=f"task{number}", verdict=verdict, reason=f"reason {number}"):
            found.add(row | {"changed": list(changed)} if row["kind"] == "check" else row)
    return found


@pytest.mark.parametrize(
    ("verdicts", "head"),
    [
        (["PASS", "PASS"], "## ✅ grpo-harness: 2 PASS"),
        (["PASS", "UNPROVEN"], "## ❓ grpo-harness: 1 UNPROVEN, 1 PASS"),
        (["PASS", "FAIL", "UNPROVEN"], "## ❌ grpo-harness: 1 FAIL, 1 UNPROVEN, 1 PASS"),
        (["FAIL", "ERROR"], "## 🛑 grpo-harness: 1 ERROR, 1 FAIL"),
    ],
)
def test_the_verdict_comes_first(verdicts, head):
    lines = comment(report(*verdicts)).splitlines()
    assert lines[:2] == [MARKER, head]
    listed = [line for line in lines if line.startswith("- ")]
    assert len(listed) == sum(verdict != "PASS" for verdict in verdicts)


def test_a_test_that_failed_and_a_run_that_was_cut_are_no_pass():
    head = comment(report("PASS", failed=[("test_x", "it broke")], status="interrupted"))
    assert "## ❌ grpo-harness: 1 PASS; 1 test failed (the run is interrupted)" in head
    assert "it broke" in head


def test_what_has_no_room_is_left_out_whole():
    long = report(*["FAIL"] * 40, changed=["x" * 1900] * 3)
    text = comment(long)
    assert LONGEST - 10_000 < len(text) <= LONGEST
    assert text.rstrip().endswith("see the report.")
    assert text.count("<details>") == text.count("</details>")
    assert all(f"reason {number}" in text for number in range(40)), "the verdicts come first"
    assert MARKER in comment(long, 400)


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = set()

    def handle_starttag(self, tag, attrs):
        self.found.add((tag, *attrs))


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_in_it_is_interpreted(text):
    found = Report({**RUN, "base": text, "trained": [text]}, failed={text: text})
    for row in rows(policy=text, verdict="FAIL", reason=text):
        found.add(row | {"changed": [text]} if row["kind"] == "check" else row)
    said = comment(found)
    elements = Elements()
    elements.feed(said)
    assert elements.found == {("details",), ("summary",)}
    assert not re.search(r"\]\(|!\[|\x1b|\u202e|^::|##\[", said, re.MULTILINE)


def test_it_is_written_of_the_file_as_of_the_run(tmp_path, capsys):
    found = report("PASS", "FAIL")
    check = {"rule": "length", "unit": "tokens", "evidence": evidence(upper=float("inf"))}
    found.add(rows(verdict="FAIL")[1] | check)
    write(found, tmp_path)
    assert main(["comment", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.replace("+nan", "+inf") == comment(found)
    assert said == comment(read(tmp_path / "report.json"))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"schema": 1}', '{"schema": 99, "evaluations": []}', "[" * 100_000, "\x00"],
)
def test_what_is_no_report_is_one_line(tmp_path, content, capsys):
    (tmp_path / "report.json").write_text(content)
    assert main(["comment", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is no report of this version" in line


@pytest.mark.parametrize("p", [None, -1, 7, 1e308])
def test_a_file_with_an_impossible_p_is_shown_without_its_adjustment(tmp_path, p):
    write(report("PASS", "FAIL"), tmp_path)
    path = tmp_path / "report.json"
    content = json.loads(path.read_text())
    content["checks"][0]["evidence"]["p"] = p
    path.write_text(json.dumps(content))
    rows = read(path).details().rows
    assert [row["p (Holm)"] for row in rows] == ["", "0.2"]
    assert "Every check" in comment(read(path))


@pytest.mark.parametrize("part", ["checks", "evaluations", "tests", "notices", "status"])
def test_a_report_that_lacks_a_part_is_none(tmp_path, part):
    write(report("PASS"), tmp_path)
    path = tmp_path / "report.json"
    content = json.loads(path.read_text())
    del content[part]
    path.write_text(json.dumps(content))
    with pytest.raises(ReportError, match="is no report of this version"):
        read(path)
    with pytest.raises(ReportError, match="cannot be read"):
        read(tmp_path / "nowhere.json")


def test_as_much_is_shown_as_has_room():
    found = report("FAIL", "PASS", changed=["gcd-1"], failed=[("test_x", "it broke")])
    whole = comment(found)
    said = {limit: comment(found, limit) for limit in range(400, len(whole) + 100)}
    note = "\n\nThe rest has no room here: see the report.\n"
    bodies = {text.removesuffix(note) for text in said.values()}
    assert len(bodies) > 4
    for limit, text in said.items():
        body = text.removesuffix(note)
        assert whole.startswith(body)
        assert len(body) == max(len(of) for of in bodies if len(of) + len(note) <= limit)
    assert LONGEST <= 65_536, "GitHub takes no more"


def test_all_of_a_report_is_in_it_the_most_important_first():
    found = report("PASS", "FAIL", changed=["one <i>", "two"], failed=[("test_x", "it\n  broke")])
    found.run = {**RUN, "seed": 4711}
    found.notices = ["read me"]
    found.add(rows()[1] | {"rule": "no_loss", "title": "not worse", "against": "base"})
    said = comment(found)
    assert "p against b and the baselines, seed 4711" in said.splitlines()
    heads = re.findall("(?:### |<summary>)(.*?)(?:</summary>)?$", said, re.MULTILINE)
    assert [html.unescape(head) for head in heads] == [
        "Policies against their baselines",
        "Trained against base",
        "Problems that changed most: accuracy of p on task1",
        "Problems that changed most: accuracy of p on task0",
        "Tests that failed or could not be run",
        "To know",
        "Every check",
    ]
    listed = re.findall("^- (.*)$", said, re.MULTILINE)
    assert [html.unescape(line) for line in listed[1:]] == [
        *["one <i>", "two"] * 2, "test_x: it broke", "read me",
    ]  # fmt: skip
