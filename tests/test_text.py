"""Completions as text: what is read out of them, and what is left of them on a terminal."""

import re
import runpy
import string
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_harness.text import escape, first_line, integers, unquoted

reference = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("reference.py"))))

thorough = settings(deadline=None, max_examples=300)

anything = st.text(st.characters())
# Texts in which markers, backslashes and escapes meet one another.
knotty = st.lists(
    st.sampled_from(
        [
            *":#[]vso\\nux0a3 é答\n\r\x1b\x85\u2028\u200b\u202e\ufeff…(",
            *("::", "##", "##[", "##vso[", "::error::", "… (1 more characters)"),
            *("\\u003a", ":\\u003a", "\\n", "\\x1b"),
        ]
    ),
    max_size=30,
).map("".join)

INVISIBLE = {
    "C0 and C1 control": [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0))],
    "line separators": ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"],
    "other spaces": [*"\xa0\u1680\u202f\u205f\u3000", *map(chr, range(0x2000, 0x200B))],
    "bidirectional": [
        *"\u061c\u200e\u200f",
        *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
    ],
    "zero width": [*"\u200b\u200c\u200d\u2060\u2061\u2064\ufeff\u00ad\u034f\u180e"],
    "fillers": [*"\u115f\u1160\u3164\uffa0\u17b4\u17b5\u2800"],
    "variation selectors and tags": [
        *"\u180b\u180c\u180d\u180f\ufe00\ufe0e\ufe0f",
        *"\U000e0100\U000e01ef\U000e0001\U000e0041\U000e007f",
    ],
    "surrogates": ["\ud800", "\udbff", "\udc00", "\udfff"],
    "private use and no characters": ["\ue000", "\U00100000", "\uffff", "\U0010ffff"],
}


# --- escape ----------------------------------------------------------------------------------


@pytest.mark.parametrize("characters", INVISIBLE.values(), ids=INVISIBLE)
def test_what_cannot_be_seen_is_written_out(characters: list[str]) -> None:
    for character in characters:
        shown = escape(f"a{character}b")
        assert shown[0] == "a"
        assert shown[-1] == "b"
        assert re.fullmatch(r"\\[nrt]|\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U[0-9a-f]{8}", shown[1:-1]), (
            f"U+{ord(character):04X}"
        )
        assert shown[1:-1].encode("ascii").decode("unicode_escape") == character


def test_no_character_of_all_of_unicode_gets_through_that_cannot_be_seen() -> None:
    block = 0x1000
    for start in range(0, sys.maxunicode + 1, block):
        shown = escape("".join(map(chr, range(start, start + block))), limit=block)
        for character in set(shown):
            seen = character == " " or unicodedata.category(character)[0] not in "CZ"
            assert seen, f"U+{ord(character):04X}"
        assert len(shown.splitlines()) == 1


@thorough
@given(anything | knotty, st.integers(0, 40) | st.just(200))
@example(":::", 200)
@example("###[", 200)
@example("####vso[task]", 200)
@example(":" * 300, 200)
@example("#" * 200 + "[", 200)
def test_nothing_gets_through_whatever_the_text(text: str, limit: int) -> None:
    shown = escape(text, limit)
    assert shown.isprintable()
    assert "::" not in shown
    assert "##" not in shown
    shown.encode("utf-8")  # no lone surrogate is left to break the log


def unescaped(shown: str) -> str:
    """Undo every escape, one after the other from the left."""
    return re.sub(
        r"\\(?:([nrt\\])|x(..)|u(....)|U(........))",
        lambda m: (
            {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[m[1]]
            if m[1]
            else chr(int(m[2] or m[3] or m[4], 16))
        ),
        shown,
    )


@thorough
@given(anything | knotty)
@example("\\n")
@example("\n")
@example("::")
@example(":\\u003a")
@example("…")
def test_an_escaped_text_can_be_read_in_one_way_only(text: str) -> None:
    assert unescaped(escape(text, limit=len(text))) == text


@thorough
@given(knotty, knotty)
@example("\\", "\\\\")
@example("::", ":\\u003a")
@example("\x1b", "\\x1b")
def test_two_texts_are_never_escaped_to_the_same(one: str, other: str) -> None:
    assert (escape(one) == escape(other)) == (one == other)


@thorough
@given(st.text(string.ascii_letters + string.digits + " .,;!?()[]{}<>+-*/='\"`_@$%&|~^"))
@example("答案是 42。")
@example("naïve café Ⅷ ٣ 🙂")
@example("a:b #1 [x](y): z")
def test_printable_text_is_left_as_it_is(text: str) -> None:
    assert escape(text, limit=10**6) == text


def test_escapes_by_example() -> None:
    assert escape("") == ""
    assert escape("a\nb\tc\r") == r"a\nb\tc\r"
    assert escape("\x1b[31mred") == r"\x1b[31mred"
    assert escape(r"C:\new") == r"C:\\new"
    assert escape("::error::stop") == r":\u003aerror:\u003astop"
    assert escape("##vso[x] ##[error]") == r"#\u0023vso[x] #\u0023[error]"
    assert escape("x\u202ey\u200b") == r"x\u202ey\u200b"


def test_a_long_text_is_cut_with_a_note() -> None:
    assert escape("x" * 200) == "x" * 200
    assert escape("x" * 201) == "x" * 200 + "… (1 more characters)"
    assert escape("x" * 10**6) == "x" * 200 + "… (999800 more characters)"
    assert escape("\n" * 5, limit=2) == r"\n\n… (3 more characters)"
    assert escape("abc", limit=0) == "… (3 more characters)"
    # The cut is made in the text, so no escape is cut in two.
    assert escape("\u202e" * 300) == r"\u202e" * 200 + "… (100 more characters)"


# --- first line ------------------------------------------------------------------------------

lines = st.lists(
    st.sampled_from(
        [
            *("```", "```", "``", "`", "python", "py3", "答案", "5", "a b", "", "~~~", "'"),
            *("\n", "\n", "\r\n", *"\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"),
            *" \t\u3000\u200b\x1f",
        ]
    ),
    max_size=12,
).map("".join)


@settings(thorough, max_examples=400)
@given(lines | anything)
def test_the_first_line_is_that_of_the_reference(text: str) -> None:
    found = first_line(text)
    assert found == reference.stripped(text)
    assert found == found.strip()
    assert len(found.splitlines()) <= 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        (" \n\t\u2028", ""),
        ("a", "a"),
        ("\n\n a \nb", "a"),
        ("a\x0bb", "a"),
        ("a\x1cb", "a"),
        ("a\x85b", "a"),
        ("a\x1fb", "a\x1fb"),
        ("```a```", "a"),
        ("```a``` b", "a"),
        ("```a", "```a"),
        ("```", "```"),
        ("```\n", "```"),
        ("``````", ""),
        ("``` ```", ""),
        ("```\n```", ""),
        ("```\n\n```", ""),
        ("```\na\n```", ""),
        ("```python\na\n```", "a"),
        ("```python\n  a  \nb\n```", "a"),
        ("```python\n\na\n```", ""),
        ("```python\n```", "python"),
        ("```python```", "python"),
        ("```python\r\na```", "a"),
        ("```python a\nb```", "python a"),
        ("```python \nb```", "python"),
        ("```py3\na```", "py3"),
        ("```答案\na```", "a"),
        ("```a\nb```c\nd```", "b"),
        ("a ```b```", "a ```b```"),
        ("````a````", "`a"),
        ("~~~\na\n~~~", "~~~"),
        ("  ```a```", "a"),
    ],
)
def test_the_first_line_by_example(text: str, line: str) -> None:
    assert first_line(text) == reference.stripped(text) == line


# --- integers --------------------------------------------------------------------------------

numerals = st.lists(
    st.sampled_from([*"-+.,0179 ٣０²Ⅷ½_ex", "\u2212", "\n", "9" * 4300, "0" * 4301, "٣" * 4301]),
    max_size=8,
).map("".join)


@thorough
@given(numerals | anything)
def test_the_integers_are_those_of_the_reference(text: str) -> None:
    found = list(integers(text))
    assert found == list(map(reference.as_integer, re.findall(r"-?\d+", text)))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", []),
        ("-", []),
        ("--5", [-5]),
        ("5-5", [5, -5]),
        ("- 5", [5]),
        ("1,000.5", [1, 0, 5]),
        ("-007", [-7]),
        ("-٤٢", [-42]),
        ("４2", [42]),
        ("²½Ⅷ", []),
        ("\u22125", [5]),
        ("0" * 4299 + "7", [7]),
        ("-" + "0" * 4299 + "7", [-7]),
        ("1 " + "0" * 4300 + "7 2", [1, None, 2]),
    ],
)
def test_integers_by_example(text: str, numbers: list[int | None]) -> None:
    assert list(integers(text)) == numbers


def test_too_long_is_too_long_whatever_the_interpreter_allows() -> None:
    limit = sys.get_int_max_str_digits()
    try:
        sys.set_int_max_str_digits(0)
        assert list(integers("9" * 4300 + " " + "9" * 4301)) == [10**4300 - 1, None]
    finally:
        sys.set_int_max_str_digits(limit)


# --- quotes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("", ""),
        ("'", "'"),
        ("''", ""),
        ("'a'", "a"),
        ('"a"', "a"),
        ("'a\"", "'a\""),
        ("''a''", "'a'"),
        ("'a", "'a"),
        ("`a`", "`a`"),
        ("’a’", "’a’"),
        ("aba", "aba"),
        ("' a '", " a "),
    ],
)
def test_one_pair_of_quotes_is_dropped(text: str, inside: str) -> None:
    assert unquoted(text) == inside
