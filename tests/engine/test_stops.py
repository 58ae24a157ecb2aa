import itertools

from hypothesis import given
from hypothesis import strategies as st

from nanohybrid.engine.detokenizer import StopStrings

letters = st.text("ab\n", max_size=30)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3).map(tuple)


def run(pieces, stops):
    watch = StopStrings(stops)
    shown = [watch.push(piece) for piece in pieces]
    return [*shown, watch.flush()], watch.stopped


def plainly(text, stops):
    """By definition: read character by character, and stop at the first moment that the text ends in a stop string."""
    for end in range(len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


@given(letters, stops, st.lists(st.integers(0, 30)))
def test_a_stop_string_cuts_the_same_however_the_text_was_split(text, stops, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    shown, stopped = run(pieces, stops)
    assert ("".join(shown), stopped) == plainly(text, stops)


@given(letters, stops)
def test_no_part_of_a_stop_string_is_ever_shown(text, stops):
    whole, _ = plainly(text, stops)
    watch, seen = StopStrings(stops), ""
    for letter in text:
        seen += watch.push(letter)
        assert whole.startswith(seen)


def test_text_is_held_back_no_longer_than_it_must():
    watch = StopStrings(("STOP",))
    assert [watch.push(piece) for piece in ("a", "S", "T", "x", "STO")] == ["a", "", "", "STx", ""]
    assert watch.flush() == "STO"
