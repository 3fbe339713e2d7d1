"""The data of every stage: manifests, synthesis with a cache, batches.

Paper: "Datasets" and "Training strategy". Used by: every training notebook.

A manifest is planned first, as a pure function of a seed (texts, voices, ids), and voiced afterwards:
espeak-ng's audio differs a little from call to call, so it is cached by what was asked for and its hash is
recorded. Batches are a pure function of (seed, step, rank, world), so a resumed run needs no sampler state.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import audio, sentences, voices
from .audio import CHUNK_SAMPLES, SAMPLE_RATE_HZ, SPEECH_SAMPLE_RATE_HZ
from .augmentation import LEVELS_DB, augment, set_level, uniform
from .errors import InputError, PartMissing
from .files import atomic_write, atomic_write_bytes, atomic_write_text
from .parts import cache_dir, ensure_torchaudio
from .voices import ANSWER_VOICE, ESPEAK, HIBARI, Voice
from .written import written_sentences

CACHE_LIMIT_BYTES = 6 * 1024**3  # flac files of about 25 kB a second of speech: some 60 hours
CACHED_RATE_HZ = {
    ESPEAK: SAMPLE_RATE_HZ,
    HIBARI: SPEECH_SAMPLE_RATE_HZ,
}  # users are heard, answers are learnt

# A 10 ms frame is voiced if it lies within 40 dB of the loudest one; gaps under 200 ms (stops) are bridged.
VOICED_FRAME_MS = 10
VOICED_RANGE_DB = 40.0
BRIDGED_GAP_SECONDS = 0.2


@dataclass(frozen=True)
class Utterance:
    """One recording, planned or made. Planned: no path yet. Paths are absolute or relative to the manifest.

    segments   voiced stretches (start, end) in seconds
    sha256     of the 16-bit samples, not of the file
    answers    accepted answers, if it is a question that has any
    """

    id: str
    text: str
    kind: str = "sentence"
    voice: Voice | None = None
    path: str = ""
    duration_seconds: float = 0.0
    sha256: str = ""
    segments: tuple[tuple[float, float], ...] = ()
    answers: tuple[str, ...] = ()
    topic: str = ""
    speaker: str = ""
    language: str = "en"

    @property
    def last_voiced_seconds(self) -> float:
        return self.segments[-1][1] if self.segments else self.duration_seconds


# ------------------------------------------------------------------------------------------------ manifests


def write_manifest(path: str | Path, utterances: Sequence[Utterance]) -> Path:
    """One JSON object a line."""
    rows = (json.dumps(dataclasses.asdict(utterance), ensure_ascii=False) for utterance in utterances)
    return atomic_write_text(path, "".join(f"{row}\n" for row in rows))


def from_manifest(path: str | Path) -> list[Utterance]:
    """Read a jsonl manifest, ours or any with `text` and `path` (or `file`, `audio`, `audio_filepath`).

    Relative paths count from the manifest's folder; a missing duration is read from the file's header.
    Raises InputError if the manifest is missing, a line is no JSON object, or a line has no audio path.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no manifest at {path}: give a .jsonl file with one utterance a line (text, path).")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            found.append(read_row(line, path.parent, f"{path.name} line {number}"))
    return found


def read_row(line: str, folder: Path, where: str) -> Utterance:
    """One line of a manifest. Raises InputError naming the line."""
    try:
        row = dict(json.loads(line))
        file = next(row[name] for name in ("path", "file", "audio", "audio_filepath") if row.get(name))
    except (ValueError, TypeError, StopIteration):
        raise InputError(
            f"{where} is not a JSON object with text and path: mend the line or leave it out."
        ) from None
    known = {f.name for f in dataclasses.fields(Utterance)}
    row = {"id": Path(file).stem, "text": "", **{name: value for name, value in row.items() if name in known}}
    row["voice"] = Voice(**row["voice"]) if row.get("voice") else None
    row["segments"] = tuple(map(tuple, row.get("segments", ())))
    row["answers"] = tuple(row.get("answers", ()))
    row["path"] = str(folder / file)
    utterance = Utterance(**row)
    return utterance if utterance.duration_seconds else with_duration(utterance)


def with_duration(utterance: Utterance) -> Utterance:
    """Fill in duration_seconds from the header of the audio file."""
    import soundfile

    try:
        seconds = soundfile.info(utterance.path).duration
    except (soundfile.LibsndfileError, RuntimeError):
        raise InputError(
            f"{utterance.path} cannot be read as audio: mend or leave out {utterance.id!r}."
        ) from None
    return dataclasses.replace(utterance, duration_seconds=seconds)


def from_hugging_face(name: str, split: str, text_field: str = "text", **options: Any) -> Iterator[Utterance]:
    """Utterances of a Hugging Face speech dataset (openslr/librispeech_asr, AISHELL, WenetSpeech, ...).

    Audio that the dataset carries as bytes is written once below the cache folder; nothing is decoded here.
    Raises PartMissing if the package `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise PartMissing(
            f"the package datasets is not installed, so {name} cannot be read: run pip install datasets, "
            "or write a jsonl manifest and use samples.from_manifest."
        ) from None
    rows = datasets.load_dataset(name, split=split, **options)
    rows = rows.cast_column("audio", datasets.Audio(decode=False))
    folder = cache_dir() / "corpora" / name.replace("/", "--") / split
    for index, row in enumerate(rows):
        path = Path(row["audio"]["path"] or f"{index}.flac")
        if row["audio"]["bytes"] is not None:
            path = folder / f"{index:08d}-{path.name}"
            if not path.is_file():
                atomic_write_bytes(path, row["audio"]["bytes"])
        yield with_duration(Utterance(f"{name}/{split}/{index}", row[text_field], "corpus", path=str(path)))


# --------------------------------------------------------------------------------------------------- plans


def random_voice(generator: random.Random, split: str, name: str = "") -> Voice:
    """A user's voice: variant of the split, pace 135 to 215 words a minute, pitch 25 to 75."""
    name = name or generator.choice(voices.split_voices(split))
    return Voice(ESPEAK, name, generator.randrange(135, 216), generator.randrange(25, 76))


def plan_voices(count: int, seed: int, split: str, purpose: str) -> list[Voice]:
    """`count` users' voices, every variant of the split equally often."""
    generator = sentences.stream(seed, split, f"voices {purpose}")
    names: list[str] = []
    while len(names) < count:
        names += generator.sample(voices.split_voices(split), len(voices.split_voices(split)))
    return [random_voice(generator, split, name) for name in names[:count]]


def plan_sentences(count: int, seed: int, split: str = "train") -> list[Utterance]:
    """Free sentences in users' voices."""
    texts, spoken_by = sentences.sentences(count, seed, split), plan_voices(count, seed, split, "sentences")
    return [
        Utterance(f"{split}-sentence-{seed}-{i:06d}", text, "sentence", voice)
        for i, (text, voice) in enumerate(zip(texts, spoken_by, strict=True))
    ]


def plan_questions(count: int, seed: int, split: str = "train") -> list[Utterance]:
    """Questions in users' voices, with their accepted answers."""
    asked, spoken_by = sentences.questions(count, seed, split), plan_voices(count, seed, split, "questions")
    return [
        Utterance(
            f"{split}-question-{seed}-{i:06d}", q.text, "question", voice, answers=q.answers, topic=q.topic
        )
        for i, (q, voice) in enumerate(zip(asked, spoken_by, strict=True))
    ]


def plan_answers(texts: Sequence[str], seed: int = 0) -> list[Utterance]:
    """Texts in the one answer voice, for codec and speech decoder."""
    return [Utterance(f"answer-{seed}-{i:06d}", text, "answer", ANSWER_VOICE) for i, text in enumerate(texts)]


def plan_transcription(
    count: int, seed: int, split: str = "train", written: Sequence[str] = ()
) -> list[Utterance]:
    """Questions and free sentences, half and half; in training hibari speaks every eighth sentence: a second engine.

    written   sentences of open vocabulary (written.py). With them three eighths are questions, one eighth sentences of
              templates, one eighth written ones, and the rest patchwork of these
    """
    asked = count * 3 // 8 if written else count // 2
    plan = plan_questions(asked, seed, split) + plan_sentences(count - asked, seed, split)
    if written:
        free = range(asked, count)
        texts = dict(zip(free[1::5], itertools.cycle(written), strict=False))
        patched = [place for place in free if (place - asked) % 5 > 1]
        texts |= zip(patched, sentences.patchwork(len(patched), written, seed, split), strict=True)
        for place, text in texts.items():
            plan[place] = dataclasses.replace(plan[place], text=text, kind="written")
    if split == "train":
        plan[asked::8] = [dataclasses.replace(utterance, voice=ANSWER_VOICE) for utterance in plan[asked::8]]
    return plan


def transcription(preset: Any, seed: int, split: str = "train") -> list[Utterance]:
    """The transcribed speech of a listening stage with its audio: preset.utterances to train on, or
    preset.test_utterances in voices and sentences that training never meets.

    preset.corpus   synthetic: planned and voiced here; manifest: read from preset.manifest, where whole speakers
                    are held out for the test, whatever the seed
    Raises InputError for another corpus, a missing manifest, or one too small to hold anything out.
    """
    if preset.corpus == "synthetic":
        if split == "test":
            return synthesize(plan_transcription(preset.test_utterances, seed, split))
        written = written_sentences(preset.writer, preset.written) if preset.written else []
        return synthesize(plan_transcription(preset.utterances, seed, split, written))
    if preset.corpus != "manifest" or not preset.manifest:
        raise InputError(
            f"corpus is {preset.corpus!r} and manifest {preset.manifest!r}, expected corpus synthetic, or corpus "
            "manifest and the path of a jsonl file: set both."
        )
    train, test = held_out(from_manifest(preset.manifest), preset.test_utterances)
    return train[: preset.utterances] if split == "train" else test


def held_out(utterances: Sequence[Utterance], count: int) -> tuple[list[Utterance], list[Utterance]]:
    """Utterances to train on and `count` to test with, of other speakers; a pure function of the names.

    An utterance without a speaker counts as one of its own. Raises InputError if nothing is left to train on.
    """
    people = [utterance.speaker or utterance.id for utterance in utterances]
    ranks = {name: hashlib.sha256(name.encode()).hexdigest() for name in people}
    order = sorted(range(len(people)), key=lambda i: (ranks[people[i]], i))
    tested = {people[i] for i in order[:count]}
    train = [u for u, name in zip(utterances, people, strict=True) if name not in tested]
    if not train:
        raise InputError(
            f"the manifest has {len(utterances)} utterances of {len(set(people))} speakers; after holding out "
            f"{count} for the test none are left: give more, or lower test_utterances."
        )
    return train, [utterances[i] for i in order[:count]]


# ------------------------------------------------------------------------------------------------- synthesis


def synthesize(
    utterances: Sequence[Utterance],
    workers: int | None = None,
    progress: bool = True,
    limit_bytes: int = CACHE_LIMIT_BYTES,
) -> list[Utterance]:
    """Voice planned utterances; returns them with path, duration, hash and voiced segments.

    Audio comes from the cache if it was made before. Afterwards the oldest cached files go until the cache is
    under `limit_bytes`; files of this call stay. Utterances that already have a path are passed through.
    Raises PartMissing if a voice engine is not installed.
    """
    paths = {u.id: cached_path(u) for u in utterances if not u.path}
    missing = {paths[u.id]: u for u in utterances if not u.path and not paths[u.id].is_file()}
    begin, made_seconds = time.perf_counter(), 0.0
    spoken = voices.speak_many([(u.text, u.voice) for u in missing.values()], workers)
    for count, (path, utterance, samples) in enumerate(
        zip(missing, missing.values(), spoken, strict=True), start=1
    ):
        made_seconds += write_cached(path, samples, utterance.voice)
        if progress and (count % 500 == 0 or count == len(missing)):
            wall = time.perf_counter() - begin
            left, minutes = wall / count * (len(missing) - count), made_seconds / 60
            print(
                f"voiced {count}/{len(missing)}, {minutes:.1f} min of speech, {wall:.0f} s, {left:.0f} s left"
            )
    made = [u if u.path else measured(u, paths[u.id]) for u in utterances]
    prune_cache(limit_bytes, keep=set(paths.values()))
    return made


def cached_path(utterance: Utterance) -> Path:
    """Where the audio of a planned utterance lives: named by everything that was asked for."""
    voice = utterance.voice
    if voice is None:
        raise InputError(
            f"utterance {utterance.id!r} has neither audio nor a voice: give it a path or a Voice."
        )
    asked = [utterance.text, voice.engine, voice.name, voice.rate, voice.pitch, voices.version(voice.engine)]
    key = hashlib.sha256(json.dumps([*asked, CACHED_RATE_HZ[voice.engine]]).encode()).hexdigest()
    return cache_dir() / "audio" / key[:2] / f"{key[:32]}.flac"


def manifest_part(path: str | Path, train: int, test: int, split: str) -> list[Utterance]:
    """The rows of a manifest that one split takes: the first `test` are held out, the next `train` are learned.

    Raises InputError if the manifest has too few rows for both.
    """
    rows = from_manifest(path)
    if len(rows) <= test:
        raise InputError(
            f"the manifest {path} has {len(rows)} utterances, expected more than the {test} held out for tests: "
            "give a longer one."
        )
    return rows[:test] if split == "test" else rows[test : test + train]


def answer_voice_speech(preset: Any, seed: int, split: str = "train") -> list[Utterance]:
    """The one voice for the codec: free sentences voiced here, or recordings if the preset's corpus is a manifest."""
    if preset.corpus == "manifest":
        return manifest_part(preset.manifest, preset.utterances, preset.test_utterances, split)
    count = preset.utterances if split == "train" else preset.test_utterances
    return synthesize(plan_answers(sentences.sentences(count, seed, split), seed))


_resamplers: dict[tuple[int, int], nn.Module] = {}


def resample(waveform: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Like audio.resample, with its filter kept: thousands of utterances share one."""
    if from_hz == to_hz:
        return waveform
    if (from_hz, to_hz) not in _resamplers:
        ensure_torchaudio()
        from torchaudio.transforms import Resample

        _resamplers[from_hz, to_hz] = Resample(from_hz, to_hz)
    return _resamplers[from_hz, to_hz](waveform)


def write_cached(path: Path, samples: np.ndarray, voice: Voice) -> float:
    """Resample int16 (samples,) and store it as 16-bit flac, all or nothing; returns its seconds.

    What `facts` finds is stored in the file's comment: to list thousands of files, their headers are enough.
    """
    rate_hz = CACHED_RATE_HZ[voice.engine]
    waveform = torch.from_numpy(samples.astype(np.float32))
    waveform = resample(waveform, voices.NATIVE_RATE_HZ[voice.engine], rate_hz)
    kept = waveform.round().clamp(-32768, 32767).to(torch.int16).numpy()
    atomic_write(path, lambda partial: write_flac(partial, kept, rate_hz))
    return len(kept) / rate_hz


def write_flac(path: Path, samples: np.ndarray, rate_hz: int) -> None:
    import soundfile

    with soundfile.SoundFile(path, "w", rate_hz, 1, "PCM_16", format="FLAC") as file:
        file.comment = json.dumps(facts(samples, rate_hz))
        file.write(samples)


def facts(samples: np.ndarray, rate_hz: int) -> dict[str, Any]:
    """Duration, hash and voiced segments of int16 (samples,)."""
    return {
        "duration_seconds": len(samples) / rate_hz,
        "sha256": hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest(),
        "segments": voiced_segments(torch.from_numpy(samples.astype(np.float32) / 32768.0), rate_hz),
    }


def measured(utterance: Utterance, path: Path) -> Utterance:
    """Record what a cached file holds, and mark it as used now."""
    import soundfile

    with soundfile.SoundFile(path) as file:
        found = json.loads(file.comment) if file.comment else facts(file.read(dtype="int16"), file.samplerate)
    os.utime(path)
    found["segments"] = tuple(map(tuple, found["segments"]))
    return dataclasses.replace(utterance, path=str(path), **found)


def prune_cache(limit_bytes: int, keep: set[Path]) -> int:
    """Delete the least recently used audio files over the limit, never those in `keep`; returns how many."""
    folder = cache_dir() / "audio"
    stats = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.glob("*/*.flac"))
    over, deleted = sum(size for _, size, _ in stats) - limit_bytes, 0
    for _, size, path in stats:
        if over > 0 and path not in keep:
            path.unlink(missing_ok=True)
            over, deleted = over - size, deleted + 1
    return deleted


def load_audio(utterance: Utterance, sample_rate_hz: int = SAMPLE_RATE_HZ) -> Tensor:
    """The waveform (samples,) of an utterance. Raises InputError if there is no audio yet, or no longer."""
    if not utterance.path or not Path(utterance.path).is_file():
        raise InputError(
            f"no audio for utterance {utterance.id!r} ({utterance.text[:40]!r}): run samples.synthesize."
        )
    return audio.load(utterance.path, sample_rate_hz)


def voiced_segments(
    waveform: Tensor, sample_rate_hz: int = SAMPLE_RATE_HZ
) -> tuple[tuple[float, float], ...]:
    """Voiced stretches (start, end) in seconds of a clean waveform (samples,), by energy.

    A frame of 10 ms counts if its level is within 40 dB of the loudest frame; gaps under 0.2 s are bridged.
    """
    width = sample_rate_hz * VOICED_FRAME_MS // 1000
    frames = nn.functional.pad(waveform, (0, -len(waveform) % width)).reshape(-1, width)
    level_db = 10 * torch.log10(frames.square().mean(dim=1) + 1e-12)
    voiced = (
        torch.nonzero((level_db > level_db.max() - VOICED_RANGE_DB) & (level_db > -100)).flatten().tolist()
    )
    found: list[list[int]] = []
    for frame in voiced:
        if found and (frame - found[-1][1]) * VOICED_FRAME_MS < 1000 * BRIDGED_GAP_SECONDS:
            found[-1][1] = frame + 1
        else:
            found.append([frame, frame + 1])
    end = len(waveform) / sample_rate_hz
    return tuple(
        (start * VOICED_FRAME_MS / 1000, min(stop * VOICED_FRAME_MS / 1000, end)) for start, stop in found
    )


# --------------------------------------------------------------------------------------------------- batches


def collate(waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad waveforms (samples,) with zeros to whole chunks: (batch, samples) and chunk_lengths (batch,)."""
    padded = [audio.pad_to_chunks(waveform) for waveform in waveforms]
    chunk_lengths = torch.tensor([len(waveform) // CHUNK_SAMPLES for waveform in padded])
    return nn.utils.rnn.pad_sequence(padded, batch_first=True), chunk_lengths


class Batches:
    """Which items form which batch: similar lengths together, about `batch_seconds` of padded audio each.

    `batches[number]` is a list of indices, a pure function of (seed, number); number = step * world + rank.
    After `len(batches)` numbers every item has been seen exactly once and a new shuffle begins.
    """

    POOL_BATCHES = 8  # items are shuffled within pools of about this many batches of similar length

    def __init__(self, durations_seconds: Sequence[float], batch_seconds: float, seed: int = 1) -> None:
        if not len(durations_seconds):
            raise InputError("there are no utterances to make batches of: give at least one.")
        self.seed = seed
        by_length = np.argsort(np.asarray(durations_seconds), kind="stable")
        self.pools: list[tuple[np.ndarray, int]] = []  # (indices, items in a batch)
        end = len(by_length)
        while end > 0:  # from the longest down: the longest item of a pool sets its batch size
            size = max(1, int(batch_seconds / max(durations_seconds[by_length[end - 1]], 1e-3)))
            begin = max(0, end - size * self.POOL_BATCHES)
            self.pools.append((by_length[begin:end], size))
            end = begin
        self.count = sum(-(-len(pool) // size) for pool, size in self.pools)
        self.epoch: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        """Batches in one pass over the data."""
        return self.count

    def __getitem__(self, number: int) -> list[int]:
        if number < 0:
            raise IndexError(number)
        epoch, position = divmod(number, self.count)
        if self.epoch[0] != epoch:
            self.epoch = (epoch, self.shuffled(epoch))
        return self.epoch[1][position]

    def shuffled(self, epoch: int) -> list[list[int]]:
        """All batches of one pass, in random order."""
        generator = np.random.default_rng([self.seed, epoch])
        found = []
        for pool, size in self.pools:
            items = generator.permutation(pool).tolist()
            found += [items[begin : begin + size] for begin in range(0, len(items), size)]
        return [found[i] for i in generator.permutation(len(found))]

    def at(self, step: int, rank: int = 0, world: int = 1) -> list[int]:
        """The batch of one rank at one step."""
        return self[step * world + rank]


def generator_for(*key: int) -> torch.Generator:
    """A torch generator that depends on every number of the key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def recipe_of(items: Sequence[Any], *settings: Any) -> str:
    """A short hash of what a data set was planned to be; training refuses to resume on another one."""
    planned = [(item.id, getattr(item, "text", ""), str(getattr(item, "voice", ""))) for item in items]
    return hashlib.sha256(repr((planned, settings)).encode()).hexdigest()[:16]


@dataclass
class Speech:
    """Voiced utterances as batches for training.fit: `speech(step, rank, world)` is a pure function.

    A batch: waveforms (batch, samples), chunk_lengths (batch,), texts, utterances, seconds of audio, whether it is
    augmented, and the step it was made for, because a stage may have phases.

    augmented     share of the utterances that get another room, microphone and noise; unless it is 0, all get another
                  level and some silence around them
    clean_steps   so many batches of every rank come first, unchanged: it is easier to learn to align clean speech
    """

    utterances: Sequence[Utterance]
    batch_seconds: float
    seed: int = 1
    augmented: float = 0.0
    clean_steps: int = 0

    def __post_init__(self) -> None:
        self.batches = Batches([u.duration_seconds for u in self.utterances], self.batch_seconds, self.seed)
        settings = (self.batch_seconds, self.seed, self.augmented, self.clean_steps)
        self.recipe = recipe_of(self.utterances, *settings)

    def __len__(self) -> int:
        """Batches in one pass."""
        return len(self.batches)

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        number, share = step * world + rank, self.augmented if step >= self.clean_steps else 0.0
        return {**self.batch(self.batches[number], number, share), "step": step}

    def batch(self, indices: Sequence[int], number: int = 0, share: float | None = None) -> dict[str, Any]:
        """The batch of some utterances; `number` decides the augmentation of a `share`; None: as the data set says."""
        share = self.augmented if share is None else share
        chosen = [self.utterances[index] for index in indices]
        waveforms = [load_audio(utterance) for utterance in chosen]
        if share:
            generators = [generator_for(self.seed, number, index) for index in indices]
            waveforms = [other(w, share, g) for w, g in zip(waveforms, generators, strict=True)]
        padded, chunk_lengths = collate(waveforms)
        seconds = sum(map(len, waveforms)) / SAMPLE_RATE_HZ
        texts = [utterance.text for utterance in chosen]
        return {
            "waveforms": padded,
            "chunk_lengths": chunk_lengths,
            "texts": texts,
            "utterances": chosen,
            "seconds": seconds,
            "augmented": share > 0,
        }


def other(waveform: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Another level, silence around it, and with probability `share` another room, microphone and noise."""
    waveform = with_silence(waveform, generator)
    if uniform(0, 1, generator) < share:
        return augment(waveform, generator)
    return set_level(waveform, uniform(*LEVELS_DB, generator))


def with_silence(waveform: Tensor, generator: torch.Generator) -> Tensor:
    """Up to 0.3 s of silence at either end: synthesised speech starts and stops without any."""
    before, after = (int(uniform(0, 0.3, generator) * SAMPLE_RATE_HZ) for _ in range(2))
    return nn.functional.pad(waveform, (before, after))


@dataclass
class Excerpts:
    """Random excerpts of one length at 24 kHz for the codec, as a pure function of (step, rank, world).

    A batch: waveforms (batch, samples), lengths (batch,) in samples, seconds of audio, and the step it was made for,
    because a stage may have phases. Short ones are zero-padded.
    """

    utterances: Sequence[Utterance]
    batch_seconds: float
    segment_seconds: float = 1.0
    seed: int = 1
    sample_rate_hz: int = SPEECH_SAMPLE_RATE_HZ

    def __post_init__(self) -> None:
        self.recipe = recipe_of(self.utterances, self.batch_seconds, self.segment_seconds, self.seed)

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        generator = generator_for(self.seed, step * world + rank)
        size = max(1, round(self.batch_seconds / self.segment_seconds))
        chosen = torch.randint(len(self.utterances), (size,), generator=generator).tolist()
        excerpts = [self.excerpt(self.utterances[index], generator) for index in chosen]
        samples = round(self.segment_seconds * self.sample_rate_hz)
        lengths = torch.tensor([len(excerpt) for excerpt in excerpts])
        waveforms = torch.stack([nn.functional.pad(e, (0, samples - len(e))) for e in excerpts])
        return {
            "waveforms": waveforms,
            "lengths": lengths,
            "seconds": size * self.segment_seconds,
            "step": step,
        }

    def excerpt(self, utterance: Utterance, generator: torch.Generator) -> Tensor:
        """A random stretch of segment_seconds, or the whole utterance if it is shorter."""
        samples = round(self.segment_seconds * self.sample_rate_hz)
        waveform = load_audio(utterance, self.sample_rate_hz)
        begin = int(uniform(0, max(0, len(waveform) - samples) + 1, generator))
        return waveform[begin : begin + samples]
