"""Errors that are messages to the user, not bugs: their base class, and errors of user code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class HarnessError(Exception):
    """One line: what is wrong, where, and what to do next. Shown without a traceback.

    With ``shows_cause`` the cause was raised in code of the user, and its traceback is shown.
    """

    shows_cause = False


@contextmanager
def user_code(told: Callable[[BaseException], Exception]) -> Iterator[None]:
    """Run code of the user inside: whatever it raises becomes the error that ``told`` makes of it.

    Also an exit, or a skip of pytest, which would turn a test green. Only Ctrl-C passes.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise told(error) from error
