"""The one kind of error that is a message to a person and not a defect of the program."""


class HarnessError(Exception):
    """What was wrong, where, and what to do next, in one line; a traceback would add nothing."""
