"""Two synthesisers behind one interface: espeak-ng (users, many voices) and hibari (answers, one voice).

Paper: its dialogues are voiced by a synthesiser too ("Datasets"). Used by: samples.py.

Both run in worker processes of their own: espeak-ng keeps global state, is not thread-safe and carries a
GPL-3 licence, so it is never loaded beside the library. A worker is `python -m freeze_omni_lite.voices`: it
reads one JSON request a line, and answers with a JSON line and 16-bit samples. Workers import neither torch
nor this process's main module, so they start in a fraction of a second, also from a notebook.
"""

import functools
import json
import os
import queue
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, PartMissing
from .threads import thread_count

ESPEAK, HIBARI = "espeak-ng", "hibari"
PACKAGES = {
    ESPEAK: ("espeakng_loader", "espeakng-loader"),
    HIBARI: ("hibari", "hibari-tts"),
}  # module, package
NATIVE_RATE_HZ = {ESPEAK: 22_050, HIBARI: 24_000}
NORMAL_WORDS_PER_MINUTE = 175  # both engines' ordinary pace


@dataclass(frozen=True)
class Voice:
    """Who speaks and how: `rate` in words per minute (175 is ordinary), `pitch` 0 to 100 (espeak-ng only)."""

    engine: str = ESPEAK
    name: str = "en-us"
    rate: int = NORMAL_WORDS_PER_MINUTE
    pitch: int = 50


# The one voice of every answer, as in the paper. In duplex data it is the system's, never a user's.
ANSWER_VOICE = Voice(HIBARI, "heart")

# Users' voices, as accent+variant. Reserved for outside examiners, so that nothing here has ever heard them:
# the variants below (their relatives, such as iven2 or RicishayMax, stay out too) and one accent.
RESERVED_VARIANTS = ("adam", "belinda", "iven", "aunty", "max", "m8", "f5")
RESERVED_ACCENTS = ("en-gb-x-rp",)

VOICE_TABLE = """
    train  en-us             f1 f2 f3 m1 m2 m3 linda steph Andy paul robert Annie Gene klatt2 klatt4
    train  en-us             edward john Alicia
    train  en                m4 m6 f2 Lee travis shelby michel Mike victor
    train  en-gb-scotland    m3 ed
    train  en-029            f3
    train  en-us-nyc         marcelo
    train  en-gb-x-gbclan    m2 quincy
    train  en-gb-x-gbcwmd    benjamin
    test   en-us             f4 m7 david Andrea
    test   en                norbert steph3
    test   en-gb-scotland    boris
"""
ROWS = [row.split() for row in VOICE_TABLE.strip().splitlines()]
TRAIN_VOICES = tuple(
    f"{accent}+{v}" for split, accent, *variants in ROWS if split == "train" for v in variants
)
TEST_VOICES = tuple(f"{accent}+{v}" for split, accent, *variants in ROWS if split == "test" for v in variants)


def is_reserved(name: str) -> bool:
    """Whether a voice name is one of those kept for outside examiners, or a relative of one."""
    accent, _, variant = name.lower().partition("+")
    relative = any(word in variant for word in ("adam", "belinda", "iven", "aunty", "max"))
    return accent in RESERVED_ACCENTS or variant in RESERVED_VARIANTS or relative


def split_voices(split: str) -> tuple[str, ...]:
    """espeak-ng voices of "train" or "test"; the two never meet."""
    if split not in ("train", "test"):
        raise ValueError(f"expected split 'train' or 'test', got {split!r}")
    return TRAIN_VOICES if split == "train" else TEST_VOICES


def available(engine: str) -> bool:
    """Whether the package behind an engine is installed, without loading it."""
    return util.find_spec(PACKAGES[engine][0]) is not None


def require(engine: str) -> None:
    """Raises PartMissing, saying what to install, unless the engine is there."""
    if engine not in PACKAGES:
        raise InputError(f"there is no voice engine {engine!r}: choose {' or '.join(PACKAGES)}.")
    if not available(engine):
        package = PACKAGES[engine][1]
        raise PartMissing(
            f"the voice engine {engine} is not installed (package {package}): "
            f"run pip install '{package}' or pip install 'freeze-omni-lite[data]'."
        )


@functools.cache
def version(engine: str) -> str:
    """Version of the package behind an engine; part of the audio cache's key."""
    require(engine)
    return metadata.version(PACKAGES[engine][1])


def speak(text: str, voice: Voice = ANSWER_VOICE) -> np.ndarray:
    """One text as int16 (samples,) at NATIVE_RATE_HZ[voice.engine]."""
    return next(speak_many([(text, voice)], workers=1))


def speak_many(requests: Sequence[tuple[str, Voice]], workers: int | None = None) -> Iterator[np.ndarray]:
    """Speak (text, voice) pairs in worker processes; yields int16 (samples,) at the engine's rate, in order.

    workers   processes, one thread each; as many as this process has threads unless said otherwise

    Raises PartMissing if an engine is not installed, InputError if a voice is unknown or nothing was spoken
    """
    for engine in {voice.engine for _, voice in requests}:
        require(engine)
    if not requests:
        return
    pool = Pool(requests, min(workers or thread_count(), len(requests)))
    try:
        for index in range(len(requests)):
            yield pool.result(index)
    finally:
        pool.close()


class Pool:
    """A few worker processes fed from one list of requests; each is driven by a thread of this process."""

    AHEAD = 256  # finished waveforms that may wait for their reader, so that memory stays bounded

    def __init__(self, requests: Sequence[tuple[str, Voice]], workers: int) -> None:
        self.requests = requests
        self.todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(requests)):
            self.todo.put(index)
        self.done: dict[int, np.ndarray | Exception] = {}
        self.changed = threading.Condition()
        self.read = 0
        self.closed = False
        self.processes = [start_worker() for _ in range(workers)]
        self.threads = [threading.Thread(target=self.drive, args=(p,), daemon=True) for p in self.processes]
        for thread in self.threads:
            thread.start()

    def drive(self, process: subprocess.Popen) -> None:
        """Give requests to one worker until none is left."""
        while not self.closed:
            try:
                index = self.todo.get_nowait()
            except queue.Empty:
                return
            with self.changed:
                self.changed.wait_for(lambda index=index: self.closed or index < self.read + self.AHEAD)
            if self.closed:
                return
            try:
                answer: np.ndarray | Exception = ask_worker(process, *self.requests[index])
            except Exception as error:  # handed to the reader, who raises it
                answer = error
            with self.changed:
                self.done[index] = answer
                self.changed.notify_all()

    def result(self, index: int) -> np.ndarray:
        with self.changed:
            self.read = index
            self.changed.notify_all()
            self.changed.wait_for(lambda: index in self.done)
            answer = self.done.pop(index)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the workers: they leave when their standard input closes."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()
        for process in self.processes:
            process.stdin.close()
            process.wait()
            process.stdout.close()


def start_worker() -> subprocess.Popen:
    """Start one speaking process with one thread, able to import this very checkout."""
    checkout = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"FREEZE_OMNI_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "freeze_omni_lite.voices"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def ask_worker(process: subprocess.Popen, text: str, voice: Voice) -> np.ndarray:
    """Send one request to a worker and wait for its waveform."""
    request = {
        "text": text,
        "engine": voice.engine,
        "name": voice.name,
        "rate": voice.rate,
        "pitch": voice.pitch,
    }
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        header = json.loads(process.stdout.readline() or b'{"died": true}')
    except OSError:
        header = {"died": True}
    if header.get("died"):
        raise PartMissing(
            f"the {voice.engine} worker stopped while speaking {text[:60]!r}: install its package again "
            f"(pip install --force-reinstall {PACKAGES[voice.engine][1]})."
        )
    if "error" in header:
        raise InputError(header["error"])
    return np.frombuffer(process.stdout.read(2 * header["samples"]), dtype="<i2")


# What follows runs in the worker only.


class Espeak:
    """espeak-ng through ctypes, in retrieval mode: it hands its samples to a callback and plays nothing."""

    SYNCHRONOUS, UTF8, RATE, PITCH = 2, 1, 1, 3  # values of espeak-ng's speak_lib.h

    def __init__(self) -> None:
        import ctypes

        import espeakng_loader

        self.data = Path(espeakng_loader.get_data_path())
        # espeak-ng cuts the path of its data at 160 bytes, so go there and call it ".".
        os.chdir(self.data.parent)
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        rate_hz = self.library.espeak_Initialize(self.SYNCHRONOUS, 0, b".", 0)
        if rate_hz != NATIVE_RATE_HZ[ESPEAK]:
            raise InputError(
                f"espeak-ng started at {rate_hz} Hz, expected {NATIVE_RATE_HZ[ESPEAK]}: install it again."
            )
        self.pieces: list[bytes] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)

        def keep(samples: int | None, count: int, _events: int | None) -> int:
            if samples and count > 0:
                self.pieces.append(ctypes.string_at(samples, 2 * count))
            return 0  # go on

        self.callback = callback(keep)  # kept alive: the library only holds its address
        self.library.espeak_SetSynthCallback(self.callback)

    def __call__(self, text: str, name: str, rate: int, pitch: int) -> bytes:
        self.choose(name)
        self.library.espeak_SetParameter(self.RATE, rate, 0)
        self.library.espeak_SetParameter(self.PITCH, pitch, 0)
        self.pieces.clear()
        encoded = text.encode()
        self.library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, self.UTF8, None, None)
        self.library.espeak_Synchronize()
        return b"".join(self.pieces)

    def choose(self, name: str) -> None:
        """Select a voice; an unknown variant is an error here, while espeak-ng itself would ignore it."""
        variant = name.partition("+")[2]
        unknown = variant and not (self.data / "voices" / "!v" / variant).is_file()
        if unknown or self.library.espeak_SetVoiceByName(name.encode()) != 0:
            raise InputError(
                f"espeak-ng has no voice {name!r}: name an accent and a variant such as 'en-us+f2'."
            )


class Hibari:
    """hibari-tts; seeded by the text, so the same request gives the same samples."""

    def __init__(self) -> None:
        from hibari import Hibari as Synthesizer

        self.make = Synthesizer
        self.loaded: dict[str, Any] = {}

    def __call__(self, text: str, name: str, rate: int, pitch: int) -> bytes:
        if name not in self.loaded:
            self.loaded[name] = self.make(voice=name, threads=1)
        speed = min(2.0, max(0.5, rate / NORMAL_WORDS_PER_MINUTE))
        waveform = self.loaded[name](text, speed=speed, seed=zlib.crc32(text.encode()))
        return (np.clip(waveform, -1, 1) * 32767).round().astype("<i2").tobytes()


def serve(requests: Any, answers: Any) -> None:
    """The worker's loop: one JSON line in, one JSON line and 16-bit samples out, until the input ends."""
    engines: dict[str, Any] = {}
    for line in requests:
        request = json.loads(line)
        engine = request.pop("engine")
        try:
            if engine not in engines:
                engines[engine] = Espeak() if engine == ESPEAK else Hibari()
            samples = engines[engine](**request)
            if not samples:
                raise InputError(
                    f"{engine} spoke nothing for {request['text'][:60]!r}: give a text with words."
                )
            header = {"samples": len(samples) // 2}
        except Exception as error:
            sentence = (
                str(error)
                if isinstance(error, InputError)
                else f"{engine} failed ({error!r}): install it again."
            )
            header, samples = {"error": sentence}, b""
        answers.write(json.dumps(header).encode() + b"\n" + samples)
        answers.flush()


if __name__ == "__main__":
    output = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints must not garble the answers
    with os.fdopen(output, "wb") as answers:
        serve(sys.stdin.buffer, answers)
