"""The tokenizer: every text comes back, digits and reserved tokens are single and fixed, and the hub reads it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgekit.data.tokenizer import (
    ASSISTANT,
    END,
    PAD,
    RESERVED,
    SMALLEST_VOCABULARY,
    USER,
    chat_text,
    in_pieces,
    load_tokenizer,
    question,
    save_tokenizer,
    train_tokenizer,
)
from forgekit.errors import ArtifactError, ConfigError, DataError

TEXT = ["the cat sat on the mat and the dog sat on the cat 12 34 " * 20, "def f(x):\n    return x + 1\n" * 20]
quick = settings(max_examples=200, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT, 320)


@quick
@given(text=st.text())
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["\x00\ufeff\u200b", "🏳️‍🌈 e\u0301", " \t\n\r ", "<|en", "<think>x</think>", "१२"])
def test_odd_texts_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_single_tokens_wherever_they_stand(tokenizer):
    for text in ("1234567890", "a12 34b", "x=42", " 7"):
        tokens = tokenizer.encode(text).tokens
        assert [t for t in tokens if any(c.isdigit() for c in t)] == [c for c in text if c.isdigit()]


def test_reserved_tokens_have_the_same_ids_in_every_tokenizer(tokenizer):
    other = train_tokenizer(["something else entirely, and quite long enough " * 20], 300)
    for t in (tokenizer, other):
        assert [t.token_to_id(token) for token in RESERVED] == list(range(32))
    assert (PAD, END) == RESERVED[:2] and len(set(RESERVED)) == 32 and SMALLEST_VOCABULARY == 288
    assert tokenizer.encode(f"a{USER}b{END}").ids.count(tokenizer.token_to_id(END)) == 1


def test_the_vocabulary_is_as_large_as_asked(tokenizer):
    assert tokenizer.get_vocab_size() == 320
    assert len(tokenizer.encode("the cat sat").ids) < len("the cat sat")


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="vocab_size: 287 is too small; use 288 or more"):
        train_tokenizer(TEXT, 287)
    assert train_tokenizer(TEXT, 288).get_vocab_size() == 288


def test_too_little_text_is_refused():
    with pytest.raises(DataError, match=r"fills only \d+ of 5000 tokens; give more text or lower vocab_size"):
        train_tokenizer(["short"], 5000)


def test_a_saved_tokenizer_is_the_same_in_our_hands_and_in_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "the cat<|end|> 12 <think>é🙂</think>"
    assert ours.encode(text).ids == theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).ids
    assert theirs.decode(ours.encode(text).ids) == text
    assert (theirs.pad_token, theirs.eos_token, theirs.pad_token_id, theirs.eos_token_id) == (PAD, END, 0, 1)


def test_the_chat_template_writes_what_chat_text_writes(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " 1+1?\n"},
        {"role": "assistant", "content": "2"},
        {"role": "tool_result", "content": '{"x": 1}'},
    ]
    for generate in (False, True):
        expected = chat_text(talk, generate)
        assert theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=generate) == expected
        ids = theirs.apply_chat_template(talk, add_generation_prompt=generate, return_dict=True)["input_ids"]
        assert ids == tokenizer.encode(expected).ids
    assert question("hi") == f"{USER}hi{END}{ASSISTANT}"


@pytest.mark.parametrize("content", [b"", b"{", b'{"model": 3}', b"\xff\xfe", json.dumps([1]).encode()])
def test_a_corrupt_file_is_told_in_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="corrupt") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and "tokenizer.json" in caught.value.where


def test_a_missing_file_is_told_in_one_line(tmp_path):
    with pytest.raises(ArtifactError, match="no tokenizer here"):
        load_tokenizer(tmp_path)


@quick
@given(text=st.text(max_size=50), size=st.integers(1, 20))
def test_pieces_make_the_text(text, size):
    pieces = list(in_pieces(text, size))
    assert "".join(pieces) == text and all(0 < len(p) <= size for p in pieces)


def test_a_disk_that_fails_while_saving_is_an_error_of_the_system(tokenizer, tmp_path):
    with pytest.raises(OSError):  # which disk_errors explains; the library's own save raises a bare Exception
        save_tokenizer(tokenizer, tmp_path / "gone")
