"""Prose and code of the Python installation."""

import pytest

from forgekit.data.python_corpus import library_folder, python_code, python_prose
from forgekit.errors import DataError

DOC = "A sentence that is certainly long enough to be kept, because it goes on and on and on and on."


@pytest.fixture
def library(tmp_path):
    def put(name, text, encoding="utf-8"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode(encoding))

    inner = f'class A:\n    """Short."""\n    if 1:\n        def f():\n            """{DOC}\n\n            deep"""\n'
    put("one.py", f'"""{DOC} one"""\n{inner}')
    put("twin.py", f'"""{DOC} one"""\n')
    put("this.py", 's = """' + "Gur Mra bs Clguba, ol Gvz Crgref. " * 4 + '"""\n')
    put("pydoc_data/topics.py", f"topics = {{'a': '{DOC} topic'}}\n")
    put("LICENSE.txt", f"{DOC} licence\n")
    put("nul.py", f'"""\\0 {DOC} nul"""\n')
    put("surrogate.py", f'"""\\ud800 {DOC} surrogate"""\n')
    put("broken.py", f'"""{DOC} broken"""\ndef (:\n')
    put("latin.py", f'# coding: utf-8\n"""{DOC} ü"""\n', "latin-1")
    put("test/inner.py", f'"""{DOC} test"""\n')
    put("site-packages/x.py", f'"""{DOC} package"""\n')
    put("_sysconfigdata_x.py", f'"""{DOC} build"""\n')
    put("encodings/cp1.py", f'"""{DOC} table"""\n')
    put("Grammar.txt", f"{DOC} grammar\n")
    return tmp_path


def test_prose_is_cleaned_deduplicated_and_complete(library):
    zen = ("The Zen of Python, by Tim Peters. " * 4).strip()
    wanted = {f"{DOC} one", f"{DOC}\n\ndeep", f"{DOC} topic", f"{DOC} licence", zen}
    found = python_prose(root=library)
    assert {text.strip() for text in found} == wanted and len(found) == len(wanted)


def test_code_leaves_out_tests_tables_and_topics(library):
    found = "".join(python_code(root=library))
    assert "deep" in found and "broken" in found
    assert not any(word in found for word in ("test", "package", "build", "table", "topic", "ü"))


def test_long_sources_are_cut_before_definitions_and_lose_nothing(tmp_path):
    source = "import os\n\n" + "\n\n".join(f"@keep\ndef f{i}():\n    return {'x' * 200!r}\n" for i in range(100))
    (tmp_path / "long.py").write_text(source)
    parts = python_code(root=tmp_path)
    assert len(parts) > 3 and all(part.startswith(("@keep", "import os")) for part in parts)
    parts.sort(key=source.index)
    assert "".join(parts) == source and all(4096 <= len(part) < 5000 for part in parts[:-1])


def test_order_is_the_seeds_and_the_limit_holds(library):
    assert python_prose(root=library, seed=3) == python_prose(root=library, seed=3)
    assert len({tuple(python_prose(root=library, seed=seed)) for seed in range(8)}) > 1
    some = python_prose(300, root=library)
    assert some and sum(len(text.encode()) for text in some) <= 300
    assert python_prose(110, root=library)  # documents larger than the limit are passed over, not an end


def test_an_installation_without_sources_is_told(tmp_path):
    (tmp_path / "only.pyc").write_bytes(b"\0")
    for texts, kind in ((python_prose, "prose"), (python_code, "code")):
        with pytest.raises(DataError, match=f"holds no Python {kind}"):
            texts(root=tmp_path)


def test_this_installation():
    if not (library_folder() / "pydoc.py").exists():
        pytest.skip("this Python ships no sources")
    prose = python_prose()
    assert sum(len(text.encode()) for text in prose) > 1_000_000
    assert min(map(len, prose)) >= 80 and len(set(prose)) == len(prose)
    assert any("Zen of Python" in text for text in prose)
    code = python_code()
    assert sum(len(text.encode()) for text in code) > 4_000_000
    assert not any("_sysconfigdata" in text[:200] for text in code)
