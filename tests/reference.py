"""The rule reward a second time, written down clause by clause: the oracle of the tests.

It shares no code with the harness and takes other ways wherever there are any: regular expressions
for the fence and the task, Python's own parser for expressions, counting for sorting. Where the
harness is careful to be quick, this is careful to be literal.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import Counter
from typing import Any

TYPES = ("math", "gcd", "sort", "palindrome", "reverse", "py_eval")


class NoTaskError(Exception):
    """The prompt holds no task that has an answer."""


# --- the prompt ------------------------------------------------------------------------------

REQUIREMENTS = {
    "math": "要求：只输出最终结果（整数），不要解释。",
    "gcd": "要求：只输出一个整数，不要解释。",
    "sort": "要求：只输出排序后的数字，用空格分隔，不要解释。",
    "palindrome": "要求：只输出 YES 或 NO，不要解释。",
    "reverse": "要求：只输出反转后的字符串，不要解释。",
    "py_eval": "要求：只输出表达式的值，不要解释。",
}


def wording(task: dict[str, Any]) -> str:
    """The prompt without its last line."""
    match task:
        case {"type": "math", "op": op, "a": a, "b": b}:
            symbol = {"add": "+", "sub": "-", "mul": "*", "div": "//"}[op]
            statement = f"【数学题】计算：{a} {symbol} {b}"
        case {"type": "gcd", "a": a, "b": b}:
            statement = f"【编程题】给定 a={a}，b={b}，输出 gcd(a,b)。"
        case {"type": "sort", "arr": arr}:
            statement = "【编程题】对数组进行升序排序：[" + ", ".join(f"{n}" for n in arr) + "]"
        case {"type": "palindrome", "s": s}:
            statement = "【编程题】判断字符串是否回文：" + s
        case {"type": "reverse", "s": s}:
            statement = "【编程题】把字符串反转：" + s
        case {"type": "py_eval", "expr": expr}:
            statement = "【编程题】求下面 Python 表达式的值：\n" + expr
        case _:
            raise NoTaskError
    return statement + "\n" + REQUIREMENTS[task["type"]] + "\n"


def task_in(prompt: str) -> dict[str, Any]:
    """The first ``TASK={…}``: the shortest match up to the first closing brace."""
    match = re.search(r"TASK=(\{.*?\})", prompt, re.DOTALL)
    if match is None:
        raise NoTaskError
    try:
        task: dict[str, Any] = json.loads(match.group(1))
    except (ValueError, RecursionError) as error:
        raise NoTaskError from error
    return task


# --- the true answer -------------------------------------------------------------------------


def true_answer(task: dict[str, Any]) -> int | str | list[int]:
    match task:
        case {"type": "math", "op": str(op), "a": a, "b": b} if whole(a, b):
            if op == "add":
                return a + b
            if op == "sub":
                return a - b
            if op == "mul":
                return a * b
            if op == "div" and b != 0:
                return divmod(a, b)[0]
        case {"type": "gcd", "a": a, "b": b} if whole(a, b):
            a, b = abs(a), abs(b)
            while b:
                a, b = b, a % b
            return a
        case {"type": "sort", "arr": list(arr)} if whole(*arr):
            counts = Counter(arr)
            ordered: list[int] = []
            while counts:
                least = min(counts)
                ordered += [least] * counts.pop(least)
            return ordered
        case {"type": "palindrome", "s": str(s)}:
            return "YES" if all(s[i] == s[-1 - i] for i in range(len(s))) else "NO"
        case {"type": "reverse", "s": str(s)}:
            return "".join(reversed(s))
        case {"type": "py_eval", "expr": str(expr)}:
            return value_of(expr)
    raise NoTaskError


def whole(*values: object) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def value_of(expr: str) -> int | str:
    """The value of one of the seven kinds of expression, by way of Python's own parser."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # eval passes over leading blanks and tabs, its parser alone does not.
            tree = ast.parse(expr.lstrip(" \t"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NoTaskError from error
    match tree:
        case ast.Call(func=ast.Name(id="len"), args=[ast.Constant(value=str(s))], keywords=[]):
            return len(s)
        case ast.Subscript(
            value=ast.Constant(value=str(s)),
            slice=ast.Slice(
                lower=None,
                upper=None,
                step=ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1)),
            ),
        ):
            return "".join(reversed(s))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(s)), attr="upper"), args=[], keywords=[]
        ):
            return s.upper()
        case ast.Call(func=ast.Name(id="abs"), args=[x], keywords=[]):
            return max(integer(x), -integer(x))
        case ast.Call(func=ast.Name(id="sum"), args=[ast.List(elts=elements)], keywords=[]):
            return sum(integer(x) for x in elements)
        case ast.Call(func=ast.Name(id="max"), args=[_, _, *_], keywords=[]):
            return max(integer(x) for x in tree.args)
        case ast.Call(func=ast.Name(id="min"), args=[_, _, *_], keywords=[]):
            return min(integer(x) for x in tree.args)
    raise NoTaskError


def integer(node: ast.AST) -> int:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
            sign = -1
        case ast.UnaryOp(op=ast.UAdd(), operand=ast.Constant(value=int(number))):
            sign = 1
        case ast.Constant(value=int(number)):
            sign = 1
        case _:
            raise NoTaskError
    if isinstance(number, bool):
        raise NoTaskError
    return sign * number


# --- step 1: strip ---------------------------------------------------------------------------


def stripped(completion: str) -> str:
    text = completion.strip()
    fenced = re.match(r"```(.*?)```", text, re.DOTALL)
    if fenced:
        lines = fenced.group(1).splitlines()
        if len(lines) >= 2 and lines[0].isalpha():
            lines = lines[1:]
        text = lines[0].strip() if lines else ""
    for line in text.splitlines():
        return line.strip()
    return ""


# --- step 2: compare -------------------------------------------------------------------------


def reading(prompt: str, completion: str) -> str:
    """``correct``, ``wrong``, or ``unparsable`` where nothing is written that could be compared."""
    try:
        task = task_in(prompt)
        answer = true_answer(task)
    except NoTaskError:
        return "wrong"
    text = stripped(completion)
    if task["type"] == "sort":
        written: list[Any] = re.findall(r"-?\d+", text)
        right = [as_integer(number) for number in written] == answer
    elif task["type"] == "palindrome":
        # Every place in turn: is there a YES or a NO, letter by letter, in whatever case?
        written = [
            word
            for start in range(len(text))
            for word in ("YES", "NO")
            if text[start : start + len(word)].casefold() == word.casefold()
        ]
        right = written[:1] == [answer]
    elif isinstance(answer, str):
        written = [text] if text else []
        quoted = re.fullmatch(r"'(.*)'|\"(.*)\"", text, re.DOTALL)
        right = (quoted[quoted.lastindex or 0] if quoted else text) == answer
    else:
        written = re.findall(r"-?\d+", text)
        right = as_integer(written[0]) == answer if written else text == str(answer)
    return "correct" if right else "wrong" if written else "unparsable"


def as_integer(digits: str) -> int | None:
    try:
        return int(digits)
    except ValueError:
        return None


# --- step 3: score ---------------------------------------------------------------------------


def reward(prompt: str, completion: str) -> float:
    length = len(completion)
    score = +1.0 if reading(prompt, completion) == "correct" else -1.0
    return score - 0.002 * min(length, 200)
