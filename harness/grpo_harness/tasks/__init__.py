"""Problems with a known answer. One file, one task type.

===================  ================================================================
``task.py``          problems and task types; which problems are held out
``arithmetic.py`` …  the six built-in types
``dataset.py``       a table of the user's rows
``sources.py``       where types come from: this folder, and files of your own
``training_set.py``  problems to train on, none of which an evaluation may ask
===================  ================================================================
"""

from grpo_harness.tasks.sources import load_task_type, task_types
from grpo_harness.tasks.task import (
    Answer,
    Problem,
    Reading,
    Source,
    TaskType,
    int_field,
    is_held_out,
    is_int,
    letters,
    read_integer,
    read_text,
    str_field,
)
from grpo_harness.tasks.training_set import MATH, PROGRAMMING, check_disjoint, make_problems

__all__ = [
    "MATH",
    "PROGRAMMING",
    "Answer",
    "Problem",
    "Reading",
    "Source",
    "TaskType",
    "check_disjoint",
    "int_field",
    "is_held_out",
    "is_int",
    "letters",
    "load_task_type",
    "make_problems",
    "read_integer",
    "read_text",
    "str_field",
    "task_types",
]
