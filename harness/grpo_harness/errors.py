"""The base class of errors that are messages to the user, not bugs."""


class HarnessError(Exception):
    """One line: what is wrong, where, and what to do next. Shown without a traceback."""
