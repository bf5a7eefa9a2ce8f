"""Reading rows from every format, refusing broken files in one line, and token bins."""

import builtins
import gzip
import json
import lzma
import os

import numpy as np
import pytest

from forgekit.data import formats
from forgekit.data.formats import LRUCache, TokenBin, is_readable, read_rows, row_text
from forgekit.errors import DataError, ResourceError

ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": "ü"}, {"a": 3, "b": "two\nlines"}]


def put(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    "name, text",
    [
        ("list.json", json.dumps(ROWS)),
        ("pretty.json", "\n" + json.dumps(ROWS, indent=2) + "\n"),
        ("data.json", json.dumps({"version": 1, "data": ROWS})),
        ("rows.json", json.dumps({"rows": ROWS})),
        ("hub.json", json.dumps({"rows": [{"row_idx": i, "row": row} for i, row in enumerate(ROWS)]})),
        ("lines_inside.json", "\n".join(map(json.dumps, ROWS))),
        ("lines.jsonl", "\n\n".join(map(json.dumps, ROWS)) + "\n"),
        ("windows.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, ROWS))),
    ],
)
def test_json_shapes_give_equal_rows(tmp_path, name, text):
    assert list(read_rows(put(tmp_path, name, text))) == ROWS


@pytest.mark.parametrize("ending, pack", [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_compressed_text_is_read(tmp_path, ending, pack):
    path = put(tmp_path, f"r.jsonl{ending}", pack("\n".join(map(json.dumps, ROWS)).encode()))
    assert list(read_rows(path)) == ROWS
    assert is_readable(path) and not is_readable(tmp_path / f"r.parquet{ending}")


def test_csv_keeps_quoted_line_breaks_and_long_fields(tmp_path):
    long = "y" * 200_000
    path = put(tmp_path, "r.csv", f'text,label\r\n"one\r\ntwo, three",1\r\n{long},2\r\n')
    assert list(read_rows(path)) == [{"text": "one\ntwo, three", "label": "1"}, {"text": long, "label": "2"}]


def test_tsv_takes_quotes_literally(tmp_path):
    assert list(read_rows(put(tmp_path, "r.tsv", 'a\tb\n"open\t1\n'))) == [{"a": '"open', "b": "1"}]


def test_text_is_split_at_marker_lines_only(tmp_path):
    path = put(tmp_path, "r.txt", "first <|endoftext|> not here\nmore\n<|endoftext|>\n\n<|endoftext|>\nsecond\n")
    assert list(read_rows(path)) == [{"text": "first <|endoftext|> not here\nmore"}, {"text": "second"}]
    assert list(read_rows(put(tmp_path, "whole.txt", "a\n\nb\n"))) == [{"text": "a\n\nb"}]


def test_reading_is_lazy_and_limited(tmp_path):
    path = put(tmp_path, "r.jsonl", '{"a": 1}\n{"a": 2}\nbroken\n')
    assert list(read_rows(path, limit=2)) == [{"a": 1}, {"a": 2}]
    assert next(read_rows(put(tmp_path, "r.json", '[{"a": 1}, broken]'))) == {"a": 1}


BROKEN = [
    ("empty.jsonl", b"", "is empty", "at least one row"),
    ("blank.jsonl", b"\n \n", "holds no rows", ""),
    ("none.json", b"[ ]", "holds no rows", ""),
    ("space.json", b" \n", "holds no rows", ""),
    ("header.csv", b"a,b\n", "holds no rows", ""),
    ("nul.txt", b"ab\0c", "binary, not text (NUL at byte 2)", "UTF-8"),
    ("late_nul.jsonl", b'{"a": 1}\n' + b" " * 9000 + b"\0", "NUL at byte 9009", ""),
    ("latin.jsonl", b'{"a": 1}\n{"b": "\xfc"}', "not UTF-8 at byte 16", "save the file as UTF-8"),
    ("bom.txt", b"\xef\xbb\xbfab\xff", "not UTF-8 at byte 5", ""),
    ("line.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is malformed", "mend or remove"),
    ("scalar.jsonl", b'{"a": 1}\n3\n', "line 2 holds a int", "key"),
    ("list.json", b'[{"a": 1},\n {"a" 2}]', "line 2 is malformed", ""),
    ("comma.json", b'[{"a": 1}\n{"a": 2}]', "expecting ','", ""),
    ("open.json", b'[{"a": 1}', "malformed", ""),
    ("after.json", b'[{"a": 1}]\n x', "extra data 'x'", ""),
    ("scalars.json", b"[1, 2]", "row 1 holds a int", ""),
    ("inner.json", b'{"data": [{"a": 1}, 2]}', "row 2 holds a int", ""),
    ("number.json", b"17", "the file holds a int", ""),
    ("object.json", b'{"x": 1, "y": 2}', "one object with the keys x, y", '"data"'),
    ("broken.json", b'{"data": [', "line 1 is malformed", ""),
    ("fields.csv", b"a,b\n1,2\n3\n", "line 3 is malformed: 1 fields where 2 are named", ""),
    ("twice.csv", b"a,a\n1,2\n", "two columns have one name", ""),
    ("quote.csv", b'a,b\n"1,2\n', "malformed: unexpected end of data", ""),
    ("cut.jsonl.xz", lzma.compress(b'{"a": 1}\n' * 500)[:-30], "damaged .xz archive", "again"),
    ("cut.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 500)[:-9], "damaged .gz archive", ""),
    ("not.txt.gz", b"plain", "damaged .gz archive", ""),
    ("r.jsnl", b"{}", "unknown file ending '.jsnl'", ".jsonl"),
    ("r.zzzzzz", b"{}", "unknown file ending", "use one of"),
    ("r.parquet.gz", b"x", ".parquet cannot be read from inside .gz", "unpack"),
]


@pytest.mark.parametrize("name, data, what, remedy", BROKEN, ids=[case[0] for case in BROKEN])
def test_broken_files_are_told_in_one_line(tmp_path, name, data, what, remedy):
    path = put(tmp_path, name, data)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert what in caught.value.what and remedy in caught.value.remedy and caught.value.remedy
    assert str(path) == caught.value.where and "\n" not in str(caught.value)


def test_missing_files_folders_and_forbidden_ones(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "none.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path / "folder.json")
    put(tmp_path, "file", "x")
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "file" / "inner.json")
    gone = put(tmp_path, "gone.jsonl", "{}")
    rows = read_rows(gone)
    gone.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        list(rows)


@pytest.mark.parametrize("name, package", [("r.parquet", "pyarrow"), ("r.h5", "h5py")])
def test_missing_packages_say_what_to_install(tmp_path, monkeypatch, name, package):
    real = builtins.__import__

    def without(module, *rest):
        if module.split(".")[0] == package:
            raise ImportError(module)
        return real(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=package) as caught:
        list(read_rows(put(tmp_path, name, b"x")))
    assert "pip install agent-forge[data]" in caught.value.remedy


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"text": f"row {i}", "choices": {"label": ["A"], "n": i}} for i in range(3000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert list(read_rows(tmp_path / "r.parquet")) == rows
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_rows(put(tmp_path, "bad.parquet", b"PAR1 no")))


def test_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "r.h5", "w") as file:
        file["text"] = [f"row {i} ü" for i in range(2000)]
        file["ids"] = np.arange(4000).reshape(2000, 2)
        file["scalar"] = 3
    rows = list(read_rows(tmp_path / "r.h5"))
    assert len(rows) == 2000 and rows[1999] == {"text": "row 1999 ü", "ids": [3998, 3999]}
    with h5py.File(tmp_path / "uneven.hdf5", "w") as file:
        file["a"], file["b"] = [1, 2], [1]
    with pytest.raises(DataError, match="differ in length .a 2, b 1."):
        list(read_rows(tmp_path / "uneven.hdf5"))
    with h5py.File(tmp_path / "none.h5", "w") as file:
        file.create_group("g")
    with pytest.raises(DataError, match="holds no rows"):
        list(read_rows(tmp_path / "none.h5"))
    with pytest.raises(DataError, match="not a readable HDF5 file"):
        list(read_rows(put(tmp_path, "bad.h5", b"nothing")))


def test_row_text_joins_prompt_and_answer():
    assert row_text({"text": "t"}) == "t"
    assert row_text({"prompt": "1+1=", "answer": "2"}) == "1+1= 2"
    assert row_text({"prompt": "write\n", "answer": "code"}) == "write\ncode"


@pytest.mark.parametrize("vocab, size", [(65535, 2), (65536, 4)])
def test_token_bin_round_trip(tmp_path, vocab, size):
    tokens = np.random.default_rng(0).integers(0, vocab, 1000)
    tokens[0] = vocab - 1
    bin = TokenBin.write(tmp_path / "t.bin", tokens, vocab)
    assert len(bin) == 1000 and bin[0] == vocab - 1 and (bin[10:20] == tokens[10:20]).all()
    assert isinstance(bin[10:20], np.memmap) and not bin[10:20].flags.writeable
    assert (tmp_path / "t.bin").stat().st_size == 1000 * size
    assert sorted(os.listdir(tmp_path)) == ["t.bin", "t.bin.json"]
    bin.verify()


def test_token_bin_takes_pieces_of_any_kind(tmp_path):
    bin = TokenBin.write(tmp_path / "t.bin", iter([np.array([1, 2]), [3], [], 4]), 10)
    assert bin[:].tolist() == [1, 2, 3, 4] and bin.vocab_size == 10


@pytest.mark.parametrize(
    "tokens, what", [([1, 10], "token id 10"), ([-1], "token id -1"), ([0.5], "float64"), ([], "no tokens")]
)
def test_token_bin_refuses_wrong_tokens_and_leaves_the_old_bin(tmp_path, tokens, what):
    TokenBin.write(tmp_path / "t.bin", [7], 10)
    with pytest.raises(DataError, match=what):
        TokenBin.write(tmp_path / "t.bin", np.array(tokens), 10)
    assert TokenBin(tmp_path / "t.bin")[:].tolist() == [7]
    assert sorted(os.listdir(tmp_path)) == ["t.bin", "t.bin.json"]


def test_damaged_token_bins_are_told(tmp_path):
    path = tmp_path / "t.bin"
    with pytest.raises(DataError, match="no such token bin"):
        TokenBin(path)
    bin = TokenBin.write(path, np.arange(100), 200)
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with pytest.raises(DataError, match="content differs"):
        bin.verify()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="holds 199 bytes where 200 were written"):
        TokenBin(path)
    header = tmp_path / "t.bin.json"
    for text in ("{", "[]", '{"dtype": "float32", "count": 1}', '{"dtype": "uint16", "count": "x"}', "{}"):
        header.write_text(text)
        with pytest.raises(DataError, match="not a token bin's header"):
            TokenBin(path)
    header.unlink()
    with pytest.raises(DataError, match="not finished"):
        TokenBin(path)
    header.mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        TokenBin(path)


def test_token_bin_without_its_data_or_a_place(tmp_path):
    TokenBin.write(tmp_path / "t.bin", [1], 2)
    (tmp_path / "t.bin").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        TokenBin(tmp_path / "t.bin")
    with pytest.raises(ResourceError, match="cannot be written"):
        TokenBin.write(tmp_path / "none" / "t.bin", [1], 2)


def test_interrupted_replacement_never_pairs_a_bin_with_another_header(tmp_path, monkeypatch):
    path = tmp_path / "t.bin"
    TokenBin.write(path, [1, 1], 9)
    monkeypatch.setattr(formats.json, "dumps", lambda *a, **k: 1 / 0)  # dies after the bin, before its header
    with pytest.raises(ZeroDivisionError):
        TokenBin.write(path, [2, 2], 9)
    with pytest.raises(DataError, match="not finished"):
        TokenBin(path)


def test_lru_cache_forgets_the_least_recently_used():
    cache = LRUCache(10)
    cache.put("a", 1, 4)
    cache.put("b", 2, 4)
    assert cache.get("a") == 1
    cache.put("c", 3, 4)
    assert cache.get("b") is None and cache.get("a") == 1 and cache.get("c") == 3
    cache.put("a", 5, 2)
    cache.put("d", 6, 4)
    assert [cache.get(key) for key in "acd"] == [5, 3, 6]
    cache.put("huge", 7, 11)
    assert cache.get("huge") is None and cache.get("a") == 5
