"""The page shows what the report holds, and whatever is in it stays text."""

import base64
import hashlib
import html
import itertools
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_harness.gate.verdicts import NOT_THE_POLICY
from grpo_harness.report import schema
from grpo_harness.report.figures import lines
from grpo_harness.report.files import read, write
from grpo_harness.report.flips import flip, pair, worst_first
from grpo_harness.report.hostile import harmless
from grpo_harness.report.names import short_names, shortened
from grpo_harness.report.page import page
from grpo_harness.report.passes import majority, pass_at, passes
from grpo_harness.report.report import Report
from grpo_harness.report.schema import Completion, Kept, Problem, Recorded, Side
from grpo_harness.report.sections import commonest
from grpo_harness.report.then import differences
from grpo_harness.rules import RULES
from tests.projects import run
from tests.test_report import HOSTILE, RUN, evidence, rows

VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """What a page holds: its elements with their attributes, and its text by element."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag, **wanted):
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]

    @property
    def said(self):
        return "".join(text for tag, text in self.texts if tag not in ("style", "script"))


def side(correct=4, k=4, **changes):
    numbers = {"truncated": 0, "unparsable": 0, "tokens": 5.0, "reward": 1.0, **changes}
    return Side(k=k, correct=correct, **numbers)


def completion(text="1", outcome="correct", **changes):
    numbers = {"tokens": 5, "strict": True, "reward": 1.0, **changes}
    return Completion(text=text, outcome=outcome, **numbers)


def problem(name="gcd-1", then=4, right=4, k=4, texts=("7", "8"), kept=True, prompt="gcd?"):
    """A problem with ``right`` completions that are correct now, of ``k``, and ``then`` before."""
    outcomes = ["correct"] * right + ["wrong"] * (k - right)
    return Problem(
        id=name,
        prompt=prompt,
        wanted=texts[0],
        then=None if then is None else side(then, 4),
        now=side(right, k),
        kept=[Kept(text=texts[0], outcome="correct"), Kept(text=texts[1], outcome="wrong")] * kept,
        completions=[completion(texts[o != "correct"], o) for o in outcomes],
    )


def report(problems=(), policy="p", task="gcd", verdict="PASS", **changes):
    found = Report({**RUN, **changes}, [task], [policy], "finished")
    for row in rows(policy, task, verdict, reason="why"):
        found.add(row)
    found.problems[policy, task] = list(problems)
    return found


def test_the_title_names_the_verdict_and_the_policies():
    found = report([problem()], verdict="FAIL", trained=["p", "<b>"])
    assert "<title>FAIL: p, &lt;b&gt; - grpo-harness</title>" in page(found)


def test_the_first_screen_says_the_verdict_and_what_broke():
    found = report([problem()], verdict="FAIL")
    said = Page(page(found)).said
    head = " ".join(said[: said.index("Policies against")].split())
    assert "FAIL 1 FAIL" in head
    assert "accuracy: 1 of 1 row" in head
    assert "p on gcd: 71.0% → 70.0% (-1.0 points)" in head
    assert "Nothing: every check is a PASS" in Page(page(report([problem()]))).said


def said_first(found):
    """What the first screen says, each of its list items and paragraphs by itself."""
    text = page(found)
    look = text[text.index('id="look"') : text.index('id="table"')]
    parts = re.findall(r"<(?:h3|li|p)>(.*?)</(?:h3|li|p)>", look, re.DOTALL)
    return [html.unescape(re.sub("<.*?>", "", part)) for part in parts]


def checked(*numbers, rule="accuracy", title="accuracy", unit="%", verdict="FAIL"):
    """A report with a check of one rule on each task, by its evidence, or its reason alone."""
    found = Report(RUN, [f"t{i}" for i in range(len(numbers))], ["p"], "finished")
    for i, of in enumerate(numbers):
        for row in rows("p", f"t{i}", verdict, reason=of if isinstance(of, str) else f"why {i}"):
            about = {"rule": rule, "title": title, "unit": unit}
            e = None if isinstance(of, str) else evidence(verdict=verdict, **of)
            found.add(row | about | {"evidence": e} if row["kind"] == "check" else row)
    return found


def test_the_first_screen_names_the_largest_changes_first_and_how_many_there_are():
    found = checked(*({"delta": d, "margin": 0.05} for d in (-0.1, 0.3, -0.2, -0.4, -0.05, 0.25)))
    found.add(rows("p", "t9", "PASS")[1])
    head, *lines, reason = said_first(found)
    assert head == "FAIL accuracy: 6 of 7 rows"
    assert [line.split(":")[0] for line in lines] == [
        *(f"p on t{i}" for i in (3, 1, 5, 2)), "and 2 more, see Intervals",
    ]  # fmt: skip
    assert lines[0] == "p on t3: 71.0% → 70.0% (-40.0 points)"
    assert reason == "The first: why 3"


def test_changes_are_ordered_by_their_margins():
    found = checked({"delta": -0.1, "margin": 0.2}, {"delta": -0.06, "margin": 0.05})
    assert [line.split(":")[0] for line in said_first(found)[1:3]] == ["p on t1", "p on t0"]


@pytest.mark.parametrize(
    ("unit", "line"),
    [
        ("%", "p on t0: 71.0% → 70.0% (-1.0 points)"),
        ("tokens", "p on t0: 0.7 tokens → 0.7 tokens (-1.0 %)"),
        ("reward", "p on t0: +0.71 → +0.7 (-0.01)"),
    ],
)
def test_a_change_has_its_unit(unit, line):
    assert said_first(checked({}, unit=unit))[1] == line


def test_the_worst_verdict_comes_first():
    found = checked({}, verdict="UNPROVEN")
    for verdict, title in (("FAIL", "length"), ("ERROR", "reward"), ("PASS", "truncation")):
        found.add(rows("p", "t0", verdict)[1] | {"rule": title, "title": title})
    heads = [line.split()[0] for line in said_first(found) if " of " in line]
    assert heads == ["ERROR", "FAIL", "UNPROVEN"]


def test_each_row_that_could_not_be_judged_says_why():
    lines = said_first(checked("no baseline", "other sampling", verdict="ERROR"))
    assert lines[1:] == ["p on t0: no baseline", "p on t1: other sampling"]
    lines = said_first(checked(*["no baseline"] * 6, verdict="ERROR"))
    assert lines[1:] == [*(f"p on t{i}" for i in range(4)), "and 2 more, see Table", "no baseline"]


class Drawn:
    """The places in a picture of an interval, as changes."""

    def __init__(self, found, reach):
        self.svg = re.search('<svg class="interval".*?</svg>', page(found))[0]
        self.reach = reach

    def at(self, mark):
        number = r"[\d.]+"
        found = re.findall(mark.replace("X", f"({number})").replace("_", number), self.svg)
        return [round((float(x) - 150) / 146 * self.reach, 3) for x in found]


@pytest.mark.parametrize(
    ("rule", "unit", "margins", "ignored"),
    [
        ("accuracy", "%", [-0.25], [-0.05, 0.05]),
        ("slices.lang=de", "%", [-0.25], [-0.05, 0.05]),
        ("no_loss", "%", [-0.25], [-0.05, 0.05]),
        ("hacking", "%", [-0.25], [-0.05, 0.05]),
        ("truncation", "%", [0.25], [-0.05, 0.05]),
        ("unparsable", "%", [0.25], [-0.05, 0.05]),
        ("lenient", "%", [0.25], [-0.05, 0.05]),
        ("improvement", "%", [0.25], [-0.05, 0.05]),
        ("reward", "reward", [-0.25], [-0.05, 0.05]),
        ("rewards.length_penalty", "reward", [-0.25], [-0.05, 0.05]),
        ("length", "tokens", [-0.2, 0.25], [-0.048, 0.05]),
    ],
)
def test_an_interval_is_drawn_where_it_is(rule, unit, margins, ignored):
    numbers = {"lower": -0.4, "delta": -0.3, "upper": 0.1, "margin": 0.25, "minimum": 0.05}
    found = checked(numbers, rule=rule, title=rule, unit=unit)
    drawn = Drawn(found, 1.08 * 0.4)
    assert drawn.at('class="margin" d="MX 0V20"') == pytest.approx(margins, abs=2e-3)
    assert drawn.at('class="minimum" d="MX 5V15"') == pytest.approx(ignored, abs=2e-3)
    assert drawn.at('class="zero" d="MX 0V20"') == [0.0]
    assert drawn.at('class="whisker fail" d="MX 10H_"') == pytest.approx([-0.4], abs=2e-3)
    assert drawn.at('class="whisker fail" d="M_ 10HX"') == pytest.approx([0.1], abs=2e-3)
    assert drawn.at('class="point fail" cx="X" cy="10"') == pytest.approx([-0.3], abs=2e-3)
    asks = RULES[rule.partition(".")[0]].asks
    assert asks in Page(page(found)).said


def test_what_has_no_end_reaches_the_end_of_its_side():
    numbers = {"lower": float("-inf"), "delta": 0.1, "upper": float("inf"), "margin": 0.25}
    drawn = Drawn(checked(numbers), 1.08 * 0.25)
    assert drawn.at('class="whisker fail" d="MX 10H_"') == [-0.27]
    assert drawn.at('class="whisker fail" d="M_ 10HX"') == [0.27]


def picture_of(found, name):
    """The only picture that has a name."""
    (picture,) = re.findall(rf'<svg viewBox[^>]* aria-label="{name}">.*?</svg>', page(found))
    return picture


def table_of(found):
    """The rates and rewards of the only evaluation: by name, then and now."""
    body = page(found).split('aria-label="Rates and rewards"')[1].split("</table>")[0]
    return {
        name: (then, now)
        for name, then, now in re.findall(
            r'<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>', body
        )
    }


def test_rates_of_both_sides_end_at_the_completions_of_each():
    one = msgspec.structs.replace(problem(right=2), then=side(1, 2))
    found = table_of(report([one] * 8))
    assert [*found] == ["pass@1", "pass@2", "pass@4", "majority@4", "reward total"]
    cells = zip(*found.values(), strict=True)
    before, after = ([cell.split(" (")[0] for cell in column] for column in cells)
    assert before == ["50.0%", "100.0%", "", "not kept", "+1.000"]
    assert after == ["50.0%", "83.3%", "100.0%", "50.0%", "+1.000"]
    picture = picture_of(report([one] * 8), "pass@j of p on gcd")
    assert picture.count('class="point then"') == 2
    assert picture.count('class="point now"') == 4


def test_rewards_are_means_of_the_problems_that_have_some():
    def of(then, now):
        def sides(values):
            return side(reward=values[0], rewards={"a": values[1], "b": values[2]})

        return msgspec.structs.replace(problem(), then=sides(then), now=sides(now))

    problems = [of((1.0, 0.5, None), (0.0, 0.25, None)), of((2.0, None, None), (0.5, 0.5, None))]
    found = {name: of for name, of in table_of(report(problems)).items() if "reward" in name}
    assert found == {
        "reward total": ("+1.500", "+0.250"),
        "reward a": ("+0.500", "+0.375"),
        "reward b": ("", ""),
    }


def test_each_problem_is_drawn_at_its_shares():
    problems = [problem("kept", then=3, right=2), problem("lost", then=4, right=0),
                problem("back", then=0, right=3)]  # fmt: skip
    (picture,) = re.findall(
        r'<svg viewBox[^>]*"correct then and now.*?</svg>', page(report(problems))
    )
    (dot,) = re.findall(r'"dot" cx="(.*?)" cy="(.*?)" r="2.6"><title>(.*?)<', picture)
    flips = dict(re.findall(r'class="(lost|gained)" d="M(.*?)h8', picture))
    assert dot[2] == "kept: 3/4 then, 2/4 now"

    def shares(x, y):
        return (float(x) - 40) / 232, (186 - float(y)) / 176

    near = 5 / 176
    assert shares(*dot[:2]) == pytest.approx((0.75, 0.5), abs=near)
    assert shares(*(flips["lost"].split())) == pytest.approx((1.0, 0.0), abs=2 * near)
    assert shares(*(flips["gained"].split())) == pytest.approx((0.0, 0.75), abs=2 * near)


def test_lengths_are_drawn_as_shares_of_the_problems():
    now, then = [10.0, 10.0, 10.0, 26.0], [10.0, 26.0, 26.0, 26.0]
    problems = [
        msgspec.structs.replace(problem(), now=side(tokens=a), then=side(tokens=b))
        for a, b in zip(now, then, strict=True)
    ]
    picture = picture_of(report(problems), "lengths of p on gcd")
    bars = re.findall(
        r'"bar" x="(.*?)" y="(.*?)" width=".*?" height="(.*?)"><title>(.*?)<', picture
    )
    assert [(float(x), float(h)) for x, _, h, _ in bars] == [
        (40.5, 176.0), (258.0, pytest.approx(176 / 3, abs=0.1)),
    ]  # fmt: skip
    assert [said for *_, said in bars] == [
        "75% of the problems now", "25% of the problems now",
    ]  # fmt: skip
    (steps,) = re.findall(r'class="then" d="M40.0 186.0(.*?)"', picture)
    heights = [float(y) for y in re.findall(r"V([\d.]+)H", steps)]
    assert heights[0] == pytest.approx(186 - 176 / 3, abs=0.1)
    assert heights[-1] == pytest.approx(10.0)
    assert set(heights[1:-1]) == {186.0}


def test_an_axis_says_how_far_it_reaches():
    found = page(checked({"lower": -0.4, "delta": -0.3, "upper": 0.1, "margin": 0.25}))
    (ends,) = re.findall(r'<span class="ends">(.*?)</span></th>', found)
    assert re.findall(r"<span>(.*?)</span>", f"{ends}</span>") == ["-43.2", "0", "+43.2"]


def test_no_change_of_a_rate_is_beyond_what_can_be():
    numbers = {"lower": -1.04, "delta": -0.97, "upper": -0.9, "p": 0.0}
    found = checked(numbers)
    assert "-97.0 (-100.0 to -90.0)" in Page(page(found)).said
    assert found.details().rows[0]["lower"] == "-100.0"
    assert found.details().rows[0]["p"] == "< 1e-300"
    assert "-104" not in page(found)
    longer = checked({"lower": -1.04, "delta": 1.3, "upper": 1.4}, unit="tokens")
    assert "+130.0 (-104.0 to +140.0)" in Page(page(longer)).said


def test_the_commonest_texts_of_an_evaluation_are_counted():
    problems = [problem(f"gcd-{i}", right=1, texts=(str(i), "")) for i in range(3)]
    spaced = msgspec.structs.replace(problem("gcd-3", right=0), completions=[completion(" \n ")])
    found = commonest([*problems, spaced])
    assert [(of.text, of.times, of.problems, of.correct) for of in found] == [
        ("", 10, 4, 1), ("0", 1, 1, 1), ("1", 1, 1, 1), ("2", 1, 1, 1),
    ]  # fmt: skip
    assert sum(of.share for of in found) == pytest.approx(1)
    said = " ".join(Page(page(report(problems))).said.split())
    assert "textdrawnproblemscorrect an empty text9 (75.0 %)3001 (8.3 %)1111 (8.3 %)11" in said
    assert commonest([problem()]) == [], "a text of one problem alone says nothing of the policy"


def test_long_paths_are_shortened_as_far_as_they_stay_different():
    one, two = (f"/data/runs/{run}/checkpoint-100/of-a-long-experiment" for run in "ab")
    assert short_names([one, "nano-base"]) == {
        one: "…/of-a-long-experiment", "nano-base": "nano-base",
    }  # fmt: skip
    assert short_names([one, two]) == {
        one: "…/a/checkpoint-100/of-a-long-experiment",
        two: "…/b/checkpoint-100/of-a-long-experiment",
    }
    inner = one.removeprefix("/data/")
    assert short_names([one, inner]) == {one: one, inner: inner}
    found = report([problem()], policy=one, base=two, trained=[one])
    made = page(found)
    look = made[made.index('id="look"') : made.index('id="run"')]
    assert one not in look
    assert "…/a/checkpoint-100/of-a-long-experiment" in look
    assert one in made[made.index('id="run"') :]
    assert {tag["title"] for tag in Page(made).all("b") if "title" in tag} == {one, two}


def test_a_name_is_shortened_only_if_it_is_long_and_only_as_far_as_it_is_told_apart():
    fits, long = f"runs/{'a' * 27}", f"runs/{'a' * 28}"
    assert (len(fits), len(long)) == (32, 33)
    assert short_names([fits, long]) == {fits: fits, long: f"…/{'a' * 28}"}
    slash, inner = f"/data/of-an-experiment/{'a' * 20}/", f"/other-data/{'a' * 20}"
    assert short_names([slash, inner])[slash] == f"…/of-an-experiment/{'a' * 20}"
    other = f"/data/of-an-experiment/a{'a' * 20}"
    assert short_names([slash, other])[slash] == f"…/{'a' * 20}", "it is not the whole last part"


def test_short_names_are_those_of_all_that_is_known_of_a_policy():
    one, two = (f"/data/runs/of-a-long-experiment/{run}" for run in "zy")
    found = report([problem()], policy=one, base=two, trained=[one])
    found.add(rows(two)[0])
    found.policies = [two, one]
    against = {"rule": "no_loss", "title": "no loss", "against": "base", "reference": two}
    found.add(rows(one)[1] | against)
    found.recorded[one, "gcd"] = Recorded(commit=None, recorded="", environment={}, sampling={})
    short = shortened(found, {one: "Z", two: "Y"})
    assert short.keys() == [("Y", "gcd"), ("Z", "gcd")], "in the order of the policies"
    assert [row["policy"] for row in short.evaluations.values()] == ["Z", "Y"]
    assert [(*key, row["policy"], row["reference"]) for key, row in short.checks.items()] == [
        ("accuracy", "Z", "gcd", "Z", "baseline of Z"), ("no_loss", "Z", "gcd", "Z", "Y"),
    ]  # fmt: skip
    assert [*short.problems] == [*short.recorded] == [("Z", "gcd")]
    assert short.run == found.run


@given(st.lists(st.text("ab/", min_size=1, max_size=60), max_size=6))
def test_short_names_are_as_different_as_the_names(names):
    found = short_names(names)
    assert found.keys() == set(names)
    assert len(set(found.values())) == len(found)


def test_what_is_other_than_in_the_recording_is_said():
    versions = {"torch": "2.12", "python": "3.11"}
    then = Recorded(
        commit="c" * 40, recorded="2026-01-01", environment={**versions, "machine": "x"},
        sampling={"temperature": 1.2, "top_p": 0.9},
    )  # fmt: skip
    found = report([problem()], commit="c" * 40)
    assert 'id="then"' not in page(found)
    ((key, row),) = found.evaluations.items()
    found.evaluations[key] = {**row, "engine": {}, "sampling": {"temperature": 0.8, "top_p": 0.9}}
    found.environment = {"torch": "2.13", "python": "3.11"}
    found.recorded[key] = then
    assert differences(found) == [
        ("torch", "2.12", "2.13", "all"), ("temperature", "1.2", "0.8", "all"),
    ]  # fmt: skip
    found.run = {**found.run, "commit": "d" * 40 + "-dirty"}
    assert differences(found)[0] == ("commit", "c" * 12, "d" * 12 + "-dirty", "all")
    assert "when the baseline was recorded" in page(found)
    found.run = {**found.run, "commit": "c" * 40}
    found.recorded[key] = msgspec.structs.replace(then, environment={}, sampling={})
    assert differences(found) == []
    assert "sampling are those of the recordings" in " ".join(Page(page(found)).said.split())


def test_what_is_other_is_said_with_the_evaluations_that_it_is_of():
    found = report(commit=None)
    for row in rows("q", "gcd"):
        found.add(row)
    engines = {"p": {"engine": "served", "dtype": None}, "q": {"engine": "served", "dtype": "f4"}}
    then = Recorded(
        commit="c" * 40, recorded="2026-01-01", sampling={},
        environment={"engine": "own", "dtype": "f2", "torch": "2", "gone": 1},
    )  # fmt: skip
    found.environment = {"torch": "3", "new": 1}
    for key, row in found.evaluations.items():
        found.evaluations[key] = {**row, "engine": engines[key[0]]}
        found.recorded[key] = then
    assert differences(found) == [
        ("commit", "c" * 12, "unknown", "all"),
        ("dtype", "f2", "none", "p on gcd"),
        ("engine", "own", "served", "all"),
        ("torch", "2", "3", "all"),
        ("dtype", "f2", "f4", "q on gcd"),
    ]


def test_a_training_is_drawn_over_the_recorded_ones():
    found = report()
    curve = {"steps": [1.0, 2.0], "now": [0.1, float("nan")], "then_steps": [1.0, 2.0]}
    band = {"then": [[0.2, 0.3]], "mean": [0.2, 0.3], "lower": [0.1, 0.2], "upper": [0.3, 0.4]}
    found.add({"kind": "curve", "training": "learn", "name": "entropy", **curve, **band})
    made = Page(page(found))
    assert len(made.all("svg", **{"aria-label": "entropy along the training learn"})) == 1
    titles = [text for tag, text in made.texts if tag == "title"]
    assert "now, 1: 0.1 (0.1 to 0.1)" in titles
    assert "then, 2: 0.3 (0.2 to 0.4)" in titles
    assert not any("now, 2" in text for text in titles), "what is no number is not drawn"


def test_it_says_if_the_weights_are_the_recorded_ones_and_by_whose_baselines_they_are_judged():
    found = report([problem()], verdict="FAIL")
    assert "although the weights are the recorded ones" not in Page(page(found)).said
    (key,) = found.checks
    found.checks[key] = {**found.checks[key], "reason": f"proven; {NOT_THE_POLICY}"}
    said = " ".join(Page(page(found)).said.split())
    assert "1 check of p is a FAIL although the weights are the recorded ones" in said
    assert "p is judged by the baseline of p." in said
    heads = [text for tag, text in Page(page(found)).texts if tag == "th"]
    assert heads[:4] == ["task type", "policy", "verdict", "n × k"]


def test_a_run_that_judged_nothing_is_no_pass():
    said = Page(page(Report(RUN))).said
    assert "UNPROVEN" in said
    assert "nothing was judged" in said
    assert "PASS" not in said
    assert "Nothing was judged." in said


def test_every_completion_is_on_the_page_and_how_often():
    problems = [problem(f"gcd-{i}", right=i % 5, texts=(f"r{i}", f"w{i}")) for i in range(30)]
    found = Page(page(report(problems)))
    listed = "".join(t for tag, t in found.texts if tag in ("pre", "i", "li"))
    for i in range(30):
        right = i % 5
        for text, times in ((f"r{i}", right), (f"w{i}", 4 - right)):
            shown = re.findall(rf"(?:correct|wrong)(?: × (\d))?, 5 tokens, \+1{text}(?!\d)", listed)
            assert (int(shown[0] or 1) if shown else 0) == times


def test_flips_are_both_texts_with_their_differences_the_largest_drop_first():
    problems = [
        problem("even", then=4, right=4),
        problem("half", then=4, right=2),
        problem("lost", then=3, right=1, texts=("the answer is 7", "the answer was 8")),
        problem("more", then=4, right=0),
        problem("back", then=0, right=3),
        problem("new", then=None, right=0),
    ]
    assert [flip(p) for p in problems] == [None, None, "lost", "lost", "gained", None]
    assert [p.id for p in worst_first(problems)] == ["more", "lost", "back"]
    found = pair(problems[2])
    assert found.then == "the answer <del>is</del> <del>7</del>"
    assert found.now == "the answer <ins>was</ins> <ins>8</ins>"
    assert found.times == 3
    nothing = pair(problem("lost", right=1, kept=False))
    assert nothing.then is None
    empty = Page(page(report([problem(then=0, right=4, texts=("7", ""))]))).said
    assert "an empty text" in empty
    assert "no such completion" not in empty
    assert "no such completion of this problem was kept" in page(
        report([problem(right=0, kept=False)])
    )


def test_a_gained_problem_shows_the_wrong_text_then_and_the_right_one_now():
    found = pair(problem(then=0, right=3))
    assert (found.then, found.now) == ("<del>8</del>", "<ins>7</ins>")


@given(st.integers(1, 8).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, k))))
def test_pass_at_j_is_the_share_of_subsets_with_a_correct_one(sizes):
    k, correct = sizes
    drawn = [True] * correct + [False] * (k - correct)
    for j in range(1, k + 1):
        subsets = list(itertools.combinations(drawn, j))
        assert pass_at(j, k, correct) == pytest.approx(fmean(map(any, subsets)))


def test_rates_have_an_interval_that_shrinks_with_problems_and_is_never_nothing():
    few, many = (passes([side(4)] * n, 4) for n in (10, 1000))
    assert few[0].value == many[0].value == 1.0
    assert few[0].lower < many[0].lower < 1.0
    (half,) = passes([side(2)] * 200, 1)
    assert half.value == 0.5
    assert half.lower < 0.5 < half.upper


@given(
    st.lists(
        st.tuples(st.sampled_from("ab "), st.sampled_from(["correct", "wrong", "truncated"])),
        min_size=1,
        max_size=6,
    )
)
def test_the_majority_is_the_commonest_text(drawn):
    completions = [completion(text, outcome) for text, outcome in drawn]
    one = msgspec.structs.replace(problem(), completions=completions)
    votes = [(t.strip(), o == "correct") for t, o in drawn if o != "truncated"]
    texts = {text for text, _ in votes}
    counted = {text: [right for t, right in votes if t == text] for text in texts}
    most = max(map(len, counted.values()), default=0)
    best = [fmean(rights) for rights in counted.values() if len(rights) == most]
    assert majority([one]).value == pytest.approx(fmean(best) if best else 0.0)


def test_every_task_and_policy_can_be_chosen():
    found = report([problem()], policy="m")
    for row in rows("M", "gcd"):
        found.add(row)
    choices = page(found).split('id="f-policy"')[1].split("</select>")[0]
    assert re.findall("<option>(.*?)</option>", choices) == ["m", "M"]


def test_a_run_that_stopped_early_says_of_how_many():
    found = report([problem()])
    found.add({**rows()[0], "n": 128})
    assert "128 of 256 problems × 4 completions" in page(found)
    assert " 256 problems × 4 completions" in " ".join(Page(page(report())).said.split())


def test_a_half_is_no_majority():
    sides = {
        (4, 2): None,
        (2, 0): None,
        (0, 2): None,
        (2, 4): None,
        (3, 1): "lost",
        (1, 3): "gained",
    }
    assert {of: flip(problem(then=of[0], right=of[1])) for of in sides} == sides


def test_the_page_shows_the_largest_drops_first():
    problems = [problem("back", then=0, right=4), problem("less", then=3, right=1),
                problem("most", then=4, right=0)]  # fmt: skip
    heads = re.findall("<h4>(.*?)</h4>", page(report(problems)))
    assert heads == [
        "most: 4/4 then, 0/4 now",
        "less: 3/4 then, 1/4 now",
        "back: 0/4 then, 4/4 now",
    ]
    assert "2 problems went from mostly right to mostly wrong, 1 back." in page(report(problems))
    many = [problem(f"p{i}", then=4, right=i % 2) for i in range(20)]
    found = page(report(many))
    assert "Flips, the largest drop first: 12 of 20" in found
    assert re.findall("<h4>(.*?): ", found)[:10] == [f"p{i}" for i in range(0, 20, 2)]


def test_a_flip_shows_the_commonest_text_and_the_ends_of_long_ones():
    one = problem(right=1, prompt="a" * 100 + "b" * 400)
    for completion_, text in zip(one.completions, "7xyy", strict=True):
        completion_.text = text
    found = pair(one)
    assert (found.now, found.times) == ("<ins>y</ins>", 2)
    assert found.question == "… " + "b" * 400
    assert pair(problem(right=1, prompt="b" * 400)).question == "b" * 400
    long = pair(problem(right=0, texts=("a" * 1_600, "a" * 1_500)))
    assert long.then.endswith("<i>… 100 more characters</i>")
    assert "more characters" not in long.now


def test_the_majority_reads_texts_as_they_are_but_for_white_space():
    def of(*drawn):
        one = msgspec.structs.replace(problem(), completions=[completion(*d) for d in drawn])
        return majority([one]).value

    right, wrong = ("7", "correct"), ("8", "wrong")
    assert of(("7 ", "correct"), right, wrong) == 1.0
    assert of((" 7", "correct"), wrong, wrong) == 0.0
    assert of(right, wrong) == 0.5
    for outcome in ("unparsable", "truncated", "error"):
        assert of(right, ("", outcome), ("", outcome)) == 1.0


def test_rates_stay_within_their_range():
    for rate in (*passes([side(4)] * 3, 4), *passes([side(0)] * 3, 4)):
        assert 0.0 <= rate.lower <= rate.value <= rate.upper <= 1.0


def test_a_page_that_is_printed_in_a_log_commands_nothing():
    for text in ("::error::x", "##[error]x", "##vso[x]"):
        shown = harmless(text)
        assert "::" not in shown
        assert "##" not in shown
        assert html.unescape(shown) == text


def test_flips_point_up_or_down():
    picture = picture_of(
        report([problem(then=4, right=0), problem("b", then=0, right=4)]),
        "correct then and now, of each problem of p on gcd",
    )
    found = dict(re.findall(r'class="(lost|gained)" d="M\S+ \S+h8l-4 (-?\d)z"', picture))
    assert found == {"lost": "7", "gained": "-7"}
    names = re.findall('<text class="name" [^>]*>(.*?)<', picture)
    assert names == ["correct then", "now"]


def test_a_band_lies_between_its_bounds():
    curve = [(1.0, 0.0, 0.25, 0.5), (2.0, 0.25, 0.5, 1.0)]
    drawn = lines([("now", curve)], "t", "j", "y", low=0.0, high=1.0)
    (points,) = re.findall('<polygon class="band now" points="(.*?)"', drawn)
    places = [tuple(map(float, of.split(","))) for of in points.split()]
    assert places == [(40.0, 98.0), (272.0, 10.0), (272.0, 142.0), (40.0, 186.0)]
    (way,) = re.findall('<polyline class="line now" points="(.*?)"', drawn)
    assert way == "40.0,142.0 272.0,98.0"


def test_each_problem_is_listed_with_its_counts_outcomes_and_rewards():
    one = problem("one", then=3, right=1)
    one.completions[1].rewards = {"a": 0.5, "b": None}
    found = page(report([msgspec.structs.replace(one, now=side(1, tokens=7.25))], verdict="FAIL"))
    (listed,) = re.findall('<details class="p lost".*?</details>', found, re.DOTALL)
    assert 'data-d="-0.500" data-n="0.250" data-t="7.2"' in listed
    assert "<span>1/4, then 3/4</span>" in listed
    assert re.findall('<li class="(.*?)"><i>(.*?)</i>', listed) == [
        ("correct", "correct, 5 tokens, +1"),
        ("wrong", "wrong, 5 tokens, +1, a +0.5, b none"),
        ("wrong", "wrong × 2, 5 tokens, +1"),
    ]
    assert '<option value="lost">now mostly wrong</option>' in found
    assert "256 problems × 4 completions, 70.0 % correct now, 12.3 tokens on average" in found
    assert 'id="e0-c"' in found


def test_a_row_of_intervals_has_its_numbers():
    found = page(checked({"then": 0.9, "now": 0.8, "delta": -0.1, "mde90": 0.07}, {}))
    row = re.findall('<tr><th scope="row"><a href="(#e.)">t.</a></th>(.*?)</tr>', found)
    assert [anchor for anchor, _ in row] == ["#e0", "#e1"]
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall("<td>(.*?)</td>", row[0][1])]
    assert cells == ["p", "90.0%", "80.0%", "-10.0 (-3.0 to +1.0)", "7.0", "FAIL"]


def test_what_is_to_be_looked_at_is_open():
    def opened(rule, verdict):
        part = page(checked({}, rule=rule, title=rule, verdict=verdict)).split('id="intervals"')[1]
        return "<details open>" in part.split("</section>")[0]

    assert opened("accuracy", "PASS")
    assert opened("no_loss", "PASS")
    assert opened("length", "FAIL")
    assert not opened("length", "PASS")


def test_failed_tests_and_those_that_were_not_run_are_counted():
    found = report([problem()])
    found.failed, found.not_run = {"test_a": "<b>it broke</b>"}, ["b", "c"]
    text = page(found)
    said = " ".join(Page(text).said.split())
    assert "FAIL 1 PASS; 1 test failed" in said
    assert "2 tests were not run." in said
    assert "&lt;b&gt;it broke&lt;/b&gt;" in text


@given(st.text(st.characters(), max_size=60))
def test_a_text_is_shown_as_it_is_and_escaped_once(text):
    shown = harmless(text)
    found = Page(f"<p>{shown}</p>")
    assert [tag for tag, _ in found.elements].count("p") == 1
    assert {tag for tag, _ in found.elements} <= {"p", "b"}
    assert all(c.isprintable() or c == "\n" for c in found.said)
    again = "".join(
        t.encode().decode("unicode_escape") if tag == "b" else t for tag, t in found.texts
    )
    assert again.encode("utf-16", "surrogatepass") == text.encode("utf-16", "surrogatepass")
    str(shown).encode()


def test_a_long_text_is_cut_in_the_middle_with_a_note():
    shown = harmless("a" * 500 + "b" * 500, 100)
    assert shown == "a" * 50 + "<i> … 900 characters left out … </i>" + "b" * 50


@pytest.mark.parametrize("text", HOSTILE)
def test_what_comes_from_outside_is_text_in_every_place(text):
    own = problem(text, right=1, texts=(text, text + "x"), prompt=text)
    own.completions[0].rewards[text] = None
    found = report([own], text, text, "FAIL", base=text, trained=[text], baselines=text)
    found.failed[text], found.notices[:] = text, [text]
    found.settings, found.environment = {text: {text: text}}, {"python": text}
    made = Page(page(found))
    clean = Page(page(report([problem(right=1)], "p", "gcd", "FAIL")))
    allowed = {tag for tag, _ in clean.elements} | {"b", "i", "pre", "p", "h3", "div", "details"}
    assert {tag for tag, _ in made.elements} <= allowed
    assert "\x1b" not in made.said
    assert "\u202e" not in made.said


def test_it_loads_nothing_and_allows_only_its_own_script_and_style():
    text = page(report([problem(right=0)] * 3, verdict="FAIL"))
    found = Page(text)
    (policy,) = [a["content"] for a in found.all("meta") if "http-equiv" in a]
    for tag in ("style", "script"):
        (inside,) = [data for of, data in found.texts if of == tag]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for own in ("default-src", "base-uri", "form-action"):
        assert f"{own} 'none'" in policy
    for _, attributes in found.elements:
        assert not {"src", "style", "srcset", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#")
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for _, a in found.elements if "href" in a} <= set(ids)


def test_it_can_be_read_by_a_screen_reader():
    found = Page(page(report([problem(right=0)] * 3, verdict="FAIL")))
    assert all(a.get("role") == "img" and a.get("aria-label") for a in found.all("svg"))
    assert all(a.get("scope") for a in found.all("th"))
    assert found.all("html", lang="en")
    headings = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))


def test_a_large_run_is_one_small_file_in_little_time(tmp_path):
    found = Report(RUN, [f"task{i}" for i in range(12)], ["p"], "finished")
    for i in range(12):
        for row in rows("p", f"task{i}"):
            found.add(row)
        found.problems["p", f"task{i}"] = [
            msgspec.structs.replace(
                problem(f"task{i}-{j:08x}", prompt="a question of some length " * 8),
                completions=[
                    completion(f"{j} {c} " + "x" * 900, "wrong", tokens=c) for c in range(8)
                ],
            )
            for j in range(256)
        ]
    began = time.process_time()
    write(found, tmp_path)
    seconds = time.process_time() - began
    size = (tmp_path / "report.html").stat().st_size
    assert size < 15_000_000
    assert seconds < 30, "far from the limit, which a benchmark measures"
    assert "characters left out" in (tmp_path / "report.html").read_text()


def test_long_questions_are_cut_as_completions_are():
    problems = [problem(f"p{i}", prompt="q" * 100_000) for i in range(100)]
    text = page(report(problems))
    assert len(text) < 9_500_000
    assert "characters left out" in text


def test_the_schema_on_disk_is_that_of_the_code_and_reports_meet_it(tmp_path):
    stored = json.loads((Path(schema.__file__).parent / "report.schema.json").read_text())
    assert stored == msgspec.json.schema(schema.Content), "write it: make schema"
    write(report([problem(right=1)], verdict="FAIL"), tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    jsonschema.validate(content, stored)
    assert read(tmp_path).content() == report([problem(right=1)], verdict="FAIL").content()


def test_a_run_writes_every_problem_with_both_sides(project):
    run(project, "--grpo-record")
    run(project, "--grpo-report=out", passed=2)
    content = json.loads((project.path / "out" / "report.json").read_text())
    jsonschema.validate(content, msgspec.json.schema(schema.Content))
    (evaluation,) = [e for e in content["evaluations"] if e["policy"] == content["run"]["base"]]
    stored = json.loads(next(project.path.glob("baselines/*/palindrome.json")).read_text())
    samples = [
        json.loads(line)
        for line in (project.path / f"out/samples/{evaluation['slug']}--palindrome.jsonl")
        .read_text()
        .splitlines()
    ]
    assert len(evaluation["problems"]) == evaluation["n"]
    for one in evaluation["problems"]:
        own = [row for row in samples if row["problem"] == one["id"]]
        assert [c["text"] for c in one["completions"]] == [row["completion"] for row in own]
        assert one["prompt"] == own[0]["prompt"]
        assert one["now"]["correct"] == sum(row["outcome"] == "correct" for row in own)
        record = stored["problems"][one["id"]]
        assert (one["then"]["correct"], one["then"]["k"]) == (record["correct"], record["k"])
        assert one["then"]["tokens"] == pytest.approx(record["length"] / record["k"])
    assert "Task by task" in (project.path / "out" / "report.html").read_text()


def test_samples_of_another_run_in_the_same_folder_are_not_taken_for_ours(project):
    run(project, "--grpo-record")
    project.makeconftest(
        """
        import json
        from pathlib import Path

        def pytest_runtest_teardown(item):
            for path in Path("out/samples").glob("*.jsonl"):
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                for row in rows:
                    row["tokens"] += 1
                path.write_text("".join(json.dumps(row) + "\\n" for row in rows))
        """
    )
    result = run(project, "--grpo-report=out", passed=2)
    result.stdout.fnmatch_lines(["the samples *palindrome.jsonl are of another run: *"])
    content = json.loads((project.path / "out" / "report.json").read_text())
    assert [of["problems"] for of in content["evaluations"]] == [[], []]


def test_samples_that_cannot_be_read_cost_no_more_than_the_problems(project):
    run(project, "--grpo-record")
    project.makeconftest(
        """
        from pathlib import Path

        def pytest_runtest_teardown(item):
            for path in Path("out/samples").glob("*.jsonl"):
                path.write_text('{"problem": "half')
        """
    )
    result = run(project, "--grpo-report=out", passed=2)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["the samples *palindrome.jsonl cannot be read (*"])
    content = json.loads((project.path / "out" / "report.json").read_text())
    assert content["status"] == "finished"
    assert [of["problems"] for of in content["evaluations"]] == [[], []]
    assert len([said for said in content["notices"] if "cannot be read" in said]) == 2
    assert "Its samples were not kept." in (project.path / "out" / "report.html").read_text()


def test_the_history_is_on_the_page_and_in_the_report(project):
    run(project, "--grpo-record")
    for seed in (1, 2):
        run(project, "--grpo-report=out", "--grpo-history=kept", f"--grpo-seed={seed}", passed=2)
    found = read(project.path / "out")
    assert {one.seed for one in found.history.runs} == {1, 2}, "in any order within a second"
    made = Page((project.path / "out" / "report.html").read_text())
    assert "Each accuracy over the commits of 2 runs" in " ".join(made.said.split())
    assert "No drift is proven." in made.said
    assert page(found) == (project.path / "out" / "report.html").read_text()


def _luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart(mode):
    """WCAG 2.2, 1.4.3: text has a contrast of 4.5 to its ground at least."""
    css = (Path(schema.__file__).parent / "page.css").read_text()
    block = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[mode]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
    pairs = [
        (ink, ground)
        for ink in ("ink", "soft", "link", "pass", "fail", "unproven", "error")
        for ground in ("paper", "panel")
    ]
    pairs += [("ink", "mark")]
    pairs += [("on", name) for name in ("pass", "fail", "unproven", "error")]
    for ink, ground in pairs:
        one, two = sorted((_luminance(colours[ink]), _luminance(colours[ground])))
        assert (two + 0.05) / (one + 0.05) >= 4.5, (ink, ground)


def test_rates_are_of_all_problems_and_pictures_of_those_that_were_recorded():
    new = msgspec.structs.replace(problem("new", None, 5, 6), now=side(5, 6, tokens=99.0))
    found = report([problem("old", then=2, right=2), new])
    rates = table_of(found)
    assert [*rates] == ["pass@1", "pass@2", "pass@4", "majority@4", "reward total"]
    for name, then, now in (("pass@1", 2 / 4, (2 / 4 + 5 / 6) / 2), ("majority@4", None, 3 / 4)):
        for cell, value in zip(rates[name], (then, now), strict=True):
            if value is not None:
                shown, lower, upper = (float(of) for of in re.findall(r"[\d.]+", cell))
                assert shown == pytest.approx(100 * value, abs=0.05)
                assert 0 <= lower < shown < upper <= 100
    scatter = picture_of(found, "correct then and now, of each problem of p on gcd")
    assert "old: 2/4 then, 2/4 now" in scatter
    assert "new" not in scatter
    assert ">99<" not in picture_of(found, "lengths of p on gcd")


def test_pass_at_j_is_drawn_for_up_to_32_completions_of_a_problem():
    found = report([problem(then=None, right=20, k=40)] * 2)
    powers = [f"pass@{2**i}" for i in range(6)]
    assert [*table_of(found)] == [*powers, "majority@40", "reward total"]
    picture = picture_of(found, "pass@j of p on gcd")
    assert [*map(int, re.findall("<title>now, ([0-9]+):", picture))] == [*range(1, 33)]
    ticks = re.findall('class="tick" [^>]*>(.*?)<', picture)
    assert ticks == ["1", "32", "0", "0.5", "1"]
    assert "<figcaption>pass@j</figcaption>" in page(found)
    assert "<figcaption>pass@j, now and then</figcaption>" in page(report([problem(right=2)]))
    assert "pass@j" not in page(report([problem(right=1, k=1)]))


def test_what_is_not_scored_as_right_or_wrong_has_lengths_and_no_rates():
    found = report([problem()])
    ((key, row),) = found.evaluations.items()
    found.evaluations[key] = {**row, "accuracy": None, "strict_accuracy": None}
    assert re.findall('<svg viewBox[^>]* aria-label="(.*?)"', page(found)) == [
        "lengths of p on gcd"
    ]
    assert 'aria-label="Rates and rewards"' not in page(found)


def test_five_common_texts_are_shown_with_the_middle_of_long_ones_left_out():
    found = [problem(f"gcd-{i}", right=1, texts=(str(i), "x" * 1000)) for i in range(9)]
    assert len(commonest(found)) == 5
    (cell,) = re.findall('<td class="text" dir="auto">(x.*?)</td>', page(report(found)))
    assert cell == "x" * 100 + "<i> … 800 characters left out … </i>" + "x" * 100


@pytest.mark.parametrize(
    ("unit", "said", "lengths"), [("%", "points", 0), ("tokens", "%", 1), ("reward", "", 0)]
)
def test_intervals_say_their_unit(unit, said, lengths):
    text = page(checked({}, unit=unit))
    of = {"reward": "-0.01 (-0.03 to +0.01)"}.get(unit, f"-1.0 (-3.0 to +1.0) {said}")
    assert f'aria-label="FAIL: {of}"' in text
    assert f"In {said or 'units of the reward'}.</span></summary>" in text
    assert text.count("geometric means") == lengths


def test_an_interval_of_nothing_but_zeros_is_in_the_middle():
    zeros = dict.fromkeys(("lower", "delta", "upper", "margin", "minimum"), 0.0)
    drawn = Drawn(checked(zeros), 1.0)
    assert drawn.at('class="point fail" cx="X" cy="10"') == [0.0]


def test_a_rule_that_is_unknown_and_a_row_of_no_evaluation_are_drawn():
    """They are of a file that another version may have written."""
    numbers = {"lower": 0.0, "delta": float("inf"), "upper": float("inf"), "margin": 0.25}
    found = checked(numbers, rule="own", title="own")
    found.evaluations.clear()
    drawn = Drawn(found, 1.08 * 0.25)
    assert drawn.at('class="margin" d="MX 0V20"') == [0.25]
    assert drawn.at('class="point fail" cx="X" cy="10"') == [0.27]
    assert re.findall('<th scope="row"><a href="(.*?)">t0</a>', page(found)) == ["#intervals"]


def test_settings_are_shown_as_they_are_written():
    found = report()
    found.settings = {"name": "é & ü", "rewards": ["é", None]}
    said = re.findall("<dt>(?:name|rewards)</dt><dd>(.*?)</dd>", page(found))
    assert [html.unescape(of) for of in said] == ["é & ü", '["é", null]']
