"""What the LLM writes to be read aloud: plain sentences, each once, of other words in test than in training."""

import json

import pytest

from freeze_omni_lite import written


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(written, "cache_dir", lambda: tmp_path)
    return tmp_path / "written"


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("The old boat lay on the sand. It was blue.", "The old boat lay on the sand."),
        ('"Birds sing before the sun comes up."', "Birds sing before the sun comes up."),
        ("The company has been a leader in many differ", "The company has been a leader in many"),
        ("In 1990 the boat sank.", ""),
        ('The sentence is: "The boat sank."', ""),
        ("Yes.", ""),
        ("", ""),
        (" ".join(["Word"] * 30), " ".join(["Word"] * 16)),
    ],
)
def test_only_plain_text_of_4_to_16_words_is_kept(answer, kept):
    assert written.speakable(answer) == kept


def test_train_and_test_ask_about_different_words():
    class Tokenizer:
        words = (" alpha", " bravo", "lima", " Tango", " of", " charlie", " delta", " x1", " golf") * 300

        def __len__(self):
            return len(self.words)

        def decode(self, ids):
            return self.words[ids[0]] + "abcdefghij"[ids[0] // 300]

    train, test = (written.split_words(Tokenizer(), split) for split in ("train", "test"))
    words = set(train) | set(test)
    assert all(word.isalpha() and word.islower() and 4 <= len(word) <= 10 for word in words)
    assert len(train) > 5 * len(test) > 0


def test_what_was_written_is_kept_and_not_asked_for_again(cache, monkeypatch):
    path = cache / f"my-llm-train-{written.VERSION}.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"asked": 3, "sentences": ["One two three four.", "Five six seven eight."]}))
    monkeypatch.setattr("freeze_omni_lite.frozen_llm.FrozenLLM.load", None)  # would fail if it were asked
    assert written.written_sentences("my/llm", 1) == ["One two three four."]
    assert len(written.written_sentences("my/llm", 2)) == 2
