"""Packed folders are told by config.json alone; who needs floats is led to the dense copy, or to a way to one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from forgekit.errors import ArtifactError
from forgekit.store.artifact import Artifact, Manifest, write_artifact
from forgekit.store.packed import SECTION, dense_copy, is_packed_folder, refuse_packed, says_packed, way_to_dense

PACKED = json.dumps({"model_type": "gpt", SECTION: {"layout": 1}})


def make(folder: Path, config: str, **metadata) -> Artifact:
    """An artifact with this config.json."""
    about = {"model_id": f"bitnet_{folder.name}_20260102_030405", "parameters": 3, **metadata}
    about = {"created_at": "2026-01-02T03:04:05", "size_mb": 0.0, **about}
    manifest = Manifest.describe("run-1", "bitnet", folder.name, about)
    return write_artifact(folder, lambda work: (work / "config.json").write_text(config), manifest)


@pytest.mark.parametrize(
    ("text", "found"),
    [(PACKED, True), ("{}", False), ('{"model_type": "gpt"}', False), ("[1]", False), ("{", False), ("\xff", False)],
)
def test_config_json_says_it(text, found, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert is_packed_folder(tmp_path) == found
    assert not is_packed_folder(tmp_path / "nowhere")


def test_the_section_is_the_one_that_packed_files_have():
    from forgekit.quant import files

    assert files.SECTION == SECTION and says_packed({SECTION: {}}) and not says_packed([SECTION])


def test_the_dense_copy_is_the_newest_neighbour_that_names_it(tmp_path):
    small = make(tmp_path / "small", PACKED)
    name = small.manifest.model_id
    assert dense_copy(small.path) is None
    make(tmp_path / "b", "{}", packed_model=name, created_at="2026-01-02T03:04:06")
    make(tmp_path / "a", "{}", packed_model=name)
    make(tmp_path / "c", "{}", packed_model="bitnet_other_20260102_030405", created_at="2026-01-02T03:04:07")
    make(tmp_path / "d", "{}", created_at="2026-01-02T03:04:07")
    assert dense_copy(small.path) == tmp_path / "b"
    (tmp_path / "b" / "manifest.json").write_text("{")
    assert dense_copy(small.path) == tmp_path / "a", "a damaged neighbour is passed over"
    (small.path / "manifest.json").write_text("{")
    assert dense_copy(small.path) is None
    assert dense_copy(tmp_path / "nowhere") is None


def test_who_needs_floats_refuses_it_and_names_the_way(tmp_path, monkeypatch):
    small = make(tmp_path / "small", PACKED)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        refuse_packed("small", "merged")
    way = "make a dense copy: agent-forge export small --format hf --output small-dense"
    assert str(caught.value) == f"small: its weights are packed: it can be run, not merged; {way}"
    monkeypatch.chdir(tmp_path / "small")
    assert way_to_dense(Path(".")).endswith("--output small-dense"), "a folder has a name wherever one stands"
    make(tmp_path / "dense", "{}", packed_model=small.manifest.model_id)
    with pytest.raises(ArtifactError, match=f"not trained; use its dense copy {tmp_path / 'dense'}"):
        refuse_packed(small.path, "trained")
    refuse_packed(tmp_path / "dense", "merged")
    refuse_packed(tmp_path / "nowhere", "merged")


def test_no_torch_is_needed_to_tell():
    code = "import sys, forgekit.store.packed; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
