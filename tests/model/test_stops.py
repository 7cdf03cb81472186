import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmjax.model.stops import StopMatcher, Stops


def write(directory, generation_eos=None, config_eos=None):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": config_eos}))
    return directory


# Which stops


def test_ids_of_both_files_are_merged(tmp_path):
    assert Stops.from_dir(write(tmp_path, [154820, 154827, 154829], 154820)).token_ids == {154820, 154827, 154829}
    assert Stops.from_dir(write(tmp_path, 1, [2, 3])).token_ids == {1, 2, 3}


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_one_of_the_files_suffices(tmp_path, name):
    (tmp_path / name).write_text('{"eos_token_id": 7}')
    assert Stops.from_dir(str(tmp_path)) == Stops(frozenset({7}))


def test_a_directory_without_either_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"neither .* in {tmp_path}; give the directory"):
        Stops.from_dir(tmp_path)


def test_a_checkpoint_may_have_no_stops(tmp_path):
    assert Stops.from_dir(write(tmp_path)) == Stops()


@pytest.mark.parametrize("eos", ["2", 1.5, True, -1, [1, None]])
def test_a_malformed_eos_names_value_and_file(tmp_path, eos):
    with pytest.raises(ValueError, match=r"eos_token_id .* in .*/config\.json is neither"):
        Stops.from_dir(write(tmp_path, 1, eos))


def test_a_request_adds_its_own(tmp_path):
    stops = Stops.from_dir(write(tmp_path, 1, 2), token_ids=[9], strings=["END", "END", "\n\n"])
    assert stops == Stops(frozenset({1, 2, 9}), ("END", "\n\n"))


def test_ignore_eos_keeps_the_requests_own(tmp_path):
    stops = Stops.from_dir(write(tmp_path, 1, 2), token_ids=[2, 9], strings=["END"], ignore_eos=True)
    assert stops == Stops(frozenset({2, 9}), ("END",))


def test_extending_leaves_the_checkpoints_stops_unchanged():
    stops = Stops(frozenset({1}))
    assert stops.extended([2], ["x"]) == Stops(frozenset({1, 2}), ("x",))
    assert stops.extended(ignore_eos=True) == Stops()
    assert stops == Stops(frozenset({1}))


def test_empty_stop_strings_are_refused():
    with pytest.raises(ValueError, match="stop string 1 is empty"):
        Stops(strings=("a", ""))
    with pytest.raises(ValueError, match="stop string 0 is empty"):
        StopMatcher([""])


def test_a_string_in_place_of_a_list_of_strings_is_refused():
    with pytest.raises(ValueError, match=r"not the string 'END'; give \['END'\]"):
        Stops().extended(strings="END")


def test_negative_stop_ids_are_refused():
    with pytest.raises(ValueError, match="stop token id -1 is negative"):
        Stops(frozenset({-1}))


# Stop strings in streamed text


def test_a_stop_string_may_span_pieces():
    matcher = StopMatcher(["<end>"])
    assert [matcher.push(piece) for piece in ("so <", "en", "d> no")] == [("so ", None), ("", None), ("", "<end>")]


def test_text_that_turns_out_to_be_no_stop_string_is_released():
    matcher = StopMatcher(["<end>"])
    assert [matcher.push(piece) for piece in ("<en", "try>", "<")] == [("", None), ("<entry>", None), ("", None)]
    assert matcher.flush() == "<"
    assert matcher.flush() == ""


def test_a_new_start_within_a_failed_one_is_kept():
    matcher = StopMatcher(["aab"])
    assert matcher.push("aa") == ("", None)
    assert matcher.push("a") == ("a", None)
    assert matcher.push("b") == ("", "aab")


def test_the_stop_string_completed_first_wins():
    assert StopMatcher(["abcd", "bc"]).push("xabcd") == ("xa", "bc")


def test_of_stop_strings_completed_together_the_longest_wins():
    assert StopMatcher(["bc", "abc"]).push("xabc") == ("x", "abc")


def test_the_stop_string_itself_can_be_included():
    matcher = StopMatcher(["<end>"], include=True)
    assert matcher.push("so <en") == ("so ", None)
    assert matcher.push("d> no") == ("<end>", "<end>")


def test_after_a_match_all_text_is_dropped():
    matcher = StopMatcher(["."])
    matcher.push("one.")
    assert matcher.push("two") == ("", ".")
    assert matcher.flush() == ""
    assert matcher.matched == "."


def test_without_stop_strings_all_text_passes_at_once():
    matcher = StopMatcher([])
    assert matcher.push("text") == ("text", None)
    assert matcher.flush() == ""


def first_match(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """End, start and stop string of the match that is completed first, by looking at all of the text."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    return min(found, default=None)


few_letters = st.text("ab", max_size=6)
stop_strings = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


@given(pieces=st.lists(few_letters), stops=stop_strings, include=st.booleans())
def test_the_result_is_that_of_a_search_in_the_whole_text(pieces, stops, include):
    matcher, text = StopMatcher(stops, include), "".join(pieces)
    emitted = "".join([matcher.push(piece)[0] for piece in pieces]) + matcher.flush()
    match first_match(text, stops):
        case None:
            assert (emitted, matcher.matched) == (text, None)
        case end, start, stop:
            assert (emitted, matcher.matched) == (text[: end if include else start], stop)


@given(pieces=st.lists(few_letters), stops=stop_strings)
def test_a_match_is_reported_with_the_piece_that_completes_it(pieces, stops):
    matcher, text = StopMatcher(stops), ""
    for piece in pieces:
        text += piece
        assert (matcher.push(piece)[1] is None) == (first_match(text, stops) is None)


@given(pieces=st.lists(few_letters), stops=stop_strings)
def test_no_more_is_kept_back_than_could_begin_a_stop_string(pieces, stops):
    matcher, text, emitted = StopMatcher(stops), "", ""
    beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
    for piece in pieces:
        text, released = text + piece, matcher.push(piece)
        emitted += released[0]
        if released[1] is not None:
            break
        kept = max((start for start in beginnings if text.endswith(start)), key=len, default="")
        assert emitted + kept == text
