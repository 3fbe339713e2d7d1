"""What the command line can ask of a System, one function a verb: talk, transcribe, ask, speak, code."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from .answering import Segment, speak_segment, spoken_pieces
from .audio import (
    CHUNK_MS,
    CHUNK_SAMPLES,
    LLM_VECTORS_PER_SECOND,
    SPEECH_SAMPLE_RATE_HZ,
    exact,
    pad_to_chunks,
)
from .dialogue import Event, Session, finish
from .duplex import DialogueState
from .errors import InputError
from .frozen_llm import predicting_states
from .system import System
from .text import collapse
from .turns import text_turn, transcript_limit, transcript_row, written

SILENCE_AFTER_FILE_CHUNKS = -(-2000 // CHUNK_MS)  # at least 2 s of silence after the end of a recording


@dataclass
class Turn:
    """What `talk` gives back: the answer's audio (samples,) at 24 kHz, empty if there is none, and the trace."""

    audio: Tensor
    trace: dict[str, Any]


@torch.inference_mode()
def talk(system: System, waveform: Tensor, *, seed: int = 1, end_of_file: str = "force") -> Turn:
    """One spoken turn, streamed chunk by chunk: waveform (samples,) at 16 kHz -> answer and trace.

    2 s of silence follow the recording. If the state is still 0 then, `end_of_file` "force" answers all the same
    (the trace says forced), "wait" does not.
    """
    started = time.perf_counter()
    session = Session(system, seed, timeout_ms=None)
    events: list[Event] = []
    silence = torch.zeros(SILENCE_AFTER_FILE_CHUNKS * CHUNK_SAMPLES)
    for chunk in torch.cat([pad_to_chunks(waveform), silence]).split(CHUNK_SAMPLES):
        events.extend(session.feed(chunk))
        if events[-1].kind in ("closed", "ignored"):
            break
    undecided = session.turn is not None
    forced = undecided and end_of_file == "force"
    if undecided:
        events.extend(session.close(DialogueState.TAKE_TURN if forced else DialogueState.NO_RESPONSE))
    events.extend(finish(session))
    return Turn(
        joined(events, "audio"), trace(session, events, forced, undecided, time.perf_counter() - started)
    )


def joined(events: list[Event], kind: str) -> Tensor:
    """All pieces of audio among the events, end to end."""
    return torch.cat([torch.zeros(0)] + [event.data for event in events if event.kind == kind])


def trace(
    session: Session, events: list[Event], forced: bool, undecided: bool, seconds: float
) -> dict[str, Any]:
    """The record of one turn. latency_ms.total runs from the decision to the first audio, as in the paper's table."""
    states = [event.data for event in events if event.kind == "state"]
    closed = next((event.data for event in events if event.kind == "closed"), None)
    answered = closed is not None and closed["state"] == DialogueState.TAKE_TURN
    audio_seconds = joined(events, "audio").shape[0] / SPEECH_SAMPLE_RATE_HZ
    between = session.stopwatch.between_ms
    return {
        "outcome": "answered" if answered else "ignored" if closed else "no_speech",
        "forced": forced,
        "states": states,
        "transcript": closed["transcript"] if closed else "",
        "text": "".join(event.data for event in events if event.kind == "text"),
        "latency_ms": {
            "end_of_speech_to_decision": None if undecided or not closed else round(session.decision_ms, 1),
            "decision_to_first_text": between("decision", "first_text"),
            "first_text_to_first_token": between("first_text", "first_token"),
            "first_token_to_first_pcm": between("first_token", "first_pcm"),
            "total": between("decision", "first_pcm"),
        },
        "seconds": {
            "heard": len(states) * CHUNK_MS / 1000,
            "spoken": round(audio_seconds, 2),
            "wall": round(seconds, 2),
        },
        "rtf": round(seconds / (len(states) * CHUNK_MS / 1000 + audio_seconds), 3),
        "stages": session.system.provenance(),
        "judge": None,
        "versions": {name: version(name) for name in ("freeze-omni-lite", "torch", "transformers")},
    }


@torch.inference_mode()
def transcribe(system: System, waveform: Tensor, through: str = "llm") -> str:
    """Waveform (samples,) at 16 kHz -> text, by stage 2 ("llm") or stage 1 ("ctc", any length, flat memory)."""
    return transcribe_ctc(system, waveform) if through == "ctc" else transcribe_llm(system, waveform)


def transcribe_ctc(system: System, waveform: Tensor) -> str:
    """Chunk by chunk through the stage 1 encoder and its character head."""
    mel_state, encoder_state, units = system.features.start(), system.stage1_encoder.start(), []
    for chunk in pad_to_chunks(waveform).split(CHUNK_SAMPLES):
        mels = system.features.step(chunk[None].to(system.device), mel_state)
        frames = system.stage1_encoder.step(mels, encoder_state)
        units.extend(system.stage1_ctc_head(frames)[0].argmax(-1).tolist())
    return system.units.decode(collapse(units))


def transcribe_llm(system: System, waveform: Tensor) -> str:
    """Encoder and adapter feed the frozen LLM, the task embeddings ask it for the transcript."""
    mels = system.features(pad_to_chunks(waveform)[None].to(system.device))
    frames, lengths = system.encoder(mels)
    vectors, _ = system.adapter(frames, lengths)
    row = transcript_row(system.llm, system.transcript_layout, system.task_embedding(1)[0], vectors[0])
    return written(row, transcript_limit(len(vectors[0]) / LLM_VECTORS_PER_SECOND))


@torch.inference_mode()
def ask(system: System, question: str) -> str:
    """The same frozen LLM and chat layout by text: the baseline of the spoken path. Raises InputError if empty."""
    if not question.strip():
        raise InputError("the question is empty: write at least one word.")
    llm, layout, cache = system.llm, system.layout, system.llm.new_cache()
    ids = llm.tokenizer.encode(question, add_special_tokens=False)
    hidden = llm.prefill(llm.embed([text_turn(layout, ids)]), cache)[:, -1:]
    limit = system.stage("encoder_prompt").preset.answer_tokens
    return llm.tokenizer.decode([token for token, _ in llm.generate(hidden, cache, limit)]).strip()


@torch.inference_mode()
def speak(system: System, text: str, seed: int = 1) -> tuple[Tensor, dict[str, Any]]:
    """Text -> LLM states -> speech decoder -> codec: 24 kHz audio (samples,) and what was spoken.

    The states are those of the LLM repeating the text. Raises InputError if there is nothing to say.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces = [piece for piece in spoken_pieces(system, repeated(system, text)) if isinstance(piece, Segment)]
    if not pieces:
        raise InputError(f"there is nothing to say in {text!r}: write at least one word.")
    audio = [piece for segment in pieces for piece in speak_segment(system, segment, generator)]
    waveform = torch.cat(audio)
    return waveform, {
        "segments": [p.text for p in pieces],
        "seconds": waveform.shape[0] / SPEECH_SAMPLE_RATE_HZ,
    }


def repeated(system: System, text: str) -> Iterator[tuple[int, Tensor]]:
    """The tokens of `text` and the states that predict them when the LLM was asked to repeat it."""
    llm, layout = system.llm, system.layout
    ids = llm.tokenizer.encode(text.strip(), add_special_tokens=False)
    request = llm.tokenizer.encode("Repeat this: ", add_special_tokens=False)
    before = text_turn(layout, request + ids)
    hidden = llm.prefill(llm.embed([before + ids]), llm.new_cache())[0]
    yield from zip(ids, predicting_states(hidden, len(before), len(ids)), strict=True)


@torch.inference_mode()
def code(system: System, waveform: Tensor) -> tuple[Tensor, Tensor, float]:
    """24 kHz waveform (samples,) -> what the codec makes of it, its speech tokens (tokens,), bits per second.

    Long recordings are encoded in pieces of ten seconds and decoded as a stream, so memory stays flat.
    """
    codec, stream = system.codec, system.codec.start()
    piece_samples = 10 * SPEECH_SAMPLE_RATE_HZ
    exact(piece_samples, codec.hop_samples)
    codes, audio = [], []
    for piece in waveform.split(piece_samples):
        codes.append(codec.encode(piece[None].to(system.device)))
        audio.append(codec.step(codes[-1], stream))
    audio.append(codec.finish(stream))
    tokens = torch.cat(codes, dim=1)[0]
    return torch.cat(audio, dim=1)[0, : len(waveform)].cpu(), tokens.cpu(), codec.bits_per_second
