"""How the suites are spread where pytest-xdist runs them."""

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep the training suite in one worker: its tests look at the same few long runs.

    By the file's name: `--dist loadgroup` forgets its groups under pytest 9.2 (pytest-xdist#1386).
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            return path if path.endswith("test_training.py") else nodeid

    return Scheduling(config, log)
