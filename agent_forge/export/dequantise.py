"""Packed models as a source of exports: the same model in plain weights, in a folder that is gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from agent_forge.merging.folders_weights import WeightFolder
from forgekit.compute.disk import require_free
from forgekit.errors import ArtifactError
from forgekit.store.artifact import MANIFEST, Artifact
from forgekit.store.fsio import disk_errors, make_folder, remove_tree, temporary_for
from forgekit.store.packed import is_packed_folder

_FLOAT = 4
"""Bytes of a plain weight."""
_ROUNDED = "it also rounds activations to 8 bits, which plain weights do not, so answers may differ a little"


@contextmanager
def plain_source(source: Path, output: Path) -> Iterator[tuple[WeightFolder, str]]:
    """A model folder, opened, and nothing to tell; of a packed one, a copy in float32 and what to tell about it.

    The copy lies beside ``output`` until the block is left.

    Raises:
        ArtifactError: it is incomplete or damaged, or has sub-layer norms, which plain modules have not.
        ResourceError: the disk is full or may not be written to.
    """
    if not is_packed_folder(source):
        yield WeightFolder.open(source, source.name), ""
        return
    artifact = Artifact.open(source, verify=False) if (source / MANIFEST).is_file() else None
    make_folder(output.parent)
    work = temporary_for(output)
    try:
        with disk_errors(output.parent):
            work.mkdir()
            note = _fill(source, output, work)
        yield replace(WeightFolder.open(work, source.name), artifact=artifact), note
    finally:
        if work.exists():
            remove_tree(work)


def _fill(source: Path, output: Path, work: Path) -> str:
    """Write the plain model and the files that go with it; what to tell about it."""
    from agent_forge.export.hf import check_vocabulary
    from forgekit.models.io import read_model, write_model
    from forgekit.models.unpacked import rounds_activations, unpacked
    from forgekit.quant.model import logical_parameters

    model, tokenizer = read_model(source)
    check_vocabulary(tokenizer, model.config.vocab_size, source)
    rounds = rounds_activations(model)
    require_free(output, 2 * _FLOAT * logical_parameters(model), "the plain weights, twice")
    try:
        write_model(unpacked(model), None, work)
    except ArtifactError as error:
        raise ArtifactError(f"{error.where}: {error.what}", where=str(source), remedy=error.remedy) from None
    made = {MANIFEST, *(path.name for path in work.iterdir())}
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in made:
            (work / path.name).write_bytes(path.read_bytes())
    note = f"{source.name} is packed: written are the numbers that its codes stand for"
    return f"{note}; {_ROUNDED}" if rounds else note
