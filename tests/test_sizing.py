"""How many problems a row asks: by its baseline, by a time, or as set."""

from dataclasses import replace
from pathlib import Path

import pytest

from grpo_harness.baselines import file as baselines
from grpo_harness.baselines.recording import PROBLEMS
from grpo_harness.gate.plan import Plan
from grpo_harness.rules import shares
from grpo_harness.settings import resolve
from grpo_harness.sizing import UNPLANNED, Sizing, to_record
from grpo_harness.tables import SettingsError
from grpo_harness.tasks import task_types

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def read_once():
    """Read each baseline of the embedded pair once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        read, load = {}, baselines.load

        def once(path):
            if not path.is_relative_to(ROOT):
                return load(path)
            return read[path] if path in read else read.setdefault(path, load(path))

        patch.setattr(baselines, "load", once)
        yield


def settings(**options):
    return resolve(ROOT, ROOT, options)


def rows(of):
    for role, _, name in of.policies():
        for task in of.tasks.values():
            yield role, name, task.source


def risk(of):
    """The risk of each accuracy check of all suites."""
    t = len(of.tasks)
    checks = ["accuracy", "length", "truncation", "unparsable", "reward"] * 2 * t
    checks += [*["no_loss", "lenient", "hacking"] * t, "improvement"]
    return shares(checks + ["total"] * (2 * (t > 1 and not of.sequential)))["accuracy"]


def planned(of):
    """The plan of every row of the embedded pair, by policy and task."""
    alpha, sizing = risk(of), Sizing(of)
    found = {
        (name.text, source.name): sizing.plan(role, name, source.name, alpha)
        for role, name, source in rows(of)
    }
    assert all(isinstance(plan, Plan) for plan in found.values()), found
    return found


def seconds(of, plans):
    """How long these plans take, by how fast the baselines were drawn."""
    sizing = Sizing(of)
    return sum(
        plans[name.text, source.name].n
        * plans[name.text, source.name].k
        / sizing.row(role, name, source.name).speed
        for role, name, source in rows(of)
    )


@pytest.fixture(scope="module")
def default():
    return planned(settings())


@pytest.mark.parametrize("sequential", [False, True])
def test_every_row_of_the_pair_finds_five_points_nine_times_in_ten(default, sequential):
    found = planned(settings(sequential=True)) if sequential else default
    assert len(found) == 12
    for row, plan in found.items():
        assert plan.margin == 0.05, row
        assert plan.mde90 <= 0.05, row
        # And no more is drawn than that takes.
        assert plan.k == 4, row
        assert 64 <= plan.n <= 1024, row
        assert plan.mde90 > 0.0497, row


def test_the_default_run_is_affordable(default):
    assert sum(plan.n * plan.k for plan in default.values()) < 20_000


def test_the_pair_was_recorded_as_recordings_are():
    of = settings()
    sizing = Sizing(of)
    for role, name, source in rows(of):
        stored = sizing.row(role, name, source.name)
        assert len(stored.records) == PROBLEMS
        assert {tally.k for tally in stored.records} == {64}
        assert stored.speed > 0


def test_a_number_of_problems_means_that_number():
    found = planned(settings(problems=256))
    assert {(plan.n, plan.k) for plan in found.values()} == {(256, 4)}
    assert any(not plan.enough for plan in found.values())


def test_a_greedy_run_draws_one_completion_of_each(default):
    of = settings(greedy=True)
    assert {Sizing(of).size(*row).k for row in rows(of)} == {1}


def test_more_samples_take_fewer_problems(default):
    found = planned(settings(samples=8))
    assert {plan.k for plan in found.values()} == {8}
    assert all(found[row].n < plan.n for row, plan in default.items())


@pytest.mark.parametrize("minutes", [0.2, 1.0])
def test_a_time_is_used_alike_in_all_rows(minutes):
    of = settings(minutes=minutes)
    found = planned(of)
    assert 0.9 * 60 * minutes < seconds(of, found) <= 60 * minutes
    drops = [plan.mde90 for plan in found.values()]
    assert max(drops) < 1.02 * min(drops)
    assert (max(drops) > 0.05) == (minutes < 0.5)


def test_too_short_a_time_asks_the_least_and_a_long_one_all():
    least, most = planned(settings(minutes=1e-5)), planned(settings(minutes=1e5))
    assert {(plan.n, plan.k) for plan in least.values()} == {(64, 4)}
    assert {(plan.n, plan.k) for plan in most.values()} == {(1024, 16)}


@pytest.fixture
def copied(tmp_path):
    """Settings with one task and a copy of its baselines, and a way to change them."""
    (tmp_path / "pyproject.toml").write_text('[tool.grpo-harness]\ntasks = ["gcd"]\n')

    def change(policy, **changes):
        stored = baselines.load(baselines.path_of(ROOT / "baselines", policy, "gcd"))
        names = [problem.id for problem in task_types()["gcd"].problems(PROBLEMS)]
        kept = {name: stored.records[name] for name in names[: changes.pop("problems", None)]}
        header = stored.header
        if changes.pop("slow", False):
            environment = dict(header.environment)
            environment.pop(baselines.SPEED)
            header = type(header)(
                **{
                    **{name: getattr(header, name) for name in header.__struct_fields__},
                    "environment": environment,
                }
            )
        baselines.write(baselines.path_of(tmp_path / "baselines", policy, "gcd"), header, kept)

    change("nano-base")
    change("nano-trained")
    return change, lambda **options: resolve(tmp_path, tmp_path, options)


def test_few_recorded_problems_are_asked_more_often_and_the_plan_says_if_that_is_too_little(copied):
    change, resolved = copied
    plans = []
    for problems in (200, 100):
        change("nano-base", problems=problems)
        plans.append(planned(resolved())["nano-base", "gcd"])
    assert [(plan.n, plan.k, plan.enough) for plan in plans] == [(199, 15, True), (100, 16, False)]


def test_a_row_without_a_baseline_asks_as_many_as_usual_and_says_why(copied):
    _, resolved = copied
    of = replace(resolved(), baselines=ROOT / "nowhere")
    sizing = Sizing(of)
    for role, name, source in rows(of):
        assert sizing.plan(role, name, source.name, risk(of)) == "no baseline"
        assert sizing.size(role, name, source).n == UNPLANNED


def test_a_time_needs_to_know_how_fast_completions_are_drawn(copied):
    change, resolved = copied
    change("nano-trained", slow=True)
    of = resolved(minutes=1)
    with pytest.raises(
        SettingsError,
        match="minutes cannot be planned: the baselines of 1 rows, such as nano-trained on gcd",
    ):
        Sizing(of).size(*next(rows(of)))


def test_a_size_does_not_depend_on_what_else_was_asked(copied):
    _, resolved = copied
    ordered = [Sizing(resolved()).size(*row) for row in rows(resolved())]
    sizing = Sizing(resolved())
    assert [sizing.size(*row) for row in reversed(list(rows(resolved())))] == ordered[::-1]


def test_a_recording_asks_as_many_problems_as_there_are_up_to_its_number(tmp_path):
    (tmp_path / "few.py").write_text(
        "from grpo_harness import TaskType\n"
        "class Few(TaskType):\n"
        "    name = 'few'\n"
        "    def draw(self, rng): return {'n': rng.randrange(1000)}\n"
        "    def statement(self, task): return f\"What is {task['n']}?\"\n"
        "    def requirement(self, task): return 'A number.'\n"
        "    def answer(self, task): return task['n']\n"
        "    def read(self, task, text): return 'wrong'\n"
    )
    (tmp_path / "pyproject.toml").write_text('[tool.grpo-harness]\ntasks = ["few.py", "gcd"]\n')
    of = resolve(tmp_path, tmp_path, {})
    few, gcd = (task.source for task in of.tasks.values())
    assert to_record(of, gcd) == PROBLEMS
    assert 64 < to_record(of, few) < 256
    assert len(few.problems(to_record(of, few))) == to_record(of, few)
    with pytest.raises(ValueError, match="no more than"):
        few.problems(to_record(of, few) + 1)
    assert to_record(resolve(tmp_path, tmp_path, {"problems": 70}), gcd) == 70
