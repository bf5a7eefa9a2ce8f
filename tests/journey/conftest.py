"""One real run that the tests of this folder look at from all sides."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import made_once, run_cli, small_profile


@dataclass(frozen=True)
class Journey:
    """A finished session made by the command line.

    Attributes:
        home: working folder; the storage is ``home/storage``.
        profile: the profile file it ran.
        run: what ``run --json`` printed.
    """

    home: Path
    profile: Path
    run: dict[str, Any]

    @property
    def session(self) -> str:
        return self.run["session_id"]

    @property
    def result(self) -> dict[str, Any]:
        return self.run["results"]["cognate"]

    @property
    def merged(self) -> dict[str, Any]:
        """Phase 2's result."""
        return self.run["results"]["evomerge"]

    @property
    def thinking(self) -> dict[str, Any]:
        """Phase 3's result."""
        return self.run["results"]["quietstar"]

    @property
    def ternary(self) -> dict[str, Any]:
        """Phase 4's result."""
        return self.run["results"]["bitnet"]

    @property
    def evidence(self) -> list[dict[str, Any]]:
        """Everything that was claimed, in the order of the phases."""
        return [item for result in self.run["results"].values() for item in result["evidence"]]

    def folder(self, model: str) -> Path:
        """The artifact folder of a model, by its name."""
        later = {"champion": "phase2_evomerge", "thinker": "phase3_quietstar"}
        later |= dict.fromkeys(("ternary", "ternary_dense"), "phase4_bitnet")
        phase = later.get(model, "phase1_cognate")
        return self.home / "storage" / "sessions" / self.session / phase / model


@pytest.fixture(scope="session")
def journey(tmp_path_factory) -> Journey:
    """Every phase there is, ablations included, by ``agent-forge run``. Nobody may change what it made."""

    def make(folder: Path) -> None:
        home = folder / "home"
        home.mkdir()
        done = run_cli("run", "--profile", small_profile(home / "small.toml", ablate=True), "--json", cwd=home)
        assert done.code == 0, done.err
        (home / "run.json").write_text(done.out, encoding="utf-8")
        # SQLite's side files come and go while others read, so copies are taken from one that nobody opens.
        shutil.copytree(home, folder / "pristine")

    home = made_once(tmp_path_factory, "journey", make) / "home"
    return Journey(home, home / "small.toml", json.loads((home / "run.json").read_text(encoding="utf-8")))


@pytest.fixture
def copy(journey, tmp_path) -> Journey:
    """The same in a folder of its own, to be damaged."""
    home = tmp_path / "copy"
    shutil.copytree(journey.home.parent / "pristine", home)
    return Journey(home, home / journey.profile.name, journey.run)
