"""The command line: what is refused, with which sentence, and that nothing is loaded or left behind by then."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from freeze_omni_lite import __main__ as cli
from freeze_omni_lite import course, run
from freeze_omni_lite.__main__ import main


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """A folder of recordings, good and bad."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    tone = 0.1 * np.sin(np.arange(8000) / 20).astype(np.float32)
    soundfile.write(folder / "tone.wav", tone, 16000)
    soundfile.write(folder / "stereo8k.wav", np.stack([tone, -0.5 * tone], axis=1), 8000)
    soundfile.write(folder / "empty.wav", tone[:0], 16000)
    soundfile.write(folder / "nan.wav", np.where(np.arange(8000) == 5, np.nan, tone), 16000, subtype="FLOAT")
    soundfile.write(folder / "long.flac", np.zeros(8 * 60 * 1000 + 2000, np.float32), 1000)
    (folder / "text.wav").write_text("not a recording")
    (folder / "lines.txt").write_text("first line\n\nsecond line\n")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    return folder


@pytest.fixture
def no_models(monkeypatch):
    """Loading a model is a failure: what is tested must be refused before that."""

    def refuse(*_):
        raise AssertionError("a model was about to be loaded")

    monkeypatch.setattr(cli, "load_system", refuse)


@pytest.fixture
def made_up(monkeypatch):
    """Verbs that answer at once, and a list of what they were asked."""
    from freeze_omni_lite import verbs

    calls = []

    def talk(parts, waveform, *, seed, end_of_file):
        calls.append(("talk", tuple(waveform.shape), seed, end_of_file))
        outcome = "answered" if waveform.abs().max() > 0.06 else "ignored"
        audio = torch.zeros(2400 if outcome == "answered" else 0)
        trace = {"outcome": outcome, "forced": False, "transcript": "a", "text": "b", "stages": {}}
        return verbs.Turn(audio, trace)

    def transcribe(parts, waveform, through):
        calls.append(("transcribe", tuple(waveform.shape), through))
        return "words"

    def speak(parts, text, seed):
        calls.append(("speak", text, seed))
        return torch.zeros(2400), {"seconds": 0.1}

    def code(parts, waveform):
        calls.append(("codec", tuple(waveform.shape)))
        return waveform, torch.arange(20), 400.0

    for name, verb in {"talk": talk, "transcribe": transcribe, "speak": speak, "code": code}.items():
        monkeypatch.setattr(verbs, name, verb)
    monkeypatch.setattr(verbs, "ask", lambda parts, text: calls.append(("ask", text)) or text.upper())
    monkeypatch.setattr(
        cli, "load_system", lambda *_: SimpleNamespace(provenance=lambda: {"codec": "made up"})
    )
    return calls


BAD = {
    "missing": ("{verb} {sounds}/nothing.wav {out}", r"no audio file at .*nothing\.wav"),
    "folder": ("{verb} {sounds} {out}", "no audio file at"),
    "not audio": ("{verb} {sounds}/text.wav {out}", r"text\.wav cannot be read as audio"),
    "empty": ("{verb} {sounds}/empty.wav {out}", "holds no samples"),
    "nan": ("{verb} {sounds}/nan.wav {out}", "NaN or infinite"),
    "second of two": ("{verb} {sounds}/tone.wav {sounds}/nan.wav --out-dir {sounds}/out", "NaN or infinite"),
    "json in a file": ("{verb} {sounds}/tone.wav --json {sounds}/tone.wav/x.json", "cannot be written"),
    "output a folder": ("{verb} {sounds}/tone.wav --json {sounds}", "cannot be written"),
    "unwritable folder": ("{verb} {sounds}/tone.wav --out-dir {sounds}/text.wav", "cannot be written"),
    "one name twice": (
        "{verb} {sounds}/tone.wav {sounds}/../sounds/tone.wav --out-dir {sounds}/out",
        "two inputs",
    ),
    "one output for two": (
        "{verb} {sounds}/tone.wav {sounds}/stereo8k.wav --json {sounds}/x.json",
        "one input, got 2",
    ),
    "unknown option": ("{verb} {sounds}/tone.wav --outdir x", "unrecognized arguments"),
    "unknown scale": (
        "{verb} {sounds}/tone.wav {out} --scale labtop",
        r"unknown scale 'labtop' \(did you mean laptop",
    ),
    "seed": ("{verb} {sounds}/tone.wav {out} --seed -1", "--seed|expected one argument"),
    "no file": ("{verb}", "required: files"),
}


def fails(command: str, sentence: str, capsys, folder: Path) -> None:
    """The command prints one sentence that matches, returns 2 and leaves the folder as it was."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    status = main(command.split())
    printed = capsys.readouterr()
    assert status == 2, printed
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("freeze-omni: "), lines
    assert re.search(sentence, lines[0]), lines[0]
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("verb", ["talk", "transcribe", "transcribe --through ctc", "codec"])
@pytest.mark.parametrize("case", BAD)
def test_bad_recordings_and_outputs(verb, case, sounds, no_models, capsys):
    command, sentence = BAD[case]
    out = "" if verb.startswith("transcribe") else f"-o {sounds}/out.wav"
    fails(command.format(verb=verb, sounds=sounds, out=out), sentence, capsys, sounds)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("talk {sounds}/long.flac", r"8\.0 minutes long, expected at most 8 minutes"),
        ("transcribe {sounds}/long.flac", "expected at most 8 minutes"),
        ("talk {sounds}/tone.wav -o {sounds}/out.mp5", r"expected \.wav or \.flac"),
        ("codec {sounds}/tone.wav -o {sounds}/tone.wav", "is the input itself"),
        ("codec {sounds}/tone.wav --out-dir {sounds}", "is the input itself"),
        ("codec {sounds}/tone.wav -o {sounds}/o.wav --out-dir {sounds}/o", "leave out -o"),
        ("talk {sounds}/tone.wav --end-of-file never", "invalid choice: 'never'"),
        ("transcribe {sounds}/tone.wav --through air", "invalid choice: 'air'"),
        ("speak --file {sounds}/lines.txt -o {sounds}/out.wav", "for one input, got 2"),
        ("speak word", "a place for the audio"),
        ("speak word -o {sounds}/none.wav/out.txt", r"expected \.wav or \.flac"),
        ("speak -o {sounds}/out.wav", "exactly one of them"),
        ("speak word --file {sounds}/lines.txt", "exactly one of them"),
        ("ask --file {sounds}/blank.txt", "holds no text"),
        ("ask --file {sounds}/binary.txt", "cannot be read as text"),
        ("ask --file {sounds}/nothing.txt", "cannot be read as text"),
        ("ask ?!", "is empty"),
        ("ask " + "a" * 3001, "3,001 characters, expected at most 3,000"),
        ("run", "required: notebooks, --scale"),
        ("run 77 --scale tiny", "unknown notebook '77'|no notebooks"),
        ("run all --scale tinny", "unknown scale 'tinny'"),
        ("bench nothing-like-this", "unknown bench"),
        ("doctor --now", "unrecognized arguments"),
        ("tlak x", "invalid choice: 'tlak'"),
        ("", "required: verb"),
    ],
)
def test_bad_commands(command, sentence, sounds, no_models, capsys):
    fails(command.format(sounds=sounds), sentence, capsys, sounds)


def test_an_empty_text_is_refused(no_models, capsys, tmp_path):
    assert main(["ask", ""]) == 2 and "is empty" in capsys.readouterr().err
    assert (
        main(["speak", "   ", "-o", str(tmp_path / "a.wav")]) == 2 and "is empty" in capsys.readouterr().err
    )


def test_missing_stages_and_devices_are_one_sentence(sounds, capsys, tmp_path):
    folder = tmp_path / "runs"
    fails(
        f"codec {sounds}/tone.wav --scale gpu --runs {folder}",
        "stage 'codec' at scale 'gpu' not found",
        capsys,
        sounds,
    )
    fails(
        f"transcribe {sounds}/tone.wav --scale gpu --runs {folder}", "Run notebook 02 first", capsys, sounds
    )
    assert not folder.exists()


def test_talk_leaves_what_was_asked_for(sounds, made_up, capsys):
    files = f"{sounds}/tone.wav {sounds}/stereo8k.wav"
    assert main(f"talk {files} --out-dir {sounds}/out --seed 3 --end-of-file wait".split()) == 0
    assert made_up == [("talk", (8000,), 3, "wait"), ("talk", (16000,), 3, "wait")]
    left = sorted(path.name for path in (sounds / "out").iterdir())
    assert left == ["stereo8k.json", "tone.json", "tone.wav"], "an ignored turn leaves no audio"
    assert soundfile.info(sounds / "out/tone.wav").samplerate == 24000
    assert json.loads((sounds / "out/stereo8k.json").read_text())["outcome"] == "ignored"
    assert main(f"talk {sounds}/tone.wav -o {sounds}/a.wav --json {sounds}/a.json".split()) == 0
    assert (sounds / "a.wav").is_file() and (sounds / "a.json").is_file()


def test_transcribe_and_ask_print_the_text_alone(sounds, made_up, capsys):
    assert main(f"transcribe {sounds}/long.flac --through ctc --json {sounds}/t.json".split()) == 0
    assert capsys.readouterr().out == "words\n"
    assert json.loads((sounds / "t.json").read_text())["text"] == "words"
    assert main(f"ask --file {sounds}/lines.txt --out-dir {sounds}/out".split()) == 0
    assert capsys.readouterr().out == "FIRST LINE\nSECOND LINE\n"
    assert json.loads((sounds / "out/001.json").read_text())["question"] == "second line"


def test_speak_and_codec_write_audio(sounds, made_up, capsys):
    assert main(["speak", "two words", "-o", f"{sounds}/s.flac"]) == 0
    assert main(f"speak --file {sounds}/lines.txt --out-dir {sounds}/spoken".split()) == 0
    assert sorted(p.name for p in (sounds / "spoken").iterdir()) == [
        "000.json",
        "000.wav",
        "001.json",
        "001.wav",
    ]
    assert main(f"codec {sounds}/stereo8k.wav -o {sounds}/c.wav".split()) == 0
    assert made_up[-1] == ("codec", (24000,)), "8 kHz stereo is converted"
    assert "20 tokens, 40 a second, 400 bit/s" in capsys.readouterr().out


def test_run_passes_its_options_on(monkeypatch):
    asked = {}
    monkeypatch.setattr(run, "run", lambda wanted, **options: asked.update(wanted=wanted, **options))
    command = (
        "run 02 03 --scale gpu --set a.b=1 --set c.d=2 --variant v --seed 4 --runs r --resume --device cpu"
    )
    assert main(command.split()) == 0
    assert asked.pop("wanted") == ["02", "03"] and asked.pop("changes") == ["a.b=1", "c.d=2"]
    assert asked == {"scale": "gpu", "variant": "v", "seed": 4, "runs": "r", "resume": True, "device": "cpu"}


def test_an_interruption_ends_quietly(monkeypatch, capsys):
    monkeypatch.setattr(cli, "texts_of", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["ask", "x"]) == 130
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--help"], ["talk", "--help"], ["tlak"], ["talk", "missing.wav"], ["ask", ""]]
)
def test_help_and_bad_arguments_import_nothing_heavy(words):
    program = (
        "import sys\nfrom freeze_omni_lite.__main__ import main\ntry:\n    status = main(sys.argv[1:])\n"
        "except SystemExit as end:\n    status = end.code\n"
        "assert not {'torch', 'numpy', 'papermill'} & set(sys.modules)\nsys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=course.ROOT, capture_output=True, text=True
    )
    assert done.returncode == (0 if "--help" in words else 2), done.stderr
    assert "Traceback" not in done.stderr
