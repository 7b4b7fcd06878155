"""StopStrings against a reference that looks at the whole text at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.core.errors import InvalidRequest
from serve.engine.output import StopStrings


def reference(text, stops, include):
    """(all text sent so far, hit): reads every prefix of the text, shortest first."""
    for end in range(len(text) + 1):
        done = [s for s in stops if text[:end].endswith(s)]
        if done:
            return (text[:end] if include else text[: end - max(map(len, done))]), True
    if include:
        return text, False
    begun = [k for k in range(1, len(text) + 1) if any(s != text[-k:] and s.startswith(text[-k:]) for s in stops)]
    return text[: len(text) - max(begun, default=0)], False


small = st.text(alphabet="ab", max_size=12)


@settings(max_examples=600)
@given(
    pieces=st.lists(small, max_size=8),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
def test_equals_the_oracle_after_every_piece(pieces, stops, include):
    finder, seen, sent, was_hit = StopStrings(tuple(stops), include), "", "", False
    for piece in pieces:
        out, hit = finder.push(piece)
        seen, sent = seen + piece, sent + out
        assert (sent, hit) == reference(seen, stops, include)
        assert not (was_hit and out)
        was_hit = hit
    rest = finder.flush()
    assert sent + rest == (sent if was_hit else seen)
    assert finder.flush() == ""


@pytest.mark.parametrize(
    ("stops", "include", "pieces", "want"),
    [
        pytest.param(
            ("END",), False, ["a E", "N", "D b"], [("a ", False), ("", False), ("", True)], id="across_pieces"
        ),
        pytest.param(("END",), True, ["a E", "N", "D b"], [("a E", False), ("N", False), ("D", True)], id="included"),
        pytest.param(("END",), False, ["EN", "EEND"], [("", False), ("ENE", True)], id="false_start"),
        pytest.param(("abcd", "bc"), False, ["abcd"], [("a", True)], id="first_complete_wins"),
        pytest.param(("b", "ab"), False, ["xab"], [("x", True)], id="longest_of_equal_ends"),
        pytest.param(("é!",), False, ["caf", "é", "?"], [("caf", False), ("", False), ("é?", False)], id="not_ascii"),
        pytest.param((), False, ["ab"], [("ab", False)], id="no_stops"),
        pytest.param(("x",), False, ["ax", "b"], [("a", True), ("", True)], id="nothing_after_the_hit"),
    ],
)
def test_named_cases(stops, include, pieces, want):
    finder = StopStrings(stops, include)
    assert [finder.push(p) for p in pieces] == want


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InvalidRequest, match="empty") as caught:
        StopStrings(("a", ""), False)
    assert caught.value.param == "stop"


@settings(max_examples=400)
@given(
    early=st.lists(small, max_size=4),
    late=st.lists(small, max_size=4),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_before_it_counts_a_stop_string_is_text_and_one_that_straddles_counts(early, late, stops, include):
    """Reference: the first place in the later text at which the whole text ends with a stop string."""
    it = StopStrings(tuple(stops), include)
    sent, hit = "", False
    for piece in early:
        text, ended = it.push(piece, armed=False)
        assert not ended
        sent += text
    for piece in late:
        text, hit = it.push(piece)
        sent += text
        if hit:
            break
    start, whole = len("".join(early)), "".join(early + late)
    for end in range(start + 1, len(whole) + 1):
        done = [s for s in stops if whole[:end].endswith(s)]
        if done:
            assert hit
            # What was sent before is never taken back, so a cut may come later than the stop string begins.
            assert sent == (whole[:end] if include else whole[: end - max(map(len, done))])
            return
    assert not hit
    assert sent + it.flush() == whole
