"""A corpus as speech tokens: what to say, voiced once, kept as the codec's codes in shards that can be resumed.

Paper: "Decoder training" (stages 2 and 3 train on codec tokens; the texts are a corpus and the frozen LLM's own
answers). An hour of speech is 144,000 tokens, 288 kB. Notebook 05 writes the folders train and test below its stage's
folder, notebooks 06 and 07 read them:

    speech_tokens.read_shards(stage.folder / "train", codec_stage.sha256)
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from . import audio, samples, sentences, voices
from .answers import kept_answers
from .audio import HOP_SAMPLES, SPEECH_SAMPLE_RATE_HZ, SPEECH_TOKENS_PER_SECOND
from .codec import Codec
from .errors import InputError, StageMismatch
from .files import atomic_write_bytes
from .frozen_llm import FrozenLLM
from .ranks import barrier, is_main, rank, world
from .scales import Preset
from .stages import shown
from .text import Speller, clean_for_speech, token_ids
from .written import split_words, written_sentences

OPEN_QUESTIONS = (
    "What does the word {} mean?",
    "Can you tell me something about {}?",
    "Why do people speak of {}?",
)

# ---- what is said ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One text to be voiced.

    question   what the LLM answers with this text; "" for a free sentence
    path       a recording of it; "": the answer voice speaks it
    written    the answer as the LLM wrote it, before clean_for_speech: its hidden states belong to these tokens
    """

    text: str
    question: str = ""
    path: str = ""
    written: str = ""


def free_sentences(preset: Preset, seed: int, split: str = "train") -> list[Line]:
    """The preset's number of free sentences, as they are spoken, or recorded ones if its corpus is a manifest.

    Up to half of those to train on are `preset.written` sentences of open vocabulary that the LLM writes. The others
    fill templates from word lists: half of them with any words, half with numbers and names that answers consist of.
    """
    if preset.corpus == "manifest":
        found = samples.manifest_part(preset.manifest, preset.sentences, preset.test_sentences, split)
        lines = [Line(clean_for_speech(row.text), path=row.path) for row in found]
        return [line for line in lines if line.text]
    count = preset.sentences if split == "train" else preset.test_sentences
    written = min(preset.written, count // 2) if split == "train" else 0
    texts = written_sentences(preset.writer, written) if written else []
    half = (count - len(texts) + 1) // 2
    texts = sentences.sentences(half, seed, split) + texts
    texts += sentences.spoken_sentences(count - len(texts), seed, split)
    return [Line(clean_for_speech(text)) for text in texts]


def llm_answers(llm: FrozenLLM, preset: Preset, system_prompt: str, seed: int) -> list[Line]:
    """The frozen LLM's own answers to as many questions as the preset says, as they are spoken; equal ones once."""
    asked = questions(llm.tokenizer, preset.answers, seed)
    answers = kept_answers(llm, system_prompt, asked, preset.answer_tokens)
    lines = [
        Line(clean_for_speech(text), question, written=text)
        for question, text in zip(asked, answers, strict=True)
    ]
    return [line for line in lines if line.text]


def questions(tokenizer: Any, count: int, seed: int) -> list[str]:
    """`count` different questions: those of the listening side, 2,370, and then about words of the LLM's vocabulary."""
    asked = list(dict.fromkeys(question.text for question in sentences.questions(count, seed)))
    if len(asked) < count:
        words = split_words(tokenizer, "train")[: count - len(asked)]
        asked += [OPEN_QUESTIONS[i % len(OPEN_QUESTIONS)].format(word) for i, word in enumerate(words)]
    return asked


def voiced(lines: Sequence[Line]) -> list[Tensor]:
    """Each line as a 24 kHz waveform (samples,): its recording, else the answer voice. Raises PartMissing."""
    requests = [(line.text, voices.ANSWER_VOICE) for line in lines if not line.path]
    spoken = voices.speak_many(requests)
    return [
        audio.load(line.path, SPEECH_SAMPLE_RATE_HZ)
        if line.path
        else torch.from_numpy(next(spoken) / 32768.0).float()
        for line in lines
    ]


# ---- as tokens -------------------------------------------------------------------------------------------------------


@dataclass
class Spoken:
    """One text and how it sounds. `question` is what the LLM answered with this text, `written` how it wrote it.

    Both are "" for free sentences.
    """

    text: str
    codes: Tensor  # (speech_tokens,)
    question: str = ""
    written: str = ""

    @property
    def seconds(self) -> float:
        return len(self.codes) / SPEECH_TOKENS_PER_SECOND


def tokens_in(samples: int) -> int:
    """Speech tokens of a recording: one for every 600 samples begun.

    >>> [tokens_in(samples) for samples in (1, 600, 601, 24_000)]
    [1, 1, 2, 40]
    """
    return -(-samples // HOP_SAMPLES)


@torch.inference_mode()
def tokenize(codec: Codec, waveforms: Sequence[Tensor], batch: int = 8) -> list[Tensor]:
    """24 kHz waveforms (samples,) -> their codes (speech_tokens,), batched by length; padding leaves no trace."""
    order = sorted(range(len(waveforms)), key=lambda i: len(waveforms[i]))
    codes: dict[int, Tensor] = {}
    device = next(codec.parameters()).device
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        padded = pad_sequence([waveforms[i] for i in rows], batch_first=True)
        lengths = torch.tensor([len(waveforms[i]) for i in rows], device=device)
        found = codec.encode(padded.to(device), lengths).cpu()
        codes |= {i: found[row, : tokens_in(len(waveforms[i]))].clone() for row, i in enumerate(rows)}
    return [codes[i] for i in range(len(waveforms))]


# ---- in shards -------------------------------------------------------------------------------------------------------


def write_shards(
    folder: Path,
    codec: Codec,
    codec_hash: str,
    lines: Sequence[Line],
    shard_utterances: int,
    voice: Callable[[Sequence[Line]], list[Tensor]] = voiced,
) -> int:
    """Voice and tokenise lines, shard by shard, each file whole or not at all. Returns how many this rank wrote.

    A shard that already holds these very lines, tokenised by this very codec, is kept, so an interrupted run goes on
    where it stopped. Ranks share the shards. Shards beyond the last one (of a longer corpus before) are deleted.

    codec_hash  Stage.sha256 of the codec's stage; readers refuse shards of another
    voice       lines -> 24 kHz waveforms (samples,); only one shard of waveforms is held at a time
    Raises InputError if there is nothing to say.
    """
    if not lines:
        raise InputError("there is no text to voice: ask for at least one sentence or answer.")
    parts = [list(lines[i : i + shard_utterances]) for i in range(0, len(lines), shard_utterances)]
    written = 0
    for number in range(rank(), len(parts), world()):
        path, about = folder / f"shard-{number:05d}.safetensors", describe(parts[number], codec_hash)
        if is_finished(path, about):
            continue
        codes = tokenize(codec, voice(parts[number]))
        write_shard(path, codes, about)
        written += 1
        seconds = sum(map(len, codes)) / SPEECH_TOKENS_PER_SECOND
        print(
            f"shard {number + 1} of {len(parts)}: {len(codes)} utterances, {seconds:.0f} s of speech",
            flush=True,
        )
    if is_main():
        for path in shard_paths(folder)[len(parts) :]:
            path.unlink()
    barrier()
    return written


def write_shard(path: Path, codes: list[Tensor], about: dict[str, Any]) -> None:
    """One file; equal content gives equal bytes (one entry of metadata: safetensors shuffles several)."""
    lengths = torch.tensor([len(row) for row in codes])
    tensors = {"codes": torch.cat(codes).to(torch.int16), "lengths": lengths}
    atomic_write_bytes(path, save(tensors, metadata={"shard": json.dumps(about)}))


def describe(lines: Sequence[Line], codec_hash: str) -> dict[str, Any]:
    """What a shard says about itself: whose codes, and of what."""
    rows = [[line.text, line.question, line.path, line.written] for line in lines]
    return {"codec": codec_hash, "lines": rows}


def metadata(path: Path) -> dict[str, Any]:
    """Raises StageMismatch if the file is damaged or no shard of ours."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["shard"])
        about["codec"], about["lines"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StageMismatch(
            f"{shown(path)} is no shard of speech tokens ({type(error).__name__}): delete it and run notebook 05 again."
        ) from None
    return about


def is_finished(path: Path, about: dict[str, Any]) -> bool:
    """Whether this shard holds these lines, tokenised by this codec."""
    try:
        return path.is_file() and metadata(path) == about
    except StageMismatch:  # a damaged one is written again
        return False


def shard_paths(folder: Path) -> list[Path]:
    return sorted(Path(folder).glob("shard-*.safetensors"))


def read_shards(folder: Path, codec_hash: str | None = None) -> list[Spoken]:
    """All utterances of a folder, in order. Raises StageMismatch if there are none, or another codec made them."""
    paths = shard_paths(folder)
    if not paths:
        raise StageMismatch(f"{shown(Path(folder))} holds no shards of speech tokens: run notebook 05 first.")
    return [spoken for path in paths for spoken in read_shard(path, codec_hash)]


def read_shard(path: Path, codec_hash: str | None = None) -> Iterator[Spoken]:
    """The utterances of one shard. Raises StageMismatch."""
    about = metadata(path)
    if codec_hash is not None and about["codec"] != codec_hash:
        raise StageMismatch(
            f"{shown(path)} was made by codec {about['codec'][:8]}, the one at hand is {codec_hash[:8]}: "
            "run notebook 05 again."
        )
    tensors = load_file(path)
    codes = tensors["codes"].long().split(tensors["lengths"].tolist())
    for (text, question, _, written), row in zip(about["lines"], codes, strict=True):
        yield Spoken(text, row, question, written)


class Corpus(nn.Module):
    """What the stage folder keeps of a corpus: how often each code occurs, and a digest of every text and token.

    Nothing here trains. The digest makes the hash of the stage's weights that of the corpus, so that a decoder trained
    on another corpus is noticed.
    """

    counts: Tensor
    digest: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.long))
        self.register_buffer("digest", torch.zeros(32, dtype=torch.uint8))

    @classmethod
    def of(cls, spoken: Sequence[Spoken], codebook_size: int) -> "Corpus":
        corpus, summary = cls(codebook_size), hashlib.sha256()
        for item in spoken:
            corpus.counts += torch.bincount(item.codes, minlength=codebook_size)
            facts = [item.text, item.question, item.written, item.codes.tolist()]
            summary.update(json.dumps(facts).encode())
        corpus.digest.copy_(torch.tensor(list(summary.digest()), dtype=torch.uint8))
        return corpus


# ---- as batches ------------------------------------------------------------------------------------------------------


def hold_out_answers(spoken: Sequence[Spoken], one_in: int = 5) -> tuple[list[Spoken], list[Spoken]]:
    """(to train on, to test with): every fifth answer of the LLM is kept from decoder stages 2 and 3 alike."""
    answers = [item for item in spoken if item.question]
    tested = {id(item) for item in answers[::one_in]}
    return [item for item in spoken if id(item) not in tested], answers[::one_in]


def part_of(spoken: Sequence[Spoken], share: float, least: int = 16) -> list[Spoken]:
    """An evenly spread share of the texts (1.0: all), `least` or more: what a study of hours trains on.

    >>> [item.text for item in part_of([Spoken(str(i), torch.zeros(1)) for i in range(8)], 0.25, least=1)]
    ['0', '4']
    """
    count = min(len(spoken), max(least, round(share * len(spoken))))
    return [spoken[i * len(spoken) // count] for i in range(count)]


@dataclass
class SpokenBatches:
    """Spoken texts as batches for training.fit: `batches(step, rank, world)` is a pure function.

    A batch: text_ids (batch, text_tokens), text_lengths (batch,), characters of each token (batch, text_tokens, most),
    codes (batch, speech_tokens), code_lengths (batch,), seconds of speech. With `states` also hidden_states
    (batch, tokens, llm_width), hidden_lengths.

    tokenizer  of the LLM: the speech decoder reads its ids of the text as it is spoken
    states     of each text, (tokens, llm_width): the LLM's hidden states of the tokens it wrote
    """

    spoken: Sequence[Spoken]
    tokenizer: Any
    batch_seconds: float
    seed: int = 1
    states: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        self.text_ids = [
            torch.tensor(token_ids(self.tokenizer, clean_for_speech(item.text))) for item in self.spoken
        ]
        speller = Speller(self.tokenizer)
        self.characters = [speller(ids.tolist()) for ids in self.text_ids]
        self.batches = samples.Batches([item.seconds for item in self.spoken], self.batch_seconds, self.seed)
        facts = [[item.text, item.question, item.codes.tolist()] for item in self.spoken]
        facts += [self.batch_seconds, self.seed, self.states is not None]
        self.recipe = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Batches in one pass."""
        return len(self.batches)

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        return self.batch(self.batches.at(step, rank, world))

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        """The batch of some texts."""
        indices = list(indices)
        text_ids, text_lengths = pad_rows([self.text_ids[i] for i in indices])
        codes, code_lengths = pad_rows([self.spoken[i].codes for i in indices])
        found = dict(text_ids=text_ids, text_lengths=text_lengths, codes=codes, code_lengths=code_lengths)
        found |= {
            "characters": pad_grids([self.characters[i] for i in indices]),
            "seconds": sum(self.spoken[i].seconds for i in indices),
        }
        if self.states is not None:
            found["hidden_states"], found["hidden_lengths"] = pad_rows([self.states[i] for i in indices])
        return found


def pad_grids(grids: Sequence[Tensor]) -> Tensor:
    """Grids (rows, columns) of any size as one tensor (batch, rows, columns) with zeros to the right and below."""
    rows, columns = (max(grid.shape[side] for grid in grids) for side in (0, 1))
    padded = grids[0].new_zeros(len(grids), rows, columns)
    for place, grid in enumerate(grids):
        padded[place, : grid.shape[0], : grid.shape[1]] = grid
    return padded


def pad_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (tokens, ...) as one tensor (batch, tokens, ...) with zeros behind, and their lengths (batch,)."""
    return pad_sequence(list(rows), batch_first=True), torch.tensor([len(row) for row in rows])
