"""Stop strings in text that arrives in pieces: found wherever they fall, never leaked by a letter, never holding back for nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.decode.stop import StopMatcher, TextState


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """The law: cut at the earliest beginning; of several there, the longest."""
    found = [(text.find(s), -len(s), s) for s in stops if s in text]
    if not found:
        return text, None
    at, _, stop = min(found)
    return text[:at], stop


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
)
def test_settled_text_is_never_taken_back(pieces: list[str], stops: list[str]):
    matcher = StopMatcher(tuple(stops))
    emitted, seen, stop = "", "", None
    for piece in pieces:
        seen += piece
        settled, stop = matcher.feed(piece)
        emitted += settled
        if stop is not None:
            break
        assert not any(s in seen for s in stops)
        held = seen[len(emitted) :]
        assert seen.startswith(emitted)
        # What is held back is a beginning of some stop string, and the longest such tail.
        assert not held or any(s.startswith(held) for s in stops)
        assert not any(s.startswith(seen[-n:]) for n in range(len(held) + 1, len(seen) + 1) for s in stops)
    if stop is None:
        emitted += matcher.flush()
        assert emitted == seen
    else:
        at = seen.find(stop)
        assert emitted == seen[:at]
        # A stop string that is complete ends the request at once, so only those complete by then compete.
        assert (emitted, stop) == first_stop(seen, tuple(stops))


def test_without_stops_everything_passes():
    matcher = StopMatcher(())
    assert matcher.feed("abc") == ("abc", None)
    assert matcher.flush() == ""


def decode(ids: list[int]) -> str:
    """A stand-in for a byte-level tokenizer: tokens are bytes."""
    return bytes(ids).decode(errors="replace")


def test_half_a_character_waits_and_is_marked_at_the_end():
    state = TextState(decode, ())
    pieces = [state.feed(b)[0] for b in "é!".encode()]
    assert pieces == ["", "é", "!"]
    assert state.feed("é".encode()[0])[0] == ""
    assert state.flush() == ("\ufffd", None)
    assert state.text == "é!\ufffd"


def test_a_stop_string_is_cut_from_the_text():
    state = TextState(decode, ("\n\n",))
    events = [state.feed(b) for b in b"ab\n\nc"[:4]]
    assert events == [("a", None), ("b", None), ("", None), ("", "\n\n")]
    assert state.text == "ab"
    state = TextState(decode, ("\n\n",))
    for b in b"ab\n":
        state.feed(b)
    assert state.text == "ab"
    assert state.flush() == ("\n", None)
    assert state.text == "ab\n"


@given(
    st.text("ab", max_size=14),
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3, unique=True),
    st.integers(0, 9),
)
def test_stop_strings_are_looked_for_only_after_min_new_tokens(text: str, stops: list[str], minimum: int):
    state = TextState(decode, tuple(stops), minimum)
    pieces, stop, fed = [], None, 0
    for byte in text.encode():
        fed += 1
        piece, stop = state.feed(byte)
        pieces.append(piece)
        if fed <= minimum:
            assert (piece, stop) == (chr(byte), None)  # nothing is held back for a search that does not take place
        if stop is not None:
            break
    if stop is None:
        piece, stop = state.flush()
        pieces.append(piece)
    seen = text[:fed]
    kept, found = first_stop(seen[minimum:], tuple(stops))
    assert ("".join(pieces), stop) == (seen[:minimum] + kept, found)
    assert state.text == "".join(pieces)


@given(st.lists(st.sampled_from([*b"ab ", *"é漢😀".encode(), 0xFF, 0xC3]), max_size=30))
def test_the_pieces_are_the_whole(ids: list[int]):
    state = TextState(decode, ())
    pieces = [state.feed(token)[0] for token in ids]
    pieces.append(state.flush()[0])
    assert "".join(pieces) == state.text == decode(ids)


@given(st.lists(st.integers(0, 12), max_size=40))
def test_a_byte_fallback_tokenizer_with_spaces(ids: list[int]):
    """The layout of Llama 2 and Mistral: words carry their space, the first one is stripped, unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models

    pieces = ["\u2581a", "b", "\u2581", "c\u2581", *(f"<0x{byte:02X}>" for byte in (*"é漢".encode(), 0x41, 0xFF, 0xC3)), "d"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ids = [i % len(vocab) for i in ids]
    state = TextState(tokenizer.decode, ())
    text = "".join(state.feed(i)[0] for i in ids) + state.flush()[0]
    assert text == state.text
    whole = tokenizer.decode(ids)
    if "\ufffd" not in whole:  # this decoder spoils a whole run of bytes for one bad one, good characters given before it included
        assert text == whole


def test_single_tokens_are_decoded_the_same_the_second_time():
    import tokenizers

    from engine.tokenizer import Tokenizer

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "bc": 1, "?": 2}, unk_token="?"))
    tokenizer = Tokenizer(words)
    for _ in range(2):
        assert [tokenizer.decode([i]) for i in range(3)] == ["a", "bc", "?"]
        assert tokenizer.decode([0, 1]) == words.decode([0, 1]) and tokenizer.decode([]) == ""
