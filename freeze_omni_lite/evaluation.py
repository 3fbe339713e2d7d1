"""The paper's four tables over a System and its items, as plain rows: what is heard, spoken, known, and how fast.

Paper: "Results" (T1 speech recognition, T2 output speech, T3 spoken question answering, T4 latency). Notebook 09.

A row is a dict of column -> text or number. What could not be measured is the text "not measured: <reason>", never a
number that means nothing.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from . import metrics, verbs
from .attention import lengths_mask
from .audio import LLM_VECTORS_PER_SECOND, SAMPLE_RATE_HZ, SPEECH_SAMPLE_RATE_HZ, pad_to_chunks, resample
from .dialogue import Session, finish
from .duplex import DialogueState
from .errors import InputError
from .frozen_llm import FrozenLLM, predicting_states, until
from .metrics import Judge
from .samples import Utterance, load_audio
from .sentences import Question
from .speech_tokens import Spoken, pad_grids, pad_rows
from .system import System
from .text import ChatLayout, clean_for_speech, token_ids
from .turns import Row, text_turn, transcript_limit, transcript_row

NOT_MEASURED = "not measured"
THROUGH = {"ctc": "CTC (stage 1)", "llm": "LLM (stage 2)"}
PARTS = {
    "end_of_speech_to_decision": "end of speech to decision",
    "decision_to_first_text": "decision to first text",
    "first_text_to_first_token": "first text to first speech token",
    "first_token_to_first_pcm": "first speech token to first sound",
    "total": "total, from the decision",
}
TableRow = dict[str, Any]


# ---- T1: what is heard ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transcribed:
    """One utterance as it was said, as CTC read it and as the LLM wrote it."""

    text: str
    ctc: str
    llm: str


@torch.inference_mode()
def transcribed(system: System, utterances: Sequence[Utterance]) -> list[Transcribed]:
    """Every utterance, through stage 1 and through stage 2; the LLM writes all of them as one batch."""
    waveforms = [load_audio(utterance) for utterance in utterances]
    read = [verbs.transcribe_ctc(system, waveform) for waveform in waveforms]
    task, layout = system.task_embedding(1)[0], system.transcript_layout
    rows = [transcript_row(system.llm, layout, task, vectors_of(system, waveform)) for waveform in waveforms]
    limits = [transcript_limit(row.speech[0][1] / LLM_VECTORS_PER_SECOND) for row in rows]
    wrote = write_together(system.llm, rows, limits)
    return [Transcribed(u.text, ctc, llm) for u, ctc, llm in zip(utterances, read, wrote, strict=True)]


def vectors_of(system: System, waveform: Tensor) -> Tensor:
    """A recording (samples,) at 16 kHz -> what the LLM hears of it (vectors, llm_width)."""
    mels = system.features(pad_to_chunks(waveform)[None].to(system.device))
    vectors, _ = system.adapter(*system.encoder(mels))
    return vectors[0]


def write_together(llm: FrozenLLM, rows: Sequence[Row], limits: Sequence[int], batch: int = 16) -> list[str]:
    """What the LLM writes, greedily, after each row, `limits` tokens at most; batched with padding on the left."""
    found: list[str] = []
    for first in range(0, len(rows), batch):
        part, most = rows[first : first + batch], limits[first : first + batch]
        vectors = [torch.cat(row.vectors).flip(0) for row in part]
        seen = lengths_mask(torch.tensor([len(row) for row in part]), max(map(len, part))).flip(1)
        out = llm.model.generate(
            inputs_embeds=pad_sequence(vectors, batch_first=True).flip(1),
            attention_mask=seen.long().to(llm.device),
            max_new_tokens=max(most),
            do_sample=False,
            eos_token_id=sorted(llm.end_tokens),
            pad_token_id=min(llm.end_tokens),
        )
        written = [
            list(until(ids[:limit], llm.end_tokens)) for ids, limit in zip(out.tolist(), most, strict=True)
        ]
        found += [llm.tokenizer.decode(ids).strip() for ids in written]
    return found


def transcription_rows(speech: str, items: Sequence[Transcribed]) -> list[TableRow]:
    """Character and word error rates of one kind of speech, one row for each way to read it."""
    texts = [item.text for item in items]
    return [
        {
            "speech": speech,
            "read by": name,
            "CER %": 100 * metrics.cer(texts, [getattr(item, through) for item in items]),
            "WER %": 100 * metrics.wer(texts, [getattr(item, through) for item in items]),
            "items": len(items),
        }
        for through, name in THROUGH.items()
    ]


def transcription_table(system: System, sets: Mapping[str, Sequence[Utterance]]) -> list[TableRow]:
    """T1. sets: what kind of speech -> its utterances."""
    return [
        row for name, items in sets.items() for row in transcription_rows(name, transcribed(system, items))
    ]


# ---- T2: what is spoken ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def states_of(llm: FrozenLLM, layout: ChatLayout, spoken: Spoken) -> Tensor:
    """The LLM's hidden states (tokens, llm_width) of an answer, while it answers its question by text.

    Raises InputError if `spoken` is no answer of the LLM.
    """
    if not spoken.question:
        raise InputError(f"{spoken.text!r} answers no question: give answers of the language model.")
    before = text_turn(layout, token_ids(llm.tokenizer, spoken.question))
    answer = token_ids(llm.tokenizer, spoken.written)
    hidden = llm.prefill(llm.embed([before + answer]), llm.new_cache())[0]
    return predicting_states(hidden, len(before), len(answer))


@torch.inference_mode()
def speak_answers(
    system: System, answers: Sequence[Spoken], states: Sequence[Tensor] | None, top_k: int, seed: int
) -> tuple[list[list[int]], list[bool]]:
    """Speech tokens of every answer, spoken as one batch, and whether it ended by itself.

    states   hidden states of each answer for the prefix (decoder stage 3); None: no prefix (decoder stage 2)
    """
    tokenizer, device = system.llm.tokenizer, system.device
    texts = [token_ids(tokenizer, clean_for_speech(item.text)) for item in answers]
    ids, lengths = pad_rows([torch.tensor(row) for row in texts])
    characters = pad_grids([system.speller(row) for row in texts]).to(device)
    prefix = None
    if states is not None:
        hidden, hidden_lengths = pad_rows(states)
        prefix = system.prefix_decoder(hidden.to(device), hidden_lengths.to(device))
    generator = torch.Generator().manual_seed(seed)
    vectors = system.llm.embed(ids)
    return system.speech_decoder.generate_batch(
        vectors, lengths.to(device), prefix, characters, top_k=top_k, generator=generator
    )


@torch.inference_mode()
def sound(system: System, codes: Sequence[int] | Tensor) -> Tensor:
    """Speech tokens (tokens,) -> 16 kHz waveform (samples,) for a judge; none: a tenth of a second of silence."""
    if not len(codes):
        return torch.zeros(SAMPLE_RATE_HZ // 10)
    tokens = torch.as_tensor(codes, device=system.device)[None]
    return resample(system.codec.decode(tokens)[0].cpu(), SPEECH_SAMPLE_RATE_HZ, SAMPLE_RATE_HZ)


def judged(judge: Judge, waveforms: Sequence[Tensor], texts: Sequence[str]) -> float | str:
    """Word error rate in percent, or why this judge may not tell."""
    return judge.require() or 100 * judge.wer(waveforms, texts)


def speaking_table(
    system: System,
    answers: Sequence[Spoken],
    judge: Judge,
    top_ks: Sequence[int] = (1, 2, 3, 4, 5),
    seed: int = 1,
) -> list[TableRow]:
    """T2: the same answers of the LLM, spoken without and with the prefix, by top-k, and the codec's own limit.

    judge   calibrated on the original recordings; where it may not decide, the reason stands in place of the figure
    "ended" is the share that stopped by itself, "length" the tokens spoken over those of the recordings: no judge.
    """
    texts, limit = [item.text for item in answers], judge.require()
    states = [states_of(system.llm, system.layout, item) for item in answers]
    original = sum(len(item.codes) for item in answers)
    rows = []
    for decoder, prefix in {"without prefix (stage 2)": None, "with prefix (stage 3)": states}.items():
        for top_k in top_ks:
            codes, ended = speak_answers(system, answers, prefix, top_k, seed)
            error = limit or judged(judge, [sound(system, row) for row in codes], texts)
            row = {"decoder": decoder, "top_k": top_k, "WER %": error}
            row |= {"ended %": 100 * sum(ended) / len(ended), "length": sum(map(len, codes)) / original}
            rows.append(row)
    copies = limit or judged(judge, [sound(system, item.codes) for item in answers], texts)
    whole = f"{NOT_MEASURED}: a copy is as long as its recording"
    return [
        *rows,
        {"decoder": "recording, through the codec", "top_k": "", "WER %": copies}
        | dict.fromkeys(("ended %", "length"), whole),
    ]


# ---- T3: what is known ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One question and the frozen LLM's answers to it, asked by text and by speech."""

    question: str
    accepted: tuple[str, ...]
    by_text: str
    by_speech: str

    def accepts(self, answer: str) -> bool:
        return Question(self.question, "", "", self.accepted).accepts(answer)


def spoken_question(system: System, waveform: Tensor) -> Row:
    """A whole recorded question (samples,) at 16 kHz as a row that is open for the answer.

    The layout of `verbs.ask`, with prompt embedding and adapter vectors where the words stood.
    """
    layout = system.layout
    row = Row(system.llm).tokens(layout.system + layout.user).trained(system.prompt_embedding(1)[0])
    return row.spoken(vectors_of(system, waveform)).tokens(layout.assistant)


@torch.inference_mode()
def asked(system: System, questions: Sequence[Utterance]) -> list[Asked]:
    """Every question by text and by speech, whatever the dialogue states say, each as one batch.

    Raises InputError for a question without accepted answers.
    """
    for question in questions:
        if not question.answers:
            raise InputError(f"{question.text!r} has no accepted answers: give questions that can be scored.")
    llm, limit = system.llm, system.stage("encoder_prompt").preset.answer_tokens
    prompts = [text_turn(system.layout, token_ids(llm.tokenizer, q.text)) for q in questions]
    by_text = [llm.tokenizer.decode(ids).strip() for ids in llm.answers(prompts, limit)]
    rows = [spoken_question(system, load_audio(q)) for q in questions]
    by_speech = write_together(llm, rows, [limit] * len(rows))
    return [Asked(q.text, q.answers, *pair) for q, *pair in zip(questions, by_text, by_speech, strict=True)]


def question_rows(items: Sequence[Asked]) -> list[TableRow]:
    """Accuracy by text, by speech, and how often both answers are word for word the same."""
    accuracy = {
        "text": [item.accepts(item.by_text) for item in items],
        "speech": [item.accepts(item.by_speech) for item in items],
    }
    same = 100 * sum(item.by_text == item.by_speech for item in items) / len(items)
    return [
        {
            "asked by": way,
            "accuracy %": 100 * sum(right) / len(items),
            "same answer as by text %": 100.0 if way == "text" else same,
            "items": len(items),
        }
        for way, right in accuracy.items()
    ]


def question_table(system: System, questions: Sequence[Utterance]) -> list[TableRow]:
    """T3. questions: with accepted answers."""
    return question_rows(asked(system, questions))


# ---- T4: how fast ---------------------------------------------------------------------------------------------------


def latency_rows(traces: Sequence[Mapping[str, Any]]) -> list[TableRow]:
    """Mean, 50 % and 90 % of every part, ms, over the traces of `verbs.talk` that reached it."""
    rows = []
    for part, name in PARTS.items():
        found = metrics.latency_summary(trace["latency_ms"][part] for trace in traces)
        reason = f"{NOT_MEASURED}: none of {len(traces)} turns got there"
        values = {key: reason if found[key] is None else found[key] for key in ("mean", "p50", "p90")}
        rows.append(
            {
                "part": name,
                "mean ms": values["mean"],
                "50 %": values["p50"],
                "90 %": values["p90"],
                "turns": found["count"],
            }
        )
    return rows


class Patient(Session):
    """Hears a recording to its end, whatever the state head says: for the latency of answers that it would refuse."""

    def _listen(self, mels: Tensor) -> tuple[DialogueState, Tensor]:
        return DialogueState.KEEP_LISTENING, super()._listen(mels)[1]


@torch.inference_mode()
def talk_to_the_end(system: System, waveform: Tensor, seed: int = 1) -> TableRow:
    """The trace of one spoken turn that is answered at the end of the recording; "no_speech" if nothing was heard."""
    started = time.perf_counter()
    session = Patient(system, seed, timeout_ms=None)
    events = session.feed(pad_to_chunks(waveform))
    if session.turn is not None:
        events += session.close(DialogueState.TAKE_TURN)
    events += finish(session)
    return verbs.trace(session, events, True, True, time.perf_counter() - started)


def latency_traces(system: System, questions: Sequence[Utterance], seed: int = 1) -> list[TableRow]:
    """A trace of `verbs.talk` for every question, and one forced to answer for every question it did not answer."""
    traces = [verbs.talk(system, load_audio(q), seed=seed).trace for q in questions]
    silent = [q for q, trace in zip(questions, traces, strict=True) if trace["outcome"] != "answered"]
    return traces + [talk_to_the_end(system, load_audio(q), seed) for q in silent]


def latency_table(system: System, questions: Sequence[Utterance], seed: int = 1) -> list[TableRow]:
    """T4. questions: spoken, answered aloud one by one. Only decisions that were not forced count as decisions."""
    return latency_rows(latency_traces(system, questions, seed))


# ---- as text --------------------------------------------------------------------------------------------------------


def is_measured(cell: Any) -> bool:
    """Whether a cell is a finite number."""
    return isinstance(cell, (int, float)) and math.isfinite(cell)


def is_honest(cell: Any) -> bool:
    """Whether a cell is a finite number, a name, or "not measured" with a reason."""
    if isinstance(cell, str):
        return not cell.startswith(NOT_MEASURED) or len(cell) > len(NOT_MEASURED) + 2
    return is_measured(cell)


def as_text(rows: Sequence[TableRow], title: str = "") -> str:
    """Aligned columns; reasons of what was not measured stand below, numbered.

    Raises InputError if there are no rows.
    """
    if not rows:
        raise InputError("a table needs at least one row: measure at least one item.")
    reasons = list(
        dict.fromkeys(
            c for row in rows for c in row.values() if isinstance(c, str) and c.startswith(NOT_MEASURED)
        )
    )
    head = list(rows[0])
    cells = [head] + [[cell_text(row[name], reasons) for name in head] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    notes = [f"[{number}] {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join([*([title] if title else []), *lines, *notes])


def cell_text(cell: Any, reasons: Sequence[str]) -> str:
    """Three figures of a number, names as they are, reasons by number.

    >>> cell_text(12.345, []), cell_text("not measured: no ear", ["not measured: no ear"])
    ('12.3', '- [1]')
    """
    if cell in reasons:
        return f"- [{reasons.index(cell) + 1}]"
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.3g}" if abs(cell) < 100 else f"{cell:.0f}"
