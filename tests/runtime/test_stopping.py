from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvlm.errors import PromptError
from flashvlm.stopping import MAX_STOP, MAX_STOPS, StopStrings, parse_stop

few = st.text("ab ", max_size=40)  # few letters, so that stop strings occur, overlap and almost occur
stops_of = st.lists(st.text("ab ", min_size=1, max_size=5), max_size=4)


def reference(text, stops):
    """(text before the stop string, the stop string): the first one to be complete, the longest of those."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, length, stop = min(ends)
    return text[: end + length], stop


def cut(text, places):
    edges = [0, *sorted(p % (len(text) + 1) for p in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@settings(max_examples=200, deadline=None)
@given(few, stops_of, st.lists(st.integers(0, 40), max_size=12))
def test_pieces_equal_a_search_of_the_whole(text, stops, places):
    stream = StopStrings(stops)
    shown = ""
    for piece in cut(text, places):
        shown += stream.push(piece)
        assert reference(text, stops)[0].startswith(shown)  # nothing shown is ever taken back
    shown += stream.flush()
    assert (shown, stream.found) == reference(text, stops)


@settings(max_examples=100, deadline=None)
@given(few, stops_of)
def test_it_ends_with_the_character_that_completes_a_stop_string_and_holds_back_no_more_than_it_must(text, stops):
    stream = StopStrings(stops)
    shown = ""
    for n, character in enumerate(text, start=1):
        shown += stream.push(character)
        before, stop = reference(text[:n], stops)
        assert stream.found == stop
        if stop:
            assert shown == before
            break
        held = text[len(shown) : n]
        starts = [before[i:] for i in range(n) if any(s.startswith(before[i:]) for s in stops)]
        assert held == (starts[0] if starts else "")


def test_nothing_follows_a_stop_string():
    stream = StopStrings("END")
    assert [stream.push(piece) for piece in ("one E", "N", "D two", " three")] == ["one ", "", "", ""]
    assert stream.found == "END"
    assert stream.flush() == ""


def test_what_was_held_back_comes_at_the_end():
    stream = StopStrings(["END"])
    assert stream.push("the EN") == "the "
    assert stream.flush() == "EN"
    assert stream.flush() == ""
    assert stream.found is None


def test_a_stop_string_inside_the_beginning_of_another():
    for pieces in (["abcd"], ["ab", "cd"], list("abcd")):
        stream = StopStrings(["abcd", "b"])
        assert "".join(map(stream.push, pieces)) == "a"
        assert stream.found == "b"


def test_without_stop_strings_text_passes():
    stream = StopStrings(None)
    assert stream.push("as it is") == "as it is"
    assert stream.flush() == ""


def test_what_is_taken():
    assert parse_stop(None) == parse_stop([]) == ()
    assert parse_stop("a") == parse_stop(["a"]) == ("a",)
    assert parse_stop(("x" * MAX_STOP,) * MAX_STOPS) == ("x" * MAX_STOP,) * MAX_STOPS


BAD = ["", [""], [None], 5, True, {"a"}, {"a": 1}, iter("a"), b"a", "x" * (MAX_STOP + 1), ["x"] * (MAX_STOPS + 1)]


@pytest.mark.parametrize("value", BAD)
def test_what_is_refused(value):
    expected = r"^stop: expected at most 16 strings of 1\.\.256 characters, found "
    with pytest.raises(PromptError, match=expected) as refusal:
        StopStrings(value)
    assert len(str(refusal.value)) < 250
