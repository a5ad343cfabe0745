"""What tests of the plugin do in projects of their own."""

OWN_SUITE = """
def test_accuracy(evaluation, baseline, gate):
    gate.accuracy(evaluation, baseline)
"""


def run(project, *arguments, **outcomes):
    """Run pytest in a project, in this process; its outcomes, where some are given."""
    result = project.runpytest_inprocess("-p", "no:xdist", *arguments)
    if outcomes:
        result.assert_outcomes(**outcomes)
    return result
