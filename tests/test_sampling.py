"""Text comes out whole: never half a character, never a piece of a stop string; filters are transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import build_byte_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from locret.config import SEEDS, Sampling
from locret.errors import ConfigError
from locret.sampling import NO_TOKEN, Sampler, TextStream, largest_of_pieces, likeliest, likeliest_or_none

TOKENIZER = build_byte_tokenizer()
TEXT = st.text(max_size=40)
# few letters, so that stop strings do occur, overlap each other and repeat inside themselves
NARROW = st.text(alphabet="ab\n é世🎉", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\n é世🎉", min_size=1, max_size=4), max_size=3)


def feed(text, stop=(), **options):
    """(pieces, stream) of a text given byte by byte, up to the stop."""
    stream = TextStream(TOKENIZER, tuple(stop), **options)
    pieces = []
    for token in TOKENIZER(text).input_ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.end())
    return pieces, stream


def cut(text, stops):
    """Read character by character; at the first one that completes a stop string, what came before it."""
    for i in range(len(text)):
        found = [text[: i + 1].find(stop) for stop in stops]
        if any(at >= 0 for at in found):
            return text[: min(at for at in found if at >= 0)], True
    return text, False


@settings(max_examples=200, deadline=None)
@given(TEXT)
@example("a\ufffd")
@example("\ufffdb\ufffd")
@example("é́ 👩‍👩‍👧 ก็")
def test_any_text_comes_out_unchanged(text):
    pieces, stream = feed(text)
    assert "".join(pieces) == stream.text == text


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_no_piece_holds_half_a_character(text):
    pieces, _ = feed(text)
    for i, token in enumerate(TOKENIZER(text).input_ids):
        del token
        assert "".join(pieces[: i + 1]) == text[: len("".join(pieces[: i + 1]))]


@settings(max_examples=300, deadline=None)
@given(NARROW, STOPS)
@example("aab", ["ab"])
@example("aaab", ["aab"])
@example("ababa", ["abab", "ba"])
@example("世世", ["世世"])
def test_text_ends_before_the_first_complete_stop_string(text, stops):
    pieces, stream = feed(text, stops)
    want, stopped = cut(text, stops)
    assert stream.text == "".join(pieces) == want
    assert stream.stopped == stopped


@settings(max_examples=200, deadline=None)
@given(NARROW, STOPS)
def test_no_piece_has_to_be_taken_back(text, stops):
    """What was given out after any token begins the final text, so no part of a stop string ever leaked."""
    want, _ = cut(text, stops)
    pieces, _ = feed(text, stops)
    out = ""
    for piece in pieces:
        out += piece
        assert want.startswith(out)


@settings(max_examples=200, deadline=None)
@given(NARROW, STOPS)
def test_white_space_at_the_start_is_dropped_on_request_only(text, stops):
    _, stream = feed(text, stops, strip_start=True)
    want, stopped = cut(text.lstrip(), stops)
    assert (stream.text, stream.stopped) == (want, stopped)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(3, 263), max_size=40))
def test_any_tokens_at_all_decode_to_what_the_tokenizer_says(ids):
    """Broken UTF-8 and special tokens included."""
    stream = TextStream(TOKENIZER)
    out = "".join([stream.push(token) for token in ids]) + stream.end()
    assert out == stream.text == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_stop_string_is_found_when_a_token_completes_it_and_goes_on():
    class Words:
        def decode(self, ids, skip_special_tokens=True):
            return "".join(["he", "llo wo", "rld"][i] for i in ids)

    stream = TextStream(Words(), ("lo w",))
    assert [stream.push(0), stream.push(1)] == ["he", "l"]
    assert stream.stopped
    assert stream.push(2) == stream.end() == ""


# ---------------------------------------------------------------------- choosing tokens


def sampler(rows=1, **options):
    return Sampler(Sampling(**options), rows, torch.device("cpu"))


IDS = torch.zeros(1, 1, dtype=torch.long)


def test_temperature_zero_is_the_likeliest_token():
    logits = torch.randn(3, 50)
    assert torch.equal(sampler(3)(IDS.expand(3, 1), logits), logits.argmax(-1))


@pytest.mark.parametrize("pieces", [1, 2, 16, 50])
def test_the_likeliest_token_by_way_of_pieces_is_the_first_of_the_largest(pieces):
    logits = torch.randint(0, 6, (64, 800)).to(torch.bfloat16)  # many equal ones
    logits[3] = 0.0
    most, at = largest_of_pieces(logits, pieces)
    assert torch.equal(at, logits.argmax(-1))
    assert torch.equal(most, logits.amax(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [8192, 128_256, 32_003])
def test_the_likeliest_token_on_a_gpu(vocab):
    logits = torch.randint(0, 1000, (5, vocab), device="cuda").to(torch.bfloat16)
    assert torch.equal(likeliest(logits).cpu(), logits.float().cpu().argmax(-1))


NAN, INF = float("nan"), float("inf")
BAD = [[NAN], [INF], [-INF] * 800, [NAN, INF, -INF]]  # numbers that a row of logits begins with


def spoilt(device="cpu"):
    """Logits whose first rows are BAD; a number of each good row is ruled out."""
    logits = torch.randn(6, 800, generator=torch.Generator().manual_seed(0))
    for row, numbers in zip(logits, BAD, strict=False):
        row[: len(numbers)] = torch.tensor(numbers)
    logits[4:, 7] = -INF
    return logits.to(device)


@pytest.mark.parametrize("options", [
    {}, dict(repetition_penalty=1.3), dict(temperature=1.0, seed=1),
    dict(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3, seed=1),
], ids=str)  # fmt: skip
def test_a_row_that_is_nan_or_infinite_has_no_token_and_its_neighbours_have_theirs(options):
    """NaN once was the likeliest token, and drawing from it an error of torch's, on a GPU the end of the process."""
    logits, ids = spoilt(), torch.arange(12).view(6, 2)
    want = sampler(2, **options)(ids[4:], logits[4:])
    assert sampler(6, **options)(ids, logits).tolist() == [NO_TOKEN] * 4 + want.tolist()
    assert (want >= 0).all()


@pytest.mark.gpu
def test_rows_without_a_token_on_a_gpu():
    """In pieces, and drawn: the device lives on."""
    logits = spoilt("cuda")
    assert likeliest_or_none(logits).tolist() == [NO_TOKEN] * 4 + logits[4:].argmax(-1).tolist()
    drawn = Sampler(Sampling(temperature=1.0, seed=1), 6, torch.device("cuda"))(logits, logits)
    assert [token == NO_TOKEN for token in drawn.tolist()] == [True] * 4 + [False] * 2


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others():
    logits = torch.randn(40, 1, 200)

    def draw(seed):
        choose = sampler(temperature=1.0, seed=seed)
        return [int(choose(IDS, row)) for row in logits]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_a_row_draws_in_a_batch_what_it_draws_alone():
    logits = torch.randn(20, 3, 100)
    together, alone = sampler(3, temperature=0.8, seed=1), [sampler(temperature=0.8, seed=1) for _ in range(3)]
    for step in logits:
        want = [int(alone[i](IDS, step[i : i + 1])) for i in range(3)]
        assert together(IDS.expand(3, 1), step).tolist() == want


@pytest.mark.parametrize(("options", "possible"), [
    (dict(top_k=2), {0, 1}), (dict(top_p=0.6), {0, 1}), (dict(top_p=0.4), {0}), (dict(min_p=0.3), {0, 1, 2}),
    (dict(), {0, 1, 2, 3}),
], ids=str)  # fmt: skip
def test_filters_leave_the_tokens_that_their_definition_leaves(options, possible):
    logits = torch.tensor([[0.45, 0.3, 0.2, 0.05]]).log()
    choose = sampler(temperature=1.0, seed=0, **options)
    assert {int(choose(IDS, logits)) for _ in range(300)} == possible


def test_a_repetition_penalty_moves_past_tokens_that_were_there():
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    assert sampler(repetition_penalty=1.5)(torch.tensor([[0]]), logits).tolist() == [1]
    assert sampler()(torch.tensor([[0]]), logits).tolist() == [0]


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7), dict(temperature=0.7, seed=5)], ids=str)
def test_drawing_leaves_the_programs_own_random_numbers_alone(options):
    """`torch.seed()` reseeds the global generator: with it, a greedy answer made the caller's next randn random."""
    torch.manual_seed(0)
    want = torch.randn(3)
    torch.manual_seed(0)
    sampler(**options)(IDS, torch.randn(1, 9, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.randn(3), want)


@pytest.mark.parametrize(("options", "message"), [
    (dict(temperature=-1), "temperature is -1"), (dict(top_p=0), "top_p is 0"), (dict(min_p=1), "min_p is 1"),
    (dict(max_new_tokens=0), "max_new_tokens is 0"), (dict(top_k=-1), "top_k is -1"),
    (dict(repetition_penalty=0), "repetition_penalty is 0"), (dict(stop=("",)), "empty stop string"),
    (dict(temperature=float("nan")), "temperature is nan"),
    (dict(max_new_tokens=7.5), "max_new_tokens is 7.5; it must be a whole number"),
    (dict(max_new_tokens=None), "max_new_tokens is None"), (dict(max_new_tokens=True), "max_new_tokens is True"),
    (dict(temperature="0.5"), "temperature is '0.5'; it must be a number"), (dict(temperature=None), "must be"),
    (dict(top_p=True), "top_p is True"), (dict(min_p=10**400), "it must be a number"),
    (dict(top_k=torch.tensor(2.5)), "top_k is tensor"),
    (dict(top_k=2.5), "top_k is 2.5"), (dict(seed="x"), "seed is 'x'; it must be a whole number"),
    (dict(seed=1.5), "seed is 1.5"), (dict(seed=2**64), r"seed is 18\d+; it must be from -2\^63 to 2\^64 - 1"),
    (dict(seed=-(2**63) - 1), "seed is -9"), (dict(repetition_penalty=float("inf")), "repetition_penalty is inf"),
    (dict(stop=None), "stop is None; it must be a string or several"), (dict(stop=[3]), r"stop is \[3\]"),
], ids=str)  # fmt: skip
def test_impossible_options_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


def test_numbers_of_numpy_are_numbers_and_the_range_of_seeds_is_torchs():
    got = Sampling(max_new_tokens=np.int64(4), top_k=np.int32(2), temperature=np.float32(0.5), seed=np.int64(3))
    assert got == Sampling(max_new_tokens=4, top_k=2, temperature=0.5, seed=3)
    assert [type(x) for x in (got.max_new_tokens, got.top_k, got.temperature, got.seed)] == [int, int, float, int]
    for seed in SEEDS:
        sampler(seed=seed)
        with pytest.raises((RuntimeError, ValueError, OverflowError)):
            torch.Generator().manual_seed(seed + (1 if seed > 0 else -1))


def test_whole_numbers_will_do_as_temperature_and_penalty():
    """transformers' filters take floats only."""
    assert sampler(temperature=2, repetition_penalty=2, seed=0)(IDS, torch.zeros(1, 9)).shape == (1,)


def test_one_stop_string_may_be_given_bare():
    assert Sampling(stop="END").stop == ("END",)
