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


def by_definition(text, stops):
    """Read character by character, and stop as soon as the text ends in a stop string."""
    for end in range(len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


@given(letters, stops, st.lists(st.integers(0, 30)))
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text, stops, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    shown, stopped = run(pieces, stops)
    assert ("".join(shown), stopped) == by_definition(text, stops)


@given(letters, stops)
def test_stop_strings_release_no_part_of_a_match(text, stops):
    whole, _ = by_definition(text, stops)
    watch, seen = StopStrings(stops), ""
    for letter in text:
        seen += watch.push(letter)
        assert whole.startswith(seen)


def test_stop_strings_release_text_as_soon_as_it_is_certain():
    watch = StopStrings(("STOP",))
    assert [watch.push(piece) for piece in ("a", "S", "T", "x", "STO")] == ["a", "", "", "STx", ""]
    assert watch.flush() == "STO"
