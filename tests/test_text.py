"""CTC search against brute force, the chat layout of real and odd templates, and text that can be spoken."""

import doctest
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freeze_omni_lite import numerals, text
from freeze_omni_lite.errors import InputError, PartMissing
from freeze_omni_lite.text import (
    ChatLayout,
    CTCUnits,
    Segmenter,
    Speller,
    clean_for_speech,
    collapse,
    normalize,
    prefix_beam_search,
    viterbi_align,
)

# ---- normal forms and units ----


@pytest.mark.parametrize(
    "raw, expected",
    [
        ("It's 3 o'clock!", "it's three o'clock"),
        ("In 1969, 2.5% of $1,000.", "in nineteen sixty nine two point five percent of one thousand dollars"),
        ("the 21st, at 10:30", "the twenty first at ten thirty"),
        ("1990s and 50s", "nineteen nineties and fifties"),
        ("agent 007, -5°", "agent zero zero seven minus five degrees"),
        ("José’s  “Café”", "jose's cafe"),
        ("'quoted' words'", "quoted words"),
        ("well-known", "well known"),
        ("12345678901234567890", "one two three four five six seven eight nine zero " * 2),
        ("", ""),
        ("?!", ""),
        ("Привет, 你好", "привет 你好"),
    ],
)
def test_normalize(raw, expected):
    assert normalize(raw) == expected.strip()


@given(st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_normalize_is_idempotent_and_plain(raw):
    once = normalize(raw)
    assert normalize(once) == once
    assert not any(c.isdigit() and c.isascii() for c in once) and "  " not in once and once == once.strip()


def test_units_of_english():
    units = CTCUnits()
    assert len(units) == 28
    assert units.encode(" 'az") == [3, 28]  # a leading space and a lone apostrophe are no words
    assert units.encode("a b'c") == [3, 1, 4, 2, 5]
    assert units.decode(units.encode("It's five!")) == "it's five"
    assert CTCUnits.from_json(units.to_json()) == units


def test_units_of_another_alphabet():
    units = CTCUnits.from_texts(["да да", "нет"], max_units=4)
    assert len(units) == 4 and "д" in units.characters and "а" in units.characters
    assert units.decode(units.encode("Да!")) == "да"
    assert CTCUnits.from_json(units.to_json()) == units


# ---- CTC search ----


def test_collapse():
    assert collapse([0, 1, 1, 0, 1, 2, 2, 0]) == [1, 1, 2]
    assert collapse([]) == [] and collapse([0, 0]) == []


def readings(log_probs):
    """Log probability of every reading, summed over all of its paths."""
    sums = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        score = sum(float(log_probs[t, unit]) for t, unit in enumerate(path))
        sums.setdefault(tuple(collapse(path)), []).append(score)
    return {reading: math.log(sum(map(math.exp, scores))) for reading, scores in sums.items()}


@pytest.mark.parametrize("seed", range(4))
def test_prefix_beam_search_equals_brute_force(seed):
    torch.manual_seed(seed)
    log_probs = (2 * torch.randn(5, 3)).log_softmax(-1)
    expected = sorted(readings(log_probs).items(), key=lambda item: -item[1])
    found = prefix_beam_search(log_probs, beam=1000)
    assert [reading for reading, _ in found] == [reading for reading, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert prefix_beam_search(log_probs, beam=4)[0][0] == found[0][0]


def test_prefix_beam_search_sums_where_greedy_follows_one_path():
    log_probs = torch.tensor([[0.4, 0.35, 0.25], [0.4, 0.35, 0.25]]).log()
    assert collapse(log_probs.argmax(-1).tolist()) == []
    assert prefix_beam_search(log_probs, beam=8)[0][0] == (1,)


def test_prefix_beam_search_survives_certainty():
    log_probs = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]).log()
    assert prefix_beam_search(log_probs, beam=4)[0] == ((1, 1), pytest.approx(0.0))


@pytest.mark.parametrize("targets", [[1, 2], [1, 1], [2], [], [1, 2, 1]])
def test_viterbi_equals_brute_force(targets):
    log_probs = torch.randn(6, 3).log_softmax(-1)
    paths = [p for p in itertools.product(range(3), repeat=6) if collapse(p) == targets]
    best = max(paths, key=lambda path: sum(float(log_probs[t, unit]) for t, unit in enumerate(path)))
    assert viterbi_align(log_probs, targets) == list(best)


def test_viterbi_refuses_too_few_frames():
    assert viterbi_align(torch.randn(3, 2), [1, 1]) == [1, 0, 1]
    with pytest.raises(ValueError, match="too few frames"):
        viterbi_align(torch.randn(2, 2), [1, 1])


# ---- chat layout ----

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def small_tokenizer(template, special=("<|im_start|>", "<|im_end|>")):
    """One id a word, a line break or a special token."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Sequence, Split
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *special, "\n", "system", "user", "assistant", "Be", "brief", "."]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = Sequence([Split(" ", "removed"), Split(Regex(r"\n|\."), "isolated")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.chat_template = template
    return fast


def test_layout_defers_every_end_of_turn():
    tokenizer = small_tokenizer(CHATML)
    layout = ChatLayout.from_tokenizer(tokenizer, "Be brief.")
    read = tokenizer.convert_ids_to_tokens
    assert read(layout.system) == ["<|im_start|>", "system", "\n", "Be", "brief", "."]
    assert read(layout.user) == ["<|im_end|>", "\n", "<|im_start|>", "user", "\n"]
    assert read(layout.assistant) == ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    assert read(layout.end_of_turn) == ["<|im_end|>"]


@pytest.mark.parametrize(
    "template, words",
    [
        (None, "cannot be used"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        (
            "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}",
            "once and in order",
        ),
        ("{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}", "once and in order"),
        ("{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}", "differently"),
        ("{% for m in messages %}{{ 'x' + m['content'] }}{% endfor %}", "no end-of-turn token"),
    ],
)
def test_layout_refuses_templates_it_cannot_cut(template, words):
    with pytest.raises(InputError, match=words):
        ChatLayout.from_tokenizer(small_tokenizer(template), "Be brief.")


def test_layout_of_the_real_model():
    from transformers import AutoTokenizer

    from freeze_omni_lite import parts

    try:
        folder = parts.smollm2_folder()
    except PartMissing as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layout = ChatLayout.from_tokenizer(tokenizer, "Answer in one short sentence.")
    question, answer = (tokenizer.encode(words) for words in ("Where is Rome?", "In Italy."))
    ids = layout.system + layout.user + question + layout.assistant + answer + layout.user + question
    messages = [
        {"role": "system", "content": "Answer in one short sentence."},
        {"role": "user", "content": "Where is Rome?"},
        {"role": "assistant", "content": "In Italy."},
        {"role": "user", "content": "Where is Rome?"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids + layout.assistant) == whole
    assert ids + layout.assistant == tokenizer.encode(whole, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(layout.end_of_turn) == ["<|im_end|>"]


# ---- speakable text ----


def segments(*deltas, **options):
    segmenter = Segmenter(**options)
    return [s for delta in deltas for s in segmenter.feed(delta)] + segmenter.finish()


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("Paris is it. Yes! Sure?", ["Paris is it.", "Yes!", "Sure?"]),
        ("The capital of France, you see, is Paris. Oh.", ["The capital of France,", "you see, is Paris.", "Oh."]),
        ("Well, yes, that is so.", ["Well, yes, that is so."]),
        ("It has 2.5 million. Good.", ["It has 2.5 million.", "Good."]),
        ("It ended in 1945. Then came peace.", ["It ended in 1945.", "Then came peace."]),
        ("Take 5. 2 and 3. later", ["Take 5. 2 and 3. later"]),
        ("That is 4.", ["That is 4."]),
        ("https://a.b/c\nDone.", ["Done."]),
        ("1. Paris", ["1. Paris"]),
        ("Dr. Smith met J. K. Rowling, e.g. in the U.S. today. Fine.", None),
        ("So he said \"no.\" Then", ["So he said \"no.\"", "Then"]),
        ("One\n\nTwo\n", ["One", "Two"]),
        ("... ! \n ---", []),
        ("", []),
        ("你好。再见！", ["你好。", "再见！"]),
    ],
)  # fmt: skip
def test_segments(answer, expected):
    expected = [answer[: answer.index(" Fine")], "Fine."] if expected is None else expected
    assert segments(answer, first_words=4 if "Dr." not in answer else 20) == expected


def test_first_segment_comes_before_the_sentence_ends():
    segmenter = Segmenter()
    assert segmenter.feed("The capital of France,") == []
    assert segmenter.feed(" which") == ["The capital of France,"]
    assert segmenter.feed(" is a country, is") == []
    assert segmenter.finish() == ["which is a country, is"]
    assert segmenter.finish() == []


def test_very_long_segments_are_cut():
    assert [len(s.split()) for s in segments("word " * 70, max_words=30)] == [30, 30, 10]
    assert max(map(len, segments("a" * 1000, max_words=30))) == 300


@given(st.text(alphabet="ab1 .,:!\n?Dr", max_size=60), st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_segments_lose_nothing_and_do_not_depend_on_the_deltas(answer, size):
    whole = segments(answer)
    assert whole == segments(*[answer[i : i + size] for i in range(0, len(answer), size)])
    assert all(any(c.isalnum() for c in segment) for segment in whole)
    assert [c for s in whole for c in s if c.isalnum()] == [c for c in answer if c.isalnum()]


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("**Dr. Smith** has 2 cats", "Doctor Smith has two cats."),
        ("# Title\n\n- one\n- two", "Title, one, two."),
        ("Here are:\n* `a`\n* [b](https://x.y)", "Here are: a, b."),
        ("Paris (the capital) is big, e.g. very.", "Paris, the capital, is big, for example very."),
        ("In Rome (Italy).", "In Rome, Italy."),
        ("3 * 4 = 12", "three times four equals twelve."),
        ("He left at 10 a.m.", "He left at ten a m."),
        ("Wait…", "Wait."),
        ("It was – as ever — late.", "It was, as ever, late."),
        (
            "It cost $5.50, not $1 or £3 million.",
            "It cost five dollars and fifty cents, not one dollar or three million pounds.",
        ),
        ("From 1914-1918, at 3:05 pm", "From nineteen fourteen to nineteen eighteen, at three oh five p m."),
        ("1 kg at 20 °C, 5 km/h", "one kilogram at twenty degrees Celsius, five kilometers per hour."),
        ("3/4 of World War II, 24/7", "three quarters of World War two, twenty-four seven."),
        ("the 21st, 50% of the 1990s", "the twenty-first, fifty percent of the nineteen nineties."),
        ("Call 555-1234", "Call five five five, one two three four."),
        ("Hello,", "Hello."),
        ("Really?", "Really?"),
        ("😀 ok", "ok."),
        ("see https://a.b/c?d", "see."),
        (" ... ", ""),
        ("", ""),
        ("()", ""),
    ],
)
def test_clean_for_speech(answer, expected):
    assert clean_for_speech(answer) == expected


@given(st.text(alphabet="abZ19 .,:;!?-()[]*_#\n'\"`$%é…", max_size=50))
@settings(max_examples=300, deadline=None)
def test_clean_text_has_nothing_unspeakable(answer):
    spoken = clean_for_speech(answer)
    assert not set(spoken) & set('()[]*_#`\n$%0123456789"')
    assert spoken == "" or (spoken[-1] in ".!?" and any(c.isalnum() for c in spoken))
    assert "  " not in spoken


def test_doctests():
    assert doctest.testmod(text).failed == 0 and doctest.testmod(numerals).failed == 0


def test_tokens_are_spelled_with_their_space():
    class Words:
        def decode(self, ids):
            return {1: " Paris", 2: ".", 3: "É", 4: "木", 5: ""}[ids[0]]

    rows = Speller(Words())([1, 2, 3, 4, 5])
    read = ["".join(f"_{text.SPELLING}#"[i] for i in row if i) for row in rows.tolist()]
    assert read == [" paris", ".", "e", "#", "#"] and rows.shape == (5, 6)
    assert Speller(Words())([]).shape == (0, 0)
