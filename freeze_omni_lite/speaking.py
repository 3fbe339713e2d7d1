"""What the speaking side reaches on texts that no stage has met: one function a part of the measure.

Paper: table T2, "Speech Decoder". Behind `freeze-omni measure speaking`. Every part takes the system, the number of
items that a figure rests on, and the seed, and returns rows. Words are judged by a recogniser that we did not train;
every figure names it and its own error on the originals, and where it errs too often there, says "not measured".
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import answering, evaluation, metrics, scales, sentences, speech_tokens
from .answers import kept_answers, states_of
from .audio import (
    HOP_SAMPLES,
    SAMPLE_RATE_HZ,
    SPEECH_SAMPLE_RATE_HZ,
    SPEECH_TOKENS_PER_SECOND,
    level_db,
    resample,
)
from .measure import Progress
from .results import Row, row
from .samples import voiced_segments
from .speech_tokens import Line, Spoken
from .system import System
from .text import ChatLayout, clean_for_speech, token_ids
from .threads import thread_count
from .turns import text_turn
from .written import written_sentences

OWN_SEED = 900_000  # far from the seeds of training runs
BATCH = 16  # texts spoken at once
CALIBRATED_ON = (
    60  # originals on which the judge's own error is measured, and outputs that are heard without prefix
)
EARLY = 0.75  # of the original's length: what is shorter cannot have said all words
LOOKED_AT = 20  # outputs whose level, clipping and silence are measured
CLIPPED = 0.999  # of full scale
TIMED_TOKENS = 400


# ---- what is said, and how it sounds ---------------------------------------------------------------------------------


@dataclass
class Test:
    """Texts with their originals: codes of the codec, waveforms (samples,) at 24 kHz, and LLM states for the prefix."""

    spoken: list[Spoken]
    originals: list[Tensor]
    states: list[Tensor]

    @property
    def texts(self) -> list[str]:
        return [item.text for item in self.spoken]


def voiced(system: System, lines: Sequence[Line]) -> tuple[list[Spoken], list[Tensor]]:
    """Lines as the answer voice says them, with the codec's codes."""
    originals = speech_tokens.voiced(lines)
    codes = speech_tokens.tokenize(system.codec, originals)
    spoken = [
        Spoken(line.text, row, line.question, line.written) for line, row in zip(lines, codes, strict=True)
    ]
    return spoken, originals


def free_lines(items: int, seed: int, scale: str) -> list[Line]:
    """Test sentences: half fill templates that no training sentence uses, half the LLM wrote about unseen words."""
    writer = scales.load("speech_tokens", scale).writer
    written = written_sentences(writer, items // 2, "test")
    texts = sentences.sentences(items - len(written), OWN_SEED + seed, "test") + written
    return [Line(clean_for_speech(text)) for text in texts]


def answer_lines(system: System, items: int, seed: int, scale: str) -> list[Line]:
    """What the frozen LLM answers to test questions; equal answers once, so there may be fewer than asked for."""
    prompt = scales.load("encoder_prompt", scale).system_prompt
    asked = [question.text for question in sentences.questions(items, OWN_SEED + seed, "test")]
    limit = scales.load("speech_tokens", scale).answer_tokens
    written = kept_answers(system.llm, prompt, asked, limit)
    pairs = dict(zip(written, asked, strict=True))
    lines = [Line(clean_for_speech(text), question, written=text) for text, question in pairs.items()]
    return [line for line in lines if line.text]


def test_of(system: System, lines: Sequence[Line], scale: str) -> Test:
    """Originals and states: of the answers while they are written, of free sentences while the LLM repeats them."""
    layout = ChatLayout.from_tokenizer(
        system.llm.tokenizer, scales.load("encoder_prompt", scale).system_prompt
    )
    rows = []
    for line in lines:
        text = line.written or line.text
        asked = line.question or f"Repeat this: {text}"
        rows.append(
            (text_turn(layout, token_ids(system.llm.tokenizer, asked)), token_ids(system.llm.tokenizer, text))
        )
    return Test(*voiced(system, lines), states_of(system.llm, rows))


def scale_of(system: System) -> str:
    return system.stage("decoder_nar_ar").preset.scale


@torch.inference_mode()
def speak(
    system: System, test: Test, seed: int, with_prefix: bool = True
) -> tuple[list[list[int]], list[bool]]:
    """Every text sampled as in a dialogue: its codes, and whether it ended by itself; in order, batched by length."""
    top_k = system.stage("decoder_nar_ar").preset.top_k
    order = sorted(range(len(test.spoken)), key=lambda i: len(test.spoken[i].codes))
    found: dict[int, tuple[list[int], bool]] = {}
    progress = Progress("speaking", len(order))
    for first in range(0, len(order), BATCH):
        part = order[first : first + BATCH]
        states = [test.states[i] for i in part] if with_prefix else None
        codes, ended = evaluation.speak_answers(
            system, [test.spoken[i] for i in part], states, top_k, seed + first
        )
        found |= dict(zip(part, zip(codes, ended, strict=True), strict=True))
        progress.add(len(part))
    rows = [found[i] for i in range(len(order))]
    return [codes for codes, _ in rows], [ended for _, ended in rows]


@torch.inference_mode()
def sounds(system: System, rows: Sequence[Sequence[int] | Tensor]) -> list[Tensor]:
    """Codes -> 24 kHz waveforms (samples,); no codes: a tenth of a second of silence."""
    silence = torch.zeros(SPEECH_SAMPLE_RATE_HZ // 10)
    return [
        system.codec.decode(torch.as_tensor(codes, device=system.device)[None])[0].cpu()
        if len(codes)
        else silence
        for codes in rows
    ]


# ---- who listens -----------------------------------------------------------------------------------------------------


class Ear:
    """The best judge at hand, with its own error on some originals (24 kHz) of the very texts that it will judge."""

    def __init__(self, texts: Sequence[str], originals: Sequence[Tensor]) -> None:
        self.judge = metrics.Judge.best()
        heard = self.hear(originals)
        self.judge.own_error, self.own_cer = metrics.wer(texts, heard), 100 * metrics.cer(texts, heard)

    @classmethod
    def for_test(cls, test: Test) -> "Ear":
        step = -(-len(test.spoken) // CALIBRATED_ON)
        return cls(test.texts[::step], test.originals[::step])

    def hear(self, waveforms: Sequence[Tensor]) -> list[str]:
        progress, found = Progress("judge", len(waveforms)), []
        for waveform in waveforms:
            found.append(
                self.judge.transcribe(resample(waveform, SPEECH_SAMPLE_RATE_HZ, SAMPLE_RATE_HZ))
                if len(waveform)
                else ""
            )
            progress.add(1)
        return found

    def cer(self, texts: Sequence[str], waveforms: Sequence[Tensor]) -> float | str:
        """Character error rate in percent, or why this judge may not tell."""
        return self.judge.require() or 100 * metrics.cer(texts, self.hear(waveforms))

    @property
    def where(self) -> str:
        return f"judge {self.judge.name}, its own CER on originals {self.own_cer:.1f} %, WER {self.judge.own_error:.1%}"


# ---- the parts -------------------------------------------------------------------------------------------------------


def codec(system: System, items: int, seed: int) -> list[Row]:
    """Copies of unseen sentences through the codec: understood, pleasant, and with how many codes."""
    scale = system.stage("codec").preset.scale
    spoken, originals = voiced(system, free_lines(items, seed, scale))
    texts, copies = [item.text for item in spoken], sounds(system, [item.codes for item in spoken])
    ear = Ear(texts, originals)
    found = ear.cer(texts, copies)
    above = found if isinstance(found, str) else found - ear.own_cer
    size = system.codec.codebook.size
    used = 100 * metrics.perplexity(torch.cat([item.codes for item in spoken])) / size
    where = f"unseen sentences, {ear.where}"
    return [
        row("codec: CER above the originals'", above, len(texts), where, "points", "<= 1.5"),
        row(
            "codec: DNSMOS below the originals'",
            mos_lost(originals, copies),
            len(texts),
            "DNSMOS, overall",
            "",
            "<= 0.4",
        ),
        row("codec: codebook perplexity", used, len(texts), f"of {size} codes, the originals", "%", ">= 60"),
    ]


def mos_lost(originals: Sequence[Tensor], copies: Sequence[Tensor]) -> float | str:
    """How far copies (24 kHz) are rated below their originals, or why that is not known."""
    if reason := metrics.no_dnsmos():
        return reason
    true, made = (
        metrics.dnsmos([resample(clip, SPEECH_SAMPLE_RATE_HZ, SAMPLE_RATE_HZ) for clip in clips])
        for clips in (originals, copies)
    )
    return true - made


def answers(system: System, items: int, seed: int) -> list[Row]:
    """The frozen LLM's answers to test questions, spoken with and without the prefix."""
    scale = scale_of(system)
    test = test_of(system, answer_lines(system, items, seed, scale), scale)
    rows = spoken_rows(system, test, seed, "LLM answers", "answers to test questions", "<= 5")
    part = Test(test.spoken[:CALIBRATED_ON], test.originals[:CALIBRATED_ON], test.states[:CALIBRATED_ON])
    ear = Ear.for_test(part)
    codes, _ = speak(system, part, seed, with_prefix=False)
    without = ear.cer(part.texts, sounds(system, codes))
    return [*rows, row("LLM answers without prefix: CER", without, len(codes), f"of these, {ear.where}")]


def free(system: System, items: int, seed: int) -> list[Row]:
    """Free sentences as `freeze-omni speak` says them: the states are the LLM's while it repeats the text."""
    scale = scale_of(system)
    test = test_of(system, free_lines(items, seed, scale), scale)
    return spoken_rows(system, test, seed, "free sentences", "unseen sentences", "<= 12")


def spoken_rows(system: System, test: Test, seed: int, what: str, where: str, bar: str) -> list[Row]:
    """Understood, ended in time, and long enough."""
    ear, count = Ear.for_test(test), len(test.spoken)
    codes, ended = speak(system, test, seed)
    copies = sounds(system, [item.codes for item in test.spoken])
    long = [not stopped for stopped in ended]
    early = [len(row) < EARLY * len(item.codes) for row, item in zip(codes, test.spoken, strict=True)]
    where = f"{where}, prefix + pre-network, sampled"
    return [
        row(
            f"{what}: CER",
            ear.cer(test.texts, sounds(system, codes)),
            count,
            f"{where}; {ear.where}",
            bar=bar,
        ),
        row(f"{what}: CER of copies", ear.cer(test.texts, copies), count, f"true tokens; {ear.where}"),
        row(f"{what}: ran to the limit", percent(long), count, "no judge"),
        row(f"{what}: stopped early", percent(early), count, f"under {EARLY:.0%} of the original's length"),
        row(
            f"{what}: either",
            percent([a or b for a, b in zip(long, early, strict=True)]),
            count,
            "no judge",
            bar="<= 1",
        ),
    ]


def percent(happened: Sequence[bool]) -> float | str:
    none = f"{evaluation.NOT_MEASURED}: there was nothing to say"
    return 100 * sum(happened) / len(happened) if happened else none


def speed(system: System, items: int, seed: int) -> list[Row]:
    """One voice on this machine: tokens drawn, tokens decoded, tokens waited for."""
    text = token_ids(system.llm.tokenizer, clean_for_speech(sentences.sentences(1, seed, "test")[0]))
    decoder, generator = system.speech_decoder, torch.Generator().manual_seed(seed)
    characters = system.speller(text)[None].to(system.device)
    rates = []
    for _ in range(3):
        utterance = decoder.generate(
            system.llm.embed([text]), generator=generator, max_speech_tokens=100, characters=characters
        )
        begin = time.perf_counter()
        drawn = len(list(utterance))
        rates.append((drawn + 1) / (time.perf_counter() - begin))
    codes = torch.randint(system.codec.codebook.size, (1, TIMED_TOKENS), generator=generator)
    longest, stream = answering.CODEC_CHUNK_TOKENS[-1], system.codec.start()
    begin = time.perf_counter()
    with torch.inference_mode():
        for piece in codes.to(system.device).split(longest, dim=1):
            system.codec.step(piece, stream).cpu()
    factor = (time.perf_counter() - begin) * SPEECH_TOKENS_PER_SECOND / TIMED_TOKENS
    where = f"{system.device.type}, {thread_count()} threads"
    first = answering.CODEC_CHUNK_TOKENS[0]
    return [
        row("codec decoding: real-time factor", factor, TIMED_TOKENS, f"streamed, {where}", "", "<= 0.05"),
        row("speech tokens a second", max(rates), len(rates), f"one stream, best, {where}", "", ">= 200"),
        row("speech tokens before the first sound", first, 1, f"{HOP_SAMPLES} samples each", "", "<= 20"),
    ]


def sound(system: System, items: int, seed: int) -> list[Row]:
    """A look at some outputs: as loud as the originals, not clipped, no long silence inside."""
    scale = scale_of(system)
    test = test_of(system, free_lines(min(items, LOOKED_AT), seed, scale), scale)
    made = sounds(system, speak(system, test, seed)[0])
    gaps = [abs(level_db(a) - level_db(b)) for a, b in zip(made, test.originals, strict=True)]
    everything = torch.cat(made).abs()
    silent = [not voiced_segments(clip, SPEECH_SAMPLE_RATE_HZ) for clip in made]
    where, count = "free sentences", len(made)
    return [
        row("level: largest distance from the original", max(gaps), count, where, "dB"),
        row(
            "clipped samples", 100 * float((everything >= CLIPPED).float().mean()), count, where, "%", "<= 0"
        ),
        row("longest silence inside", max(map(longest_gap, made)), count, f"{where}, over 0.2 s", "s"),
        row("silent outputs", sum(silent), count, where, "outputs", "<= 0"),
    ]


def longest_gap(waveform: Tensor) -> float:
    """The longest stretch, in seconds, between two voiced ones; 0 if there is none."""
    between = itertools.pairwise(voiced_segments(waveform, SPEECH_SAMPLE_RATE_HZ))
    return max((later[0] - earlier[1] for earlier, later in between), default=0.0)
