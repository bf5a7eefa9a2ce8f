"""The catalogue: where sets are found, what their rows become, what replaces them, and the bench wall."""

import json
import logging
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from forgekit.data import catalogue
from forgekit.data.catalogue import DATASETS, ROW_READERS, DatasetSpec, MissingDataset, available, load, split_rows
from forgekit.errors import ConfigError, DataError

GSM = {"question": "Two and 1,000?", "answer": "It is <<2+1000=1002>>1002.\n#### 1,002"}
REAL = os.environ.get("AGENT_FORGE_DATA", "")
CHOICES = "Question: Which?\nA. dry\nB. wet\nAnswer:"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("AGENT_FORGE_DATA", raising=False)
    monkeypatch.setattr(catalogue, "_CACHE", type(catalogue._CACHE)(1_000_000))


def put(root, name, rows):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)))
    return path


READERS = [
    (
        "choice",
        {
            "instruction": "Please choose the correct answer to the question: Which?\n\n"
            "Answer1: dry Answer2: wet\n\nAnswer format: answer1/answer2",
            "answer": "answer2",
        },
        {"prompt": CHOICES, "answer": "B"},
    ),
    ("choice", {"query": "Question: Which?", "choices": ["dry", "wet"], "gold": 0}, {"prompt": CHOICES, "answer": "A"}),
    (
        "choice",
        {"question": "Which?", "choices": {"text": ["dry", "wet"], "label": ["1", "2"]}, "answerKey": "2"},
        {"prompt": CHOICES, "answer": "B"},
    ),
    (
        "choice",
        {"question_stem": "Which?", "choices": {"text": ["dry", "wet"], "label": ["A", "B"]}, "answerKey": "B"},
        {"prompt": CHOICES, "answer": "B"},
    ),
    (
        "choice",
        {
            "answerKey": "A",
            "question": {"stem": "Which?", "choices": [{"label": "A", "text": "dry"}, {"label": "B", "text": "wet"}]},
        },
        {"prompt": CHOICES, "answer": "A"},
    ),
    ("piqa", {"goal": "Which?", "sol1": "dry", "sol2": "wet", "label": 1}, {"prompt": CHOICES, "answer": "B"}),
    (
        "yes_no",
        {"instruction": "Say true or false, question: is it so?\n\nAnswer format: true/false", "answer": "false"},
        {"prompt": "Question: is it so?\nAnswer:", "answer": "no"},
    ),
    (
        "yes_no",
        {"query": "Passage: P.\nQuestion: is it so?", "choices": ["no", "yes"], "gold": 1},
        {"prompt": "Passage: P.\nQuestion: is it so?\nAnswer:", "answer": "yes"},
    ),
    (
        "yes_no",
        {"passage": "P.", "question": "is it so", "answer": True},
        {"prompt": "Passage: P.\nQuestion: is it so?\nAnswer:", "answer": "yes"},
    ),
    ("gsm8k", GSM, {"prompt": "Question: Two and 1,000?\nAnswer:", "answer": "1002", "trace": "It is 1002."}),
    (
        "svamp",
        {"Body": "Two.", "Question": "And 1?", "Answer": 3.0, "Equation": "( 2.0 + 1.0 )"},
        {"prompt": "Question: Two. And 1?\nAnswer:", "answer": "3", "trace": "( 2.0 + 1.0 )"},
    ),
    (
        "svamp",
        {"Body": "Two.", "Question": "And 1?", "Answer": "2.5", "Equation": "x"},
        {"prompt": "Question: Two. And 1?\nAnswer:", "answer": "2.5", "trace": "x"},
    ),
    (
        "mbpp",
        {"text": "Write f.", "code": "def f():\r\n\tpass", "test_list": ["assert f()", "assert 1"]},
        {
            "prompt": "Write f.\nThe code must pass these tests:\nassert f()\nassert 1\n",
            "answer": "def f():\n\tpass\n",
        },
    ),
    ("text", {"text": "words", "title": "t"}, {"text": "words"}),
]


@pytest.mark.parametrize("reader, row, wanted", READERS)
def test_every_published_shape_becomes_ours(reader, row, wanted):
    assert ROW_READERS.get(reader)(row) == [wanted]


def test_babi_questions_come_with_their_own_story():
    text = (
        "1 Mary went home.\n2 Where is Mary? |home|1\n3 She left.\n4 Where now?\tout,away\t1 3\n1 New.\n2 Who? \tJo\t1"
    )
    rows = ROW_READERS.get("babi")({"text": text})
    assert [row["answer"] for row in rows] == ["home", "out,away", "Jo"]
    assert rows[1]["prompt"] == "Mary went home.\nShe left.\nQuestion: Where now?\nAnswer:"
    assert rows[2]["prompt"] == "New.\nQuestion: Who?\nAnswer:"


def test_long_texts_are_cut_where_they_may_be():
    wiki = " \n = One = \n text \n = = Part = = \n more \n = Two = \n end \n"
    assert [row["text"] for row in ROW_READERS.get("wikitext")({"text": wiki})] == [
        " = One = \n text \n = = Part = = \n more \n",
        " = Two = \n end \n",
    ]
    speech = "Name:\n" + "word " * 200 + "\n\n"
    parts = ROW_READERS.get("play")({"text": speech * 9})
    assert len(parts) == 3 and all(row["text"].startswith("Name:") for row in parts)
    assert "".join(row["text"] for row in parts).split() == (speech * 9).split()
    assert ROW_READERS.get("text")({"text": " \n"}) == []


def test_local_rows_carry_their_provenance(tmp_path):
    path = put(tmp_path, "math/gsm8k_train.jsonl", [GSM, GSM])
    loaded = load("gsm8k", folder=tmp_path)
    assert loaded.source == "local" and loaded.used == "gsm8k" and loaded.path == str(path)
    assert loaded.row_count == 2 and loaded.rows[0]["answer"] == "1002" and loaded.for_training() == loaded.rows
    record = loaded.provenance()
    assert record["name"] == "gsm8k" and record["split"] == "train" and record["row_count"] == 2
    assert len(record["sha256"]) == 64 and "rows" not in record
    assert load("gsm8k", folder=tmp_path, limit=1).row_count == 1


def test_the_hash_is_of_the_content_and_the_cache_sees_changes(tmp_path):
    path = put(tmp_path, "math/gsm8k_train.jsonl", [GSM])
    first = load("gsm8k", folder=tmp_path)
    first.rows[0]["answer"] = "spoiled by its owner"
    again = load("gsm8k", folder=tmp_path)
    assert again.sha256 == first.sha256 and again.rows[0]["answer"] == "1002"
    stamp = path.stat().st_mtime_ns
    put(tmp_path, "math/gsm8k_train.jsonl", [GSM | {"question": "Longer than before?"}])
    os.utime(path, ns=(stamp, stamp))
    longer = load("gsm8k", folder=tmp_path)
    assert longer.sha256 != first.sha256 and "Longer" in longer.rows[0]["prompt"]
    put(tmp_path, "math/gsm8k_train.jsonl", [GSM | {"question": "LONGER than before?"}])
    os.utime(path, ns=(stamp + 1, stamp + 1))
    assert "LONGER" in load("gsm8k", folder=tmp_path).rows[0]["prompt"]


def test_unchanged_files_are_decoded_once(tmp_path, monkeypatch):
    put(tmp_path, "math/gsm8k_train.jsonl", [GSM])
    load("gsm8k", folder=tmp_path)
    monkeypatch.setattr(catalogue, "read_rows", lambda path: pytest.fail("read again"))
    assert load("gsm8k", folder=tmp_path).row_count == 1


def test_the_given_folder_comes_before_the_environment(tmp_path, monkeypatch):
    put(tmp_path / "env", "math/gsm8k_train.jsonl", [GSM, GSM])
    put(tmp_path / "env", "corpus/tinystories_sample.txt", "story\n<|endoftext|>\nother")
    put(tmp_path / "given", "gsm8k/train.csv", 'question,answer\nWhat?,"#### 7"\n')
    monkeypatch.setenv("AGENT_FORGE_DATA", str(tmp_path / "env"))
    given = load("gsm8k", folder=tmp_path / "given")
    assert given.path.endswith("gsm8k/train.csv") and given.rows[0]["answer"] == "7"
    assert load("tinystories", folder=tmp_path / "given").row_count == 2
    assert load("gsm8k").row_count == 2


def test_files_of_one_set_are_read_in_sorted_order(tmp_path):
    for number in (2, 9, 4, 1, 8, 3, 7, 5, 6):
        put(tmp_path, f"babi/qa{number}_x_train.txt", f"1 Is it {number}? |{number}|1\n")
    put(tmp_path, "babi/LICENSE.txt", "terms")
    loaded = load("babi", folder=tmp_path)
    assert [row["answer"] for row in loaded.rows] == list("123456789")
    assert loaded.path == str(tmp_path / "babi") and "9 files" in loaded.note


def test_missing_sets_fall_back_and_say_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "forgekit.data.catalogue"):
        loaded = load("gsm8k", folder=tmp_path, limit=5)
    assert (loaded.name, loaded.source, loaded.used, loaded.row_count) == ("gsm8k", "fallback", "gym", 5)
    assert "gym instead of gsm8k" in loaded.note and f"no train split in {tmp_path}" in loaded.note
    assert "HF_HUB_OFFLINE is set" in caplog.text
    assert "no data folder given and AGENT_FORGE_DATA not set" in load("mbpp", limit=1).note


def test_embedded_sets_need_nothing():
    gym = load("gym")
    assert gym.source == "embedded" and len({row["prompt"] for row in gym.rows}) == gym.row_count > 1000
    assert load("gym").sha256 == gym.sha256 and load("gym", limit=3).rows == gym.rows[:3]
    for name in ("python_prose", "python_code"):
        loaded = load(name, limit=2)
        assert loaded.source == "embedded" and all(len(row["text"]) >= 80 for row in loaded.rows)


def test_evaluation_splits_are_never_replaced(tmp_path):
    with pytest.raises(MissingDataset) as caught:
        load("wikitext", "valid", folder=tmp_path)
    assert caught.value.exit_code == DataError.exit_code
    assert caught.value.where == "wikitext/valid" and "corpus/wikitext2_valid.txt" in caught.value.remedy
    with pytest.raises(MissingDataset, match="no valid split on the hub"):
        load("python_prose", "valid")


def test_benchmarks_load_only_as_bench_and_never_train(tmp_path):
    put(tmp_path, "bench/gsm8k_test.jsonl", [GSM])
    bench = load("gsm8k", "bench", folder=tmp_path)
    assert bench.source == "local" and not bench.train_allowed
    with pytest.raises(DataError, match="may not be trained on"):
        bench.for_training()
    assert load("gsm8k", folder=tmp_path, limit=1).source == "fallback"
    with pytest.raises(ConfigError, match="unknown split 'test'"):
        load("gsm8k", "test", folder=tmp_path)


@pytest.mark.parametrize("files", [{"train": "bench/x.jsonl"}, {"bench": "math/x.jsonl"}])
def test_a_spec_cannot_train_on_bench_files(files):
    with pytest.raises(ConfigError, match="belong together"):
        DatasetSpec.build({"name": "x", "kind": "qa", "license": "MIT", "files": files})


@pytest.mark.parametrize(
    "name, file, rows, what",
    [
        (
            "piqa",
            "bench/piqa_valid.jsonl",
            [{"goal": "g", "sol1": "a", "sol2": "b"}],
            "row 1 .*no 'label'; its keys: goal",
        ),
        ("gsm8k", "bench/gsm8k_test.jsonl", [GSM, {"question": "?", "answer": "7"}], "row 2 .*no #### line"),
        ("arc_easy", "bench/arc_easy_test.jsonl", [{"query": "?", "choices": ["a"], "gold": 1}], "answer 1 of 1"),
    ],
)
def test_rows_of_another_shape_are_refused(tmp_path, name, file, rows, what):
    path = put(tmp_path, file, rows)
    with pytest.raises(DataError, match=what) as caught:
        load(name, "bench", folder=tmp_path)
    assert caught.value.where == str(path) and "wanted: " in caught.value.remedy


def test_a_babi_file_without_questions_is_refused(tmp_path):
    put(tmp_path, "babi/qa1_train.txt", "1 Mary went home.\n")
    with pytest.raises(DataError, match="no questions"):
        load("babi", folder=tmp_path)


def test_mistyped_folders_and_names_are_told(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no folder"):
        load("gsm8k", folder=tmp_path / "none")
    with pytest.raises(DataError, match="is a file"):
        load("gsm8k", folder=put(tmp_path, "file", "x"))
    monkeypatch.setenv("AGENT_FORGE_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match="AGENT_FORGE_DATA: no folder"):
        load("gsm8k")
    with pytest.raises(ConfigError, match="did you mean gsm8k"):
        load("gsm8")


def test_available_says_where_or_why_not(tmp_path):
    put(tmp_path, "bench/gsm8k_test.jsonl", [GSM])
    put(tmp_path, "gsm8k/train.jsonl", [GSM])
    rows = {row.name: row for row in available(tmp_path)}
    assert list(rows) == list(DATASETS) and all(row.license and row.kind for row in rows.values())
    assert rows["gsm8k"].found and "train: " in rows["gsm8k"].where and "bench: " in rows["gsm8k"].where
    assert rows["gym"].found and rows["gym"].where == "train: embedded"
    assert not rows["boolq"].found
    assert rows["boolq"].where == f"not in {tmp_path}; hub google/boolq; fallback gym"
    assert "AGENT_FORGE_DATA not set" in {row.name: row for row in available()}["boolq"].where


def test_every_declared_set_holds_together():
    for name in DATASETS:
        spec = DATASETS.get(name)
        assert spec.name == name and spec.to_text in ROW_READERS and (spec.embedded or spec.fallback in DATASETS)


def test_splits_depend_on_content_and_seed_only():
    rows = [{"text": f"document {i}"} for i in range(2000)]
    parts = split_rows(rows, 0)
    assert sum(map(len, parts.values())) == 2000
    assert 20 <= len(parts["select"]) <= 60 and 20 <= len(parts["report"]) <= 60
    home = {row["text"]: split for split, part in parts.items() for row in part}
    for split, part in split_rows(reversed(rows[:500]), 0).items():
        assert all(home[row["text"]] == split for row in part)
    assert split_rows(rows, 1) != parts
    asked = [{"prompt": f"Q  {i}?", "answer": "1"} for i in range(99)] + [{"prompt": f"q {i}?"} for i in range(99)]
    for part in split_rows(asked, 5, {"a": 0.5, "b": 0.5}).values():
        prompts = sorted(" ".join(row["prompt"].lower().split()) for row in part)
        assert prompts and prompts[::2] == prompts[1::2]
    assert split_rows(rows[:9], 0, {"a": 1.0, "b": 0.0}) == {"a": rows[:9], "b": []}
    with pytest.raises(ConfigError, match="sum to 1"):
        split_rows(rows, 0, {"a": 0.5})


# --- the hub: a real HTTP server stands for its address, a small package for the client that is not installed ---------

CLIENT = """
from datasets import exceptions
def load_dataset(path, config, split, streaming):
    if path == "openai/gsm8k" and config == "main" and split == "train":
        return iter([{"question": f"Number {i}?", "answer": f"#### {i}"} for i in range(9)])
    raise exceptions.DatasetsError(f"no\\nconfig {config}")
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path in ("/api/datasets/openai/gsm8k", "/api/datasets/google/boolq")
            self.send_response(200 if known else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    package = tmp_path / "client" / "datasets"
    put(package, "__init__.py", CLIENT)
    put(package, "exceptions.py", "class DatasetsError(Exception):\n    pass\n")
    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    for name in ("datasets", "datasets.exceptions"):
        monkeypatch.delitem(catalogue.sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(package.parent)
    yield server
    server.shutdown()
    server.server_close()
    for name in ("datasets", "datasets.exceptions"):
        catalogue.sys.modules.pop(name, None)


def test_the_hub_serves_what_is_not_local(hub, tmp_path):
    loaded = load("gsm8k", folder=tmp_path, limit=4)
    assert loaded.source == "hub" and loaded.path == "hf://datasets/openai/gsm8k"
    assert [row["answer"] for row in loaded.rows] == ["0", "1", "2", "3"]
    assert load("gsm8k").row_count == 9
    assert load("gsm8k", allow_hub=False, limit=1).source == "fallback"


def test_hub_failures_are_reasons_not_crashes(hub, monkeypatch):
    assert "the hub failed (DatasetsError: no config None)" in load("boolq", limit=1).note
    assert "the hub failed (HTTPError: HTTP Error 404" in load("svamp", limit=1).note
    hub.server_close()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the hub failed (URLError" in load("gsm8k", limit=1).note
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "the hub not asked (HF_HUB_OFFLINE is set)" in load("gsm8k", limit=1).note


def test_without_the_client_the_hub_is_not_asked(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda name: None)
    assert "datasets is not installed" in load("gsm8k", limit=1).note


@pytest.mark.skipif(not REAL, reason="AGENT_FORGE_DATA is not set")
def test_real_files_all_load():
    for row in available(REAL):
        for split in ("train", "valid", "bench"):
            if f"{split}: " in row.where and (row.name, split) != ("piqa", "bench"):  # PIQA's public file has no labels
                assert load(row.name, split, folder=REAL, limit=50).row_count > 0
