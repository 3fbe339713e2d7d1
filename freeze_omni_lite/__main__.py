"""The command line: freeze-omni VERB ... = python -m freeze_omni_lite VERB ...

Every input and output is checked before a model is loaded, and nothing heavy is imported before that. Exit 0 on
success, 1 when a notebook fails, 2 on bad input with one sentence on standard error.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import InputError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from .system import System

LONGEST_LISTENING_MINUTES = 8  # the LLM's positions
LONGEST_TEXT_CHARACTERS = 3000
AUDIO_SUFFIXES = (".wav", ".flac")


class OneSentenceParser(argparse.ArgumentParser):
    """argparse without its page of usage when something is wrong."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help.")


def scale_name(text: str) -> str:
    from . import scales

    scales.check(text, scales.SCALES, "scale")
    return text


def stage_names(text: str) -> list[str]:
    """codec,encoder_ctc@variant -> names; only what stands before an @ must be a stage."""
    from . import scales

    for name in text.split(","):
        scales.check(name.partition("@")[0], scales.STAGES, "stage")
    return text.split(",")


def seed_number(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**63:
        raise InputError(f"--seed is {text!r}, expected a whole number from 0 to 2^63 - 1: change it.")
    return int(text)


def build_parser() -> OneSentenceParser:
    """All verbs and their options."""
    parser = OneSentenceParser(
        prog="freeze-omni", description="Train Freeze-Omni stage by stage, and talk to it."
    )
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True)
    add_run(verbs)
    add_listening_verbs(verbs)
    add_text_verbs(verbs)
    add_export(verbs)
    add_study(verbs)
    doctor = verbs.add_parser(
        "doctor", help="what is installed and cached, and what to do about what is missing"
    )
    doctor.add_argument("--fix", action="store_true", help="fetch and mend what is missing")
    add_device_and_seed(doctor)
    doctor.set_defaults(act=act_doctor)
    bench = verbs.add_parser("bench", help="speed and memory on this machine")
    bench.add_argument("what", nargs="*", help="streams, stages, ...; all if left out")
    bench.add_argument("-o", "--output", type=Path, help="write the numbers as JSON")
    add_device_and_seed(bench)
    bench.set_defaults(act=act_bench)
    add_measure(verbs)
    return parser


def add_run(verbs: Any) -> None:
    verb = verbs.add_parser("run", help="execute notebooks in order: run 02 03, or run all")
    verb.add_argument("notebooks", nargs="+", help="numbers, names, or all")
    verb.add_argument("--scale", type=scale_name, required=True, help="tiny, laptop, gpu or paper")
    verb.add_argument("--set", dest="changes", action="append", default=[], metavar="STAGE.FIELD=VALUE")
    verb.add_argument("--variant", default="", help="keep the result as runs/<scale>/<stage>@<variant>")
    verb.add_argument("--resume", action="store_true", help="keep notebooks whose last run still agrees")
    add_common(verb, scale=False)
    verb.set_defaults(act=act_run)


def add_study(verbs: Any) -> None:
    verb = verbs.add_parser("study", help="ablations, seeds, curves: several small trainings")
    verb.add_argument("name", nargs="?", help="which study; --list shows them")
    verb.add_argument(
        "--scale", type=scale_name, default="laptop", help="tiny, laptop (default), gpu or paper"
    )
    verb.add_argument("--set", dest="changes", action="append", default=[], metavar="STAGE.FIELD=VALUE")
    verb.add_argument("--list", action="store_true", help="every study and what its arms change")
    verb.add_argument(
        "--publish", action="store_true", help="copy the finished result to data_samples/results"
    )
    add_common(verb, scale=False)
    verb.set_defaults(act=act_study)


def add_listening_verbs(verbs: Any) -> None:
    talk = verbs.add_parser("talk", help="one spoken turn, streamed chunk by chunk")
    talk.add_argument(
        "--end-of-file",
        choices=("force", "wait"),
        default="force",
        help="answer at the end of the file or not",
    )
    transcribe = verbs.add_parser("transcribe", help="what was said")
    transcribe.add_argument(
        "--through", choices=("llm", "ctc"), default="llm", help="stage 2 (llm) or stage 1 (ctc)"
    )
    codec = verbs.add_parser("codec", help="encode and decode; prints tokens and bit rate")
    for verb, act in ((talk, act_talk), (transcribe, act_transcribe), (codec, act_codec)):
        verb.add_argument("files", nargs="+", type=Path, help="audio of any rate, mono or not")
        add_outputs(verb, audio=verb is not transcribe)
        add_common(verb)
        verb.set_defaults(act=act)


def add_text_verbs(verbs: Any) -> None:
    speak = verbs.add_parser("speak", help="text to speech with the LLM's states")
    ask = verbs.add_parser("ask", help="the same LLM by text: the baseline of the spoken path")
    for verb, act in ((speak, act_speak), (ask, act_ask)):
        verb.add_argument("text", nargs="?", help="the text, in quotes")
        verb.add_argument("--file", type=Path, help="one text a line instead")
        add_outputs(verb, audio=verb is speak)
        add_common(verb)
        verb.set_defaults(act=act)


def add_measure(verbs: Any) -> None:
    verb = verbs.add_parser("measure", help="the issues' figures for the stages at hand")
    verb.add_argument("what", help="which figures; a wrong name lists them")
    verb.add_argument("-o", "--output", type=Path, help="write the table with its circumstances as JSON")
    verb.add_argument("--items", type=int, help="how many items a figure rests on (default: 300)")
    verb.add_argument("--only", metavar="PART,PART", help="some parts: ctc, llm, questions, ...")
    add_common(verb)
    verb.set_defaults(act=act_measure)


def add_export(verbs: Any) -> None:
    verb = verbs.add_parser("export", help="a chain of trained stages becomes the shipped one")
    verb.add_argument("--scale", type=scale_name, default="laptop", help="whose stages (default: laptop)")
    verb.add_argument(
        "--stages", type=stage_names, default=(), metavar="STAGE,STAGE", help="all that are there if left out"
    )
    verb.add_argument(
        "--to", metavar="FOLDER", help="in the repository, if relative; default: data_samples/stages/<scale>"
    )
    add_common(verb, scale=False)
    verb.set_defaults(act=act_export)


def add_outputs(verb: argparse.ArgumentParser, audio: bool) -> None:
    if audio:
        verb.add_argument("-o", "--output", type=Path, help="the audio, .wav or .flac (one input only)")
    verb.add_argument("--json", type=Path, help="the record (one input only)")
    verb.add_argument("--out-dir", type=Path, help="each input leaves <name>.wav and/or <name>.json here")


def add_common(verb: argparse.ArgumentParser, scale: bool = True) -> None:
    if scale:
        verb.add_argument(
            "--scale", type=scale_name, help="whose stages; the best that are there if left out"
        )
    verb.add_argument("--runs", default="runs", help="the folder of trained stages (default: runs)")
    add_device_and_seed(verb)


def add_device_and_seed(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--device", help="cpu, cuda, mps; the best that is there if left out")
    verb.add_argument("--seed", type=seed_number, default=1)


# ---- inputs and outputs ----------------------------------------------------------------------------------------------


def check_inputs(paths: list[Path], longest_minutes: float | None = None) -> None:
    """Raise InputError for the first file that cannot be used: missing, no audio, empty, NaN, or too long."""
    for path in paths:  # the cheap question first, for all
        if not path.is_file():
            raise InputError(f"no audio file at {path}: give the path of a wav, flac, ogg or mp3 file.")
    from . import audio

    for path in paths:
        minutes = len(audio.load(path)) / audio.SAMPLE_RATE_HZ / 60
        if longest_minutes and minutes > longest_minutes:
            limit = f"expected at most {longest_minutes} minutes, which is what the LLM can hold"
            raise InputError(
                f"{path} is {minutes:.1f} minutes long, {limit}: cut it, or use transcribe --through ctc."
            )


def texts_of(arguments: argparse.Namespace) -> list[str]:
    """The text argument or the lines of --file. Raises InputError if there is none, or one is empty or too long."""
    if (arguments.text is None) == (arguments.file is None):
        raise InputError(f"{arguments.verb} takes one text or --file lines.txt: give exactly one of them.")
    texts = [arguments.text] if arguments.file is None else lines_of(arguments.file)
    for text in texts:
        if not any(character.isalnum() for character in text):
            raise InputError(f"the text {text!r} is empty: write at least one word.")
        if len(text) > LONGEST_TEXT_CHARACTERS:
            limit = f"expected at most {LONGEST_TEXT_CHARACTERS:,}"
            raise InputError(
                f"the text has {len(text):,} characters, {limit}: split it into lines of a --file."
            )
    return texts


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as text ({error}): give a UTF-8 file with one text a line."
        ) from None
    if not lines:
        raise InputError(f"{path} holds no text: write one text a line.")
    return lines


class Outputs:
    """Where the results of each input go, checked for all inputs before anything is computed.

    names   one a result: the input's stem, or 000, 001, ... for texts
    """

    def __init__(
        self, arguments: argparse.Namespace, names: list[str], inputs: list[Path] | None = None
    ) -> None:
        self.audio, self.json = getattr(arguments, "output", None), arguments.json
        self.folder, self.names = arguments.out_dir, names
        if self.folder and (self.audio or self.json):
            raise InputError("--out-dir names the outputs itself: leave out -o and --json.")
        if len(names) > 1 and (self.audio or self.json):
            raise InputError(f"-o and --json are for one input, got {len(names)}: use --out-dir for several.")
        if self.audio and self.audio.suffix.lower() not in AUDIO_SUFFIXES:
            raise InputError(
                f"{self.audio} is no audio file name, expected .wav or .flac: change the ending."
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if self.folder and twice:
            raise InputError(
                f"two inputs are called {twice[0]!r} and would share one output: rename one of them."
            )
        targets = [path for name in names for path in self.paths(name) if path]
        for path in targets:
            check_writable(path, [source.resolve() for source in inputs or []])

    def paths(self, name: str) -> tuple[Path | None, Path | None]:
        """Audio and record of one input."""
        if self.folder:
            return self.folder / f"{name}.wav", self.folder / f"{name}.json"
        return self.audio, self.json

    def write(self, name: str, record: dict[str, Any], audio: "Tensor | None" = None) -> None:
        """Write what was asked for; an answer without sound leaves no audio file."""
        from .audio import SPEECH_SAMPLE_RATE_HZ, save
        from .files import atomic_write_json

        wav, trace = self.paths(name)
        if wav and audio is not None and audio.numel():
            save(wav, audio, SPEECH_SAMPLE_RATE_HZ)
        if trace:
            atomic_write_json(trace, record)


def check_writable(path: Path, inputs: list[Path]) -> None:
    """Raise InputError unless `path` can be created; creates nothing."""
    if path.resolve() in inputs:
        raise InputError(f"{path} is the input itself and would be overwritten: choose another output.")
    place = path.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"{path} cannot be written ({reason}): choose a folder that you may write."
        ) from None


def load_system(arguments: argparse.Namespace, *needs: str) -> "System":
    """The parts that a verb needs; where they come from is said on standard error."""
    from .system import System

    return System.load(arguments.scale, arguments.runs, needs, arguments.device)


def each_file(
    arguments: argparse.Namespace, sample_rate_hz: int, work: Callable[[Path, "Tensor"], None]
) -> None:
    from . import audio

    for path in arguments.files:
        work(path, audio.load(path, sample_rate_hz))


# ---- verbs -----------------------------------------------------------------------------------------------------------


def act_run(arguments: argparse.Namespace) -> int:
    from .run import run

    names = ("scale", "changes", "variant", "seed", "runs", "resume", "device")
    run(arguments.notebooks, **{name: getattr(arguments, name) for name in names})
    return 0


def act_study(arguments: argparse.Namespace) -> int:
    from . import study

    if arguments.list:
        print(study.listing(arguments.scale))
        return 0
    if arguments.name is None:
        raise InputError(f"study needs a name: give one of {', '.join(study.STUDIES)}, or --list.")
    if arguments.publish:
        print(study.publish(arguments.name, arguments.scale, arguments.runs))
        return 0
    names = ("scale", "changes", "seed", "runs", "device")
    study.run_study(arguments.name, **{name: getattr(arguments, name) for name in names})
    return 0


def act_talk(arguments: argparse.Namespace) -> int:
    outputs = Outputs(arguments, [path.stem for path in arguments.files], arguments.files)
    check_inputs(arguments.files, LONGEST_LISTENING_MINUTES)
    from . import audio, system, verbs

    parts = load_system(arguments, *system.LISTENING, *system.SPEAKING)

    def work(path: Path, waveform: "Tensor") -> None:
        turn = verbs.talk(parts, waveform, seed=arguments.seed, end_of_file=arguments.end_of_file)
        outputs.write(path.stem, turn.trace, turn.audio)
        forced = " (forced at the end of the file)" if turn.trace["forced"] else ""
        print(f"{path.name}: {turn.trace['outcome']}{forced}")
        print(f"  heard: {turn.trace['transcript']}\n  answer: {turn.trace['text']}")

    each_file(arguments, audio.SAMPLE_RATE_HZ, work)
    return 0


def act_transcribe(arguments: argparse.Namespace) -> int:
    outputs = Outputs(arguments, [path.stem for path in arguments.files], arguments.files)
    through_llm = arguments.through == "llm"
    check_inputs(arguments.files, LONGEST_LISTENING_MINUTES if through_llm else None)
    from . import audio, verbs

    needs = ("encoder_ctc", "encoder_adapter") if through_llm else ("encoder_ctc",)
    parts = load_system(arguments, *needs)

    def work(path: Path, waveform: "Tensor") -> None:
        text = verbs.transcribe(parts, waveform, arguments.through)
        outputs.write(
            path.stem, {"file": str(path), "through": arguments.through, "text": text} | used(parts)
        )
        print(text if len(arguments.files) == 1 else f"{path.name}: {text}")

    each_file(arguments, audio.SAMPLE_RATE_HZ, work)
    return 0


def act_codec(arguments: argparse.Namespace) -> int:
    outputs = Outputs(arguments, [path.stem for path in arguments.files], arguments.files)
    check_inputs(arguments.files)
    from . import audio, verbs

    parts = load_system(arguments, "codec")

    def work(path: Path, waveform: "Tensor") -> None:
        decoded, codes, bits_per_second = verbs.code(parts, waveform)
        record = {
            "file": str(path),
            "seconds": len(waveform) / audio.SPEECH_SAMPLE_RATE_HZ,
            "tokens": codes.tolist(),
        }
        outputs.write(path.stem, record | {"bits_per_second": bits_per_second} | used(parts), decoded)
        numbers = (
            f"{len(codes)} tokens, {audio.SPEECH_TOKENS_PER_SECOND} a second, {bits_per_second:.0f} bit/s"
        )
        print(
            f"{path.name}: {record['seconds']:.2f} s, {numbers}\n  {' '.join(map(str, record['tokens'][:20]))} ..."
        )

    each_file(arguments, audio.SPEECH_SAMPLE_RATE_HZ, work)
    return 0


def act_speak(arguments: argparse.Namespace) -> int:
    texts = numbered(texts_of(arguments))
    outputs = Outputs(arguments, list(texts))
    if not (outputs.audio or outputs.folder):
        raise InputError("speak needs a place for the audio: add -o out.wav, or --out-dir for several lines.")
    from . import system, verbs

    parts = load_system(arguments, *system.SPEAKING, "encoder_prompt")
    for name, text in texts.items():
        audio, record = verbs.speak(parts, text, arguments.seed)
        outputs.write(name, {"text": text} | record | used(parts), audio)
        print(f"{outputs.paths(name)[0]}: {record['seconds']:.2f} s")
    return 0


def act_ask(arguments: argparse.Namespace) -> int:
    texts = numbered(texts_of(arguments))
    outputs = Outputs(arguments, list(texts))
    from . import verbs

    parts = load_system(arguments, "encoder_prompt")
    for name, text in texts.items():
        answer = verbs.ask(parts, text)
        outputs.write(name, {"question": text, "text": answer} | used(parts))
        print(answer)
    return 0


def numbered(texts: list[str]) -> dict[str, str]:
    return {f"{number:03d}": text for number, text in enumerate(texts)}


def used(parts: "System") -> dict[str, Any]:
    """What every record says about where its weights come from."""
    return {"stages": parts.provenance()}


def act_export(arguments: argparse.Namespace) -> int:
    from .export import export

    export(arguments.scale, arguments.runs, arguments.stages, arguments.to, arguments.device)
    return 0


def act_doctor(arguments: argparse.Namespace) -> int:
    from .doctor import main as examine

    return examine(arguments.fix, arguments.device)


def act_bench(arguments: argparse.Namespace) -> int:
    if arguments.output:
        check_writable(arguments.output, [])
    from .bench import main as measure

    return measure(arguments.what, arguments.output, arguments.device, arguments.seed) or 0


def act_measure(arguments: argparse.Namespace) -> int:
    from . import measure

    arguments.items = measure.ITEMS if arguments.items is None else arguments.items
    measure.check(arguments.what, arguments.only, arguments.items)
    if arguments.output:
        check_writable(arguments.output, [])
    names = ("only", "items", "scale", "runs", "device", "seed")
    return measure.main(
        arguments.what, arguments.output, **{name: getattr(arguments, name) for name in names}
    )


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    os.environ.setdefault(
        "HF_HUB_DISABLE_PROGRESS_BARS", "1"
    )  # transformers draws one for every load otherwise
    try:
        arguments = build_parser().parse_args(argv)
        return arguments.act(arguments)
    except UserError as error:
        print(f"freeze-omni: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("freeze-omni: stopped.", file=sys.stderr)
        return 130
    except Exception as error:
        log = getattr(error, "log", None)  # kernel.NotebookFailed; asking for the class would import it
        if log is None:
            raise
        print(f"{log}\nfreeze-omni: {error}".lstrip(), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
