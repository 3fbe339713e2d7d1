"""Duplex scenes: questions, pauses, hesitations, talk and sound not for the system, with their timelines.

Paper: "Chunk-level State Prediction" names the cases, how they are made is ours. Used by: notebooks 04, 08.
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import sentences
from .audio import SAMPLE_RATE_HZ
from .augmentation import add_room, make_noise, set_level, uniform
from .duplex import Timeline
from .samples import (
    Utterance,
    load_audio,
    plan_questions,
    random_voice,
    synthesize,
)
from .voices import ANSWER_VOICE, Voice

COMPLETE_KINDS = ("plain", "pause_incomplete", "plain", "pause_complete", "plain", "hesitation")
NOT_ADDRESSED_KINDS = ("other_person", "background", "noise", "music", "back_channel", "echo")
AFTERTHOUGHTS = {
    "train": ("please?", "do you know?", "I would like to know.", "if you can tell me."),
    "test": ("any idea?", "I forgot."),
}
SOUND_KINDS = ("noise", "music")  # scenes without a voice


@dataclass(frozen=True)
class Scene:
    """One duplex turn, planned: spoken pieces, the silence before each and after the last, in seconds.

    kind        plain, pause_incomplete (the speaker stops within a phrase), pause_complete (the phrase could
                end there), hesitation, unfinished; or one of NOT_ADDRESSED_KINDS
    level_db    of the voice, dB of full scale; a background talker is far away
    """

    id: str
    kind: str
    pieces: tuple[Utterance, ...]
    pauses_seconds: tuple[float, ...]
    complete: bool
    addressed: bool
    level_db: float = -23.0
    noise_kind: str = "pink"
    answers: tuple[str, ...] = ()
    sound_seconds: float = 0.0  # length of the noise or music, if that is all there is

    @property
    def text(self) -> str:
        return " ".join(piece.text for piece in self.pieces)

    @property
    def voice(self) -> Voice | None:
        return self.pieces[0].voice if self.pieces else None

    def accepts(self, answer: str) -> bool:
        """Whether `answer` holds one of the accepted answers."""
        return sentences.Question(self.text, self.kind, "", self.answers).accepts(answer)

    @property
    def duration_seconds(self) -> float:
        spoken = sum(p.last_voiced_seconds - p.segments[0][0] for p in self.pieces if p.segments)
        return sum(self.pauses_seconds) + spoken + self.sound_seconds


class Made(NamedTuple):
    """A scene as sound: waveform (samples,) at 16 kHz, its timeline, and the voiced stretches in seconds."""

    waveform: Tensor
    timeline: Timeline
    segments: tuple[tuple[float, float], ...]


def plan_scenes(
    complete: int, not_addressed: int, unfinished: int, seed: int, split: str = "train"
) -> list[Scene]:
    """Duplex turns: complete questions, talk and sound that is not for the system, questions broken off."""
    asked = sentences.questions(complete, seed, split)
    broken = sentences.unfinished(unfinished, seed, split)
    scenes = [plan_complete(question, i, seed, split) for i, question in enumerate(asked)]
    scenes += [plan_not_addressed(i, seed, split) for i in range(not_addressed)]
    for i, text in enumerate(broken):
        generator = sentences.stream(seed, split, f"unfinished scene {i}")
        scenes.append(
            plan_scene("unfinished", i, [text], generator, split, seed, complete=False, tail=(2.3, 2.9))
        )
    return scenes


def plan_mixture(count: int, seed: int, split: str = "train") -> list[Scene]:
    """`count` duplex turns: three complete ones and three not addressed for each unfinished one."""
    share = count // 7
    return plan_scenes(3 * share, 3 * share, count - 6 * share, seed, split)


def plan_dialogues(count: int, max_turns: int, seed: int, split: str = "train") -> list[list[Scene]]:
    """`count` dialogues of 1 to `max_turns` complete questions, each dialogue in one voice."""
    lengths = [1 + number % max_turns for number in range(count)]
    questions = iter(plan_questions(sum(lengths), seed, split))
    dialogues = []
    for number, turns in enumerate(lengths):
        generator = sentences.stream(seed, split, f"dialogue {number}")
        asked = [next(questions) for _ in range(turns)]
        one = {"split": split, "seed": seed, "voice": asked[0].voice, "tail": (1.0, 1.3)}
        dialogues.append(
            [
                plan_scene("plain", 100 * number + turn, [q.text], generator, answers=q.answers, **one)
                for turn, q in enumerate(asked)
            ]
        )
    return dialogues


def plan_scene(
    kind: str,
    index: int,
    texts: Sequence[str],
    generator: random.Random,
    split: str,
    seed: int,
    voice: Voice | None = None,
    tail: tuple[float, float] = (0.7, 1.3),
    **more: Any,
) -> Scene:
    """A scene of one speaker: silence, the texts with pauses of 0.2 to 1 s between them, a silent tail."""
    voice = voice or random_voice(generator, split)
    name = f"{split}-{kind}-{seed}-{index:06d}"
    pieces = tuple(Utterance(f"{name}-{i}", text, kind, voice) for i, text in enumerate(texts))
    between = [round(generator.uniform(0.2, 1.0), 3) for _ in texts[1:]]
    pauses = (round(generator.uniform(0.2, 0.8), 3), *between, round(generator.uniform(*tail), 3))
    level_db = round(generator.uniform(-32, -18), 1)
    settings = {"complete": True, "addressed": True, "level_db": level_db} | more
    return Scene(
        name,
        kind,
        pieces,
        pauses,
        noise_kind=generator.choice(("pink", "white", "hum", "chatter")),
        **settings,
    )


def plan_complete(question: sentences.Question, index: int, seed: int, split: str) -> Scene:
    """A complete question: in one go, or with a pause after any word, an afterthought, or a hesitation."""
    generator = sentences.stream(seed, split, f"complete scene {index}")
    kind, parts = COMPLETE_KINDS[index % len(COMPLETE_KINDS)], question.text.split()
    texts = [question.text]
    if kind == "pause_incomplete" and question.cut:
        at = generator.randint(1, question.cut)
        texts = [" ".join(parts[:at]), " ".join(parts[at:])]
    elif kind == "pause_complete":
        texts = [question.text, generator.choice(AFTERTHOUGHTS[split])]
    elif kind == "hesitation" and question.cut:
        texts = list(sentences.hesitant(question, seed, split))
    else:
        kind = "plain"
    return plan_scene(kind, index, texts, generator, split, seed, answers=question.answers)


def plan_not_addressed(index: int, seed: int, split: str) -> Scene:
    """Something the system must not answer. Its own voice is heard here only, as an echo."""
    generator = sentences.stream(seed, split, f"not addressed scene {index}")
    kind = NOT_ADDRESSED_KINDS[index % len(NOT_ADDRESSED_KINDS)]
    scene_seed, more = seed * 1_000_003 + index, {"addressed": False}
    if kind in SOUND_KINDS:
        more |= {"sound_seconds": round(generator.uniform(0.6, 3.0), 3)}
        return plan_scene(kind, index, [], generator, split, seed, **more)
    make = {"other_person": sentences.not_addressed, "back_channel": sentences.back_channels}
    text = make.get(kind, sentences.sentences)(1, scene_seed, split)[0]
    if kind == "background":
        more |= {"level_db": round(generator.uniform(-48, -36), 1)}
    if kind == "echo":
        more |= {"level_db": round(generator.uniform(-45, -28), 1), "voice": ANSWER_VOICE}
    return plan_scene(kind, index, [text], generator, split, seed, **more)


def synthesize_scenes(
    scenes: Sequence[Scene], workers: int | None = None, progress: bool = True
) -> list[Scene]:
    """Voice every piece of every scene."""
    planned = {piece.id: piece for scene in scenes for piece in scene.pieces}
    made = {u.id: u for u in synthesize(list(planned.values()), workers, progress)}
    return [dataclasses.replace(s, pieces=tuple(made[piece.id] for piece in s.pieces)) for s in scenes]


def duplex_sample(scene: Scene, generator: torch.Generator, room: bool = True) -> Made:
    """One waveform out of voiced pieces, pauses and a noise floor, with the timeline that label_chunks needs.

    Pieces are cut to their voiced stretch, so that every pause is as long as planned. Noise and music
    are marked like a voice: a voice-activity detector may open a turn on them.
    """
    track, segments = torch.zeros(round(scene.pauses_seconds[0] * SAMPLE_RATE_HZ)), []
    sounds = [only_sound(scene, generator)] if scene.kind in SOUND_KINDS else []
    sounds += [voiced_part(piece) for piece in scene.pieces]
    for sound, pause_seconds in zip(sounds, scene.pauses_seconds[1:], strict=True):
        begin = len(track) / SAMPLE_RATE_HZ
        segments.append((begin, begin + len(sound) / SAMPLE_RATE_HZ))
        silence = torch.zeros(round(pause_seconds * SAMPLE_RATE_HZ))
        track = torch.cat([track, set_level(sound, scene.level_db), silence])
    if room and uniform(0, 1, generator) < 0.3:
        track = add_room(track, generator)
    floor = make_noise(scene.noise_kind, len(track), generator)
    track = track + set_level(floor, uniform(-75, -50, generator))
    timeline = Timeline(len(track) / SAMPLE_RATE_HZ, segments[-1][1], scene.complete, scene.addressed)
    return Made(track.clamp(-1, 1), timeline, tuple(segments))


def only_sound(scene: Scene, generator: torch.Generator) -> Tensor:
    """The noise or music (samples,) of a scene in which nobody speaks."""
    kind = "chatter" if scene.kind == "noise" else "music"
    return make_noise(kind, round(scene.sound_seconds * SAMPLE_RATE_HZ), generator)


def voiced_part(utterance: Utterance) -> Tensor:
    """The waveform (samples,) at 16 kHz from its first to its last voiced sample."""
    waveform = load_audio(utterance)
    if not utterance.segments:
        return waveform
    begin, end = utterance.segments[0][0], utterance.segments[-1][1]
    return waveform[round(begin * SAMPLE_RATE_HZ) : round(end * SAMPLE_RATE_HZ)]
