"""An answer in small units: incremental text, segments with their states, first sound first, what was heard of it."""

import pytest
import tiny
import torch
from test_dialogue import RandomSystem

from freeze_omni_lite import answering
from freeze_omni_lite.answering import Answer, Placed, Script, Segment, Stopwatch, chunk_tokens, spoken_pieces
from freeze_omni_lite.audio import SPEECH_SAMPLE_RATE_HZ


@pytest.fixture(scope="module")
def system():
    return RandomSystem()


class Bytes:
    """A tokenizer whose tokens are bytes: characters come in halves. Counts the tokens it decodes."""

    decoded = 0

    def decode(self, ids, skip_special_tokens=True):
        self.decoded += len(ids)
        return bytes(ids).decode("utf-8", errors="replace")


def answer_of(system, text, max_tokens=12, seed=1):
    ids = system.llm.tokenizer.encode(text, add_special_tokens=False)
    opening = system.llm.embed([ids])
    generator = torch.Generator().manual_seed(seed)
    return Answer(system, system.llm.new_cache(), 1, opening, generator, Stopwatch(), max_tokens)


def scripted(answer, text):
    """Let the LLM write `text` whatever it would have written."""
    llm = answer.system.llm

    def tokens():
        answer.read_opening()
        for token in llm.tokenizer.encode(text, add_special_tokens=False):
            yield token, torch.zeros(llm.width)
            llm.step(token, answer.cache)

    answer.tokens = tokens()
    return answer


def finished(answer, play=False):
    """All that comes of an answer, unit by unit; play: what was given is played at once."""
    found = []
    with torch.inference_mode():
        while not answer.done:
            found.extend(answer.advance())
            answer.played = answer.emitted if play else 0
    return found


def of_kind(found, kind):
    return [data for name, data in found if name == kind]


@pytest.mark.parametrize("text", ["Paris.", "Ça va? 日本語 😀 done.", "a\n\nb  c"])
def test_text_token_by_token_is_the_text(text):
    script = Script(Bytes())
    ids = list(text.encode())
    deltas = [script.add(token, torch.zeros(1))[0] for token in ids]
    assert "".join(deltas) == script.text == text
    assert script.ends[-1] == len(text) and "\ufffd" not in script.text
    assert sum(map(bool, deltas)) == len(text), "each character appears with its last byte"


def test_a_token_costs_the_same_wherever_it_stands():
    def cost(tokens):
        script = Script(Bytes())
        for _ in range(tokens):
            script.add(97, torch.zeros(1))
        return script.tokenizer.decoded

    assert cost(400) - cost(300) == cost(200) - cost(100)


def test_words_are_joined_as_the_tokenizer_joins_them():
    tokenizer = tiny.llm().tokenizer
    ids = tokenizer.encode("hello . the capital of france is paris , yes . no ?", add_special_tokens=False)
    script = Script(tokenizer)
    for token in ids:
        script.add(token, torch.zeros(1))
    assert script.text == tokenizer.decode(ids)


def test_states_go_with_the_segment_they_predicted(system):
    ids = system.llm.tokenizer.encode(
        "hello . the capital of france is paris . yes", add_special_tokens=False
    )
    pairs = [(token, torch.full((4,), float(i))) for i, token in enumerate(ids)]
    pieces = list(spoken_pieces(system, iter(pairs)))
    segments = [p for p in pieces if not isinstance(p, str)]
    numbers = [float(state[0]) for segment in segments for state in segment.states]
    assert numbers == [float(i) for i in range(len(ids))]
    text = "".join(p for p in pieces if isinstance(p, str))
    assert text == system.llm.tokenizer.decode(ids)
    assert [text[s.begin : s.end].strip() for s in segments] == [s.text for s in segments]


def test_the_first_sound_comes_before_the_second_sentence_is_written(system):
    found = finished(
        scripted(answer_of(system, "hello"), "paris is red . rome is blue . yes hello no . you are")
    )
    kinds = [kind for kind, _ in found]
    assert kinds.index("audio") < [i for i, kind in enumerate(kinds) if kind == "segment"][1]
    assert kinds[-1] == "answered" and kinds.count("answered") == 1
    assert of_kind(found, "answered") == ["".join(of_kind(found, "text"))]
    assert len(of_kind(found, "segment")) == 4


def test_pieces_grow_with_the_stock():
    sizes = [chunk_tokens(int(seconds * SPEECH_SAMPLE_RATE_HZ)) for seconds in (0, 0.3, 0.6, 5)]
    assert sizes == [10, 12, 24, 40]


def test_how_fast_it_is_played_does_not_change_what_is_said(system):
    text = "paris is red . rome is blue ."
    slow, quick = (finished(scripted(answer_of(system, "hello"), text), play) for play in (False, True))
    slow, quick = (torch.cat(of_kind(found, "audio")) for found in (slow, quick))
    torch.testing.assert_close(slow, quick, atol=1e-5, rtol=0)


def test_one_unit_is_small(system, monkeypatch):
    drawn, work = [], answering.SegmentSpeech.draw
    monkeypatch.setattr(
        answering.SegmentSpeech, "draw", lambda self, n, watch: drawn.append(n) or work(self, n, watch)
    )
    finished(scripted(answer_of(system, "hello"), "paris is red ."))
    assert drawn and max(drawn) <= answering.UNIT_TOKENS


def test_heard_is_the_last_token_that_was_played(system):
    """Two segments of ten characters, five tokens each, one second of sound each."""
    answer = answer_of(system, "hello")
    answer.cache = system.llm.new_cache()
    system.llm.prefill(torch.zeros(1, answer.begin + 10, system.llm.width), answer.cache)
    answer.script.ids, answer.script.ends = list(range(10)), list(range(2, 21, 2))
    halves = [Segment("a" * 10, [], begin, begin + 10) for begin in (0, 10)]
    answer.spoken = [Placed(halves[0], 0, 24_000), Placed(halves[1], 24_000, 48_000)]
    answer.emitted = 48_000
    heard = []
    for played in (0, 4_799, 4_800, 12_000, 24_000, 30_000, 47_999):
        answer.played = played
        heard.append(answer.heard())
    assert heard == [0, 0, 1, 2, 5, 6, 9]
    answer.played, answer.done = 48_000, True
    assert answer.over and answer.heard() == 10


def test_stopwatch_keeps_the_first_mark():
    watch = Stopwatch()
    watch.mark("a")
    first = watch.marks["a"]
    watch.mark("a")
    assert watch.marks["a"] == first and watch.between_ms("a", "b") is None
