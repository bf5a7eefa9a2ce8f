"""Quality filter, duplicates, and the check of training text against benchmarks."""

import json
import random

import numpy as np
import pytest

from forgekit.data.contamination import bench_texts, check, check_catalogue, ngram_index, scan
from forgekit.data.quality import NearDuplicates, QualityConfig, clean, flaw, jaccard, words
from forgekit.errors import ConfigError, DataError

PROSE = "The keeper climbed the tower at dusk, lit the lamp, and wrote the weather into his book."


def vocabulary(seed, size=3000):
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(size)]


def document(draw, pool, length):
    return " ".join(draw.choices(pool, k=length))


@pytest.mark.parametrize(
    "text, reason",
    [
        (PROSE, None),
        ("Too small.", "too short"),
        (PROSE * 20, "too long"),
        ("1234 5678 9012 3456 7890 is a number", "few letters"),
        ("words +-*/ between =<> many {}[] symbols ;;;; !!!!! ????? here", "many symbols"),
        ("one good line\nanother line\none good line\none good line\n", "repeated lines"),
        ("def twice(x):\n    if x > 3:\n        return x * 2\n    return [y for y in range(x)]\n", None),
        ("          \n" * 5, "few letters"),
    ],
)
def test_every_rule_has_a_text_that_breaks_it(text, reason):
    assert flaw(text, QualityConfig(max_chars=1000)) == reason


def test_cleaning_reports_a_reason_per_dropped_row():
    near = f"{PROSE} {PROSE.upper()} Nobody came."
    rows = [
        {"text": PROSE},
        {"prompt": "Who lit the lamp at dusk?", "answer": "the keeper"},
        {"text": "no"},
        {"text": f"  {PROSE.upper()}\n"},
        {"prompt": "Who lit the lamp at dusk?", "answer": "The  keeper"},
        {"text": near},
        {"text": near.replace("Nobody", "Someone")},
    ]
    kept, report = clean(rows)
    assert kept == [rows[0], rows[1], rows[5]]
    assert report.dropped == [(2, "too short"), (3, "exact duplicate"), (4, "exact duplicate"), (6, "near duplicate")]
    assert report.counts == {"too short": 1, "exact duplicate": 2, "near duplicate": 1}
    assert (report.total, report.kept) == (7, 3)
    assert len(clean(rows, QualityConfig(near_duplicates=False))[0]) == 4


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="threshold"):
        QualityConfig.build({"threshold": 1.5})


def exact_similarity(left, right):
    grams = [{tuple(found[i : i + 5]) for i in range(len(found) - 4)} for found in (words(left), words(right))]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_near_duplicates_agree_with_the_exact_similarity():
    draw, pool = random.Random(1), vocabulary(1)
    found, tried = {True: 0, False: 0}, {True: 0, False: 0}
    for number in range(150):
        original = document(draw, pool, 300)
        changed = original.split()
        for place in draw.sample(range(300), k=number % 15):
            changed[place] = "changed"
        changed = " ".join(changed)
        alike = exact_similarity(original, changed) >= 0.8
        index = NearDuplicates(0.8, seed=number)
        assert index.find_or_add(original) is None
        tried[alike] += 1
        found[alike] += index.find_or_add(changed) == 0
    assert min(tried.values()) > 20
    assert found[False] == 0 and found[True] >= 0.97 * tried[True]


def test_near_duplicates_name_the_first_and_take_texts_of_any_length():
    draw, pool = random.Random(2), vocabulary(2)
    index = NearDuplicates()
    texts = [document(draw, pool, 50) for _ in range(200)]
    assert [index.find_or_add(text) for text in texts] == [None] * 200
    assert [index.find_or_add(text.title() + "!") for text in texts] == list(range(200))
    assert index.find_or_add("two words") is None and index.find_or_add("Two, words") == 200
    assert index.find_or_add("two word") is None
    assert index.find_or_add("...") is None and index.find_or_add("...") is None


def test_a_shared_template_is_no_duplicate():
    template = "Please answer the following question with true or false and give your reasons, question: "
    draw, pool = random.Random(3), vocabulary(3)
    rows = [{"text": f"{template} {document(draw, pool, 8)}"} for _ in range(1500)]
    assert len(clean(rows)[0]) == 1500


def test_cleaning_is_deterministic_and_jaccard_right():
    assert jaccard(np.array([1, 2, 3]), np.array([2, 3, 4])) == 0.5
    rows = [{"text": f"{PROSE} {i // 2} {PROSE}"} for i in range(20)]
    assert clean(rows) == clean(rows)


BENCHMARKS = {
    "long": ["A clever robot measured seventeen yellow stones beside the quiet river before the morning rain began."],
    "short": ["What colour is the moon?", "Name the largest lake."],
    "empty": ["???"],
}


def test_thirteen_words_in_a_row_are_a_hit_twelve_are_not():
    item = words(BENCHMARKS["long"][0])
    report = check(["so " + ", ".join(item[2:15]).upper() + " end"], BENCHMARKS)
    assert report.benchmarks["long"].hits == 1 and report.benchmarks["long"].share == 1.0
    assert report.benchmarks["long"].examples == ((0, " ".join(item[2:15])),)
    assert not report.clean
    assert check(["so " + " ".join(item[2:14]) + " end"], BENCHMARKS).clean


def test_short_items_must_occur_whole_and_within_one_document():
    report = check(["he asked: what colour is the MOON tonight", "nothing"], BENCHMARKS)
    assert report.benchmarks["short"].hits == 1 and report.benchmarks["short"].share == 0.5
    assert report.benchmarks["short"].examples == ((0, "what colour is the moon"),)
    assert check(["what colour is", "the moon"], BENCHMARKS).clean
    assert check(["what colour is the sun"], BENCHMARKS).clean
    assert check([], BENCHMARKS).benchmarks["empty"].items == 1


def test_hits_agree_with_a_plain_search():
    draw, pool = random.Random(4), vocabulary(4, 40)
    items = [document(draw, pool, draw.randint(1, 9)) for _ in range(200)]
    texts = [document(draw, pool, draw.randint(1, 60)) for _ in range(200)]
    wanted = set()
    for number, item in enumerate(items):
        found = item.split()
        length = min(3, len(found))
        grams = [f" {' '.join(found[i : i + length])} " for i in range(len(found) - length + 1)]
        if any(gram in f" {text} " for gram in grams for text in texts):
            wanted.add(number)
    split = {"a": items[:80], "b": items[80:]}
    overlaps = check(texts, split, n=3).benchmarks
    assert 0 < len(wanted) < 200
    assert (overlaps["a"].hits, overlaps["b"].hits) == (sum(i < 80 for i in wanted), sum(i >= 80 for i in wanted))
    assert [index for index, _ in overlaps["b"].examples] == sorted(i - 80 for i in wanted if i >= 80)[:5]


def test_many_texts_are_scanned_and_batches_lose_nothing(monkeypatch):
    draw, pool = random.Random(5), vocabulary(5)
    texts = [document(draw, pool, 2000) for _ in range(100)]
    benchmarks = {str(k): [document(draw, pool, 30) for _ in range(200)] for k in range(13)}
    benchmarks["3"][7] = " ".join(texts[90].split()[500:520])
    index = ngram_index(benchmarks)
    report = scan(index, texts)
    assert {name: o.hits for name, o in report.benchmarks.items() if o.hits} == {"3": 1}
    monkeypatch.setattr("forgekit.data.contamination._BATCH_CHARS", 1000)
    assert scan(index, texts) == report


def put(root, name, rows):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("AGENT_FORGE_DATA", raising=False)
    ask = "Which of these forces pulls a falling apple down"
    put(tmp_path, "bench/arc_test.jsonl", [{"query": f"Question: {ask}?", "choices": ["a", "b"], "gold": 0}])
    put(tmp_path, "bench/piqa.jsonl", [{"goal": "Dry it", "sol1": "in the warm sun", "sol2": "in water"}])
    put(
        tmp_path,
        "bench/winogrande.jsonl",
        [{"context_options": ["Ann met Eve. Ann", "x"], "continuation": "smiled at her", "gold": 0}],
    )
    put(tmp_path, "bench/svamp.jsonl", [{"Body": "Bo had nine pens and lost two.", "Question": "How many are left?"}])
    put(
        tmp_path,
        "bench/hella.jsonl",
        [{"question": "Open it", "choices": {"A": "with the small key", "B": "never"}, "answer": "A"}],
    )
    leak = {"question": f"{ask}?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    short = leak | {"question": "What falls?", "choices": {"text": ["ripe apples", "kites"], "label": ["A", "B"]}}
    put(tmp_path, "bench/short.jsonl", [{"query": "What falls?", "choices": ["ripe apples", "kites"], "gold": 0}])
    put(tmp_path, "arc_easy/train.jsonl", [leak, short])
    put(tmp_path, "gsm8k/train.jsonl", [{"question": "Other?", "answer": "Ann met Eve. Ann smiled at her.\n#### 1"}])
    return tmp_path


def test_catalogue_sets_are_checked_against_every_benchmark_present(folder):
    rows = {(row.name, row.benchmark): row for row in check_catalogue(folder, ["arc_easy", "gsm8k"])}
    hits = {key for key, row in rows.items() if row.overlap.hits}
    assert len(rows) == 12
    assert hits == {("arc_easy", "arc_test"), ("arc_easy", "short"), ("gsm8k", "winogrande")}


def test_an_item_is_its_question_or_all_of_a_short_one(folder):
    texts = {name: words(items[0]) for name, items in bench_texts(folder).items()}
    assert " ".join(texts["arc_test"]) == "which of these forces pulls a falling apple down"
    assert " ".join(texts["piqa"]) == "dry it in the warm sun in water"
    assert " ".join(texts["hella"]) == "open it with the small key never"
    assert " ".join(texts["svamp"]) == "bo had nine pens and lost two how many are left"


def test_what_is_not_on_disk_is_not_called_clean(folder):
    rows = check_catalogue(folder, ["tinystories", "gym"])
    told = {(row.name, row.overlap is None): row.reason for row in rows}
    assert "no train split" in told["tinystories", True] and told["gym", False] == ""


def test_a_set_without_fallback_is_reported_too(folder, monkeypatch):
    from forgekit.data.catalogue import DATASETS, DatasetSpec

    bare = DatasetSpec(name="bare", kind="text", license="MIT")
    monkeypatch.setitem(DATASETS._items, "bare", bare)
    (row, *_) = check_catalogue(folder, ["bare"])
    assert row.overlap is None and "missing data set" in row.reason


def test_a_folder_without_benchmarks_cannot_tell(tmp_path):
    with pytest.raises(DataError, match="no benchmark files"):
        check_catalogue(tmp_path, ["gym"])
    put(tmp_path, "bench/odd.jsonl", [{"x": 1}])
    with pytest.raises(DataError, match="no question among the fields x"):
        bench_texts(tmp_path)
