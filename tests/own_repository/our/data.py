"""Word problems of two steps: 400 to judge by, and any number of others to train on."""

import random
from itertools import islice

from datasets import Dataset

NAMES = ("Ann", "Bob", "Eve", "Ida", "Jan", "Kim", "Sam", "Tom")


def problem(rng):
    """Draw one problem: a question, its solution and its category."""
    name, category = rng.choice(NAMES), rng.choice(("farm", "school", "shop"))
    a, b, c = (rng.randint(1, 3) for _ in range(3))
    if category == "farm":
        a = max(a, b)
        asked, solution = f"{name} has {a} cows. {b} leave and {c} come.", a - b + c
    elif category == "school":
        asked, solution = f"{name} sees {a} girls and {b} boys. {c} more come.", a + b + c
    else:
        asked, solution = f"{name} has {a} pens, buys {b} and sells {c}.", a + b - c
    return {"question": f"{asked} How many now?", "solution": str(solution), "category": category}


def different(rng):
    """Draw problems without end, none of them twice until all were there."""
    seen = set()
    for _ in range(20_000):
        row = problem(rng)
        if row["question"] not in seen:
            seen.add(row["question"])
            yield {"prompt": [{"role": "user", "content": row["question"]}], **row}


def rows():
    """Return the problems to judge by."""
    return Dataset.from_list(list(islice(different(random.Random(1)), 400)))


def training_rows():
    """Return all other problems."""
    judged = set(rows()["question"])
    others = (row for row in different(random.Random(2)) if row["question"] not in judged)
    return Dataset.from_list(list(others))
