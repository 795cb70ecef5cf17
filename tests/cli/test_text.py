"""Is what is shown readable, aligned, and harmless to a terminal?"""

from __future__ import annotations

import os
import subprocess

import pytest
from hypothesis import given, strategies as st

from embedcore.cli.text import (
    command,
    duration,
    one_line,
    plural,
    printable,
    scrubbed,
    table,
    without_credentials,
    wrapped,
)

HOSTILE = st.text(
    st.one_of(st.sampled_from("\x1b[]m;0123?\x07\x9b\x9d\\PX^_\u202e\u2066\r\b"), st.characters())
)
DANGEROUS = {*map(chr, [*range(9), *range(11, 32), *range(127, 160)]), "\u202e", "\u2066", "\u200f"}


@pytest.mark.fault(140)
@given(HOSTILE)
def test_nothing_a_terminal_obeys_is_left(text):
    assert not DANGEROUS & set(printable(text))


@pytest.mark.fault(140)
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\x1b[0m", "ared"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]52;c;c3R1ZmY=\x07x", "x"),
        ("\x9b2Jx", "x"),
        ("\x9d0;title\x9cx", "x"),
        ("a\rb\bc\x00d", "abcd"),
        ("user\u202egpj.exe", "usergpj.exe"),
        ("tab\tand\nbreak stay", "tab\tand\nbreak stay"),
        ("e\u0301 😀 שלום", "e\u0301 😀 שלום"),
    ],
)
def test_sequences_go_as_a_whole(text, shown):
    assert printable(text) == shown


@given(HOSTILE, st.integers(2, 40))
def test_one_line_fits(text, width):
    line = one_line(text, width)
    assert len(line) <= width
    assert "\n" not in line
    assert not DANGEROUS & set(line)


@given(st.text(st.characters(codec="utf-8"), max_size=300))
def test_a_paragraph_keeps_within_its_width(text):
    lines = wrapped(text, width=40, lines=3, indent="  ").split("\n")
    assert len(lines) <= 3
    assert all(len(line) <= 40 for line in lines)

    assert (plural(1, "row"), plural(1000, "row")) == ("1 row", "1,000 rows")
    assert [duration(s) for s in (0.34, 61, 7322)] == ["0.3 s", "1 min 1 s", "2 h 2 min"]


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell is asked")
@given(st.lists(st.binary(min_size=1, max_size=20).filter(lambda b: b"\0" not in b), min_size=1))
def test_a_command_pastes_as_what_it_was(arguments):
    line = command([os.fsdecode(argument) for argument in arguments])
    assert printable(line) == line
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == arguments


def test_columns_are_aligned():
    shown = table(("NAME", "N"), [("a\x1b[1m", "1"), ("long name", "1,000")], numbers={1})
    assert shown.splitlines() == [
        "NAME           N",
        "a              1",
        "long name  1,000",
    ]


@pytest.mark.fault(134)
@pytest.mark.parametrize(
    ("given_url", "shown"),
    [
        ("http://user:secret@proxy:3128", "http://proxy:3128"),
        ("user:secret@proxy:3128", "proxy:3128"),
        ("https://host/v1?key=secret", "https://host/v1"),
        ("https://a@b@host/v1", "https://host/v1"),
        ("http://[::1/x@", "(not a valid URL)"),
        ("plain value", "plain value"),
    ],
)
def test_credentials_of_addresses_are_left_out(given_url, shown):
    assert without_credentials(given_url) == shown


@pytest.mark.fault(131)
def test_secrets_of_the_environment_are_scrubbed():
    environ = {
        "A_KEY": "abcdefgh",
        "MY_PASSWORD": "hunter2hunter2",
        "B_KEY": "short",
        "HOME": "/home/x",
    }
    text = "abcdefgh hunter2hunter2 short /home/x"
    assert scrubbed(text, environ) == "*** *** short /home/x"
