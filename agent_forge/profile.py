"""Profiles: the whole pipeline's settings at one size, as one file of ``profiles/``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from agent_forge.pipeline.handoff import contracts
from forgekit.config import Config, read_config_file
from forgekit.errors import ConfigError
from forgekit.models.budget import Budget, solve_budget
from forgekit.models.config import MODEL_CONFIGS
from forgekit.registry import Registry, unknown
from forgekit.store.cleanup import CleanupPolicy

Positive = Annotated[int, Field(gt=0)]

PHASE_CONFIGS = Registry("phase settings")
PHASE_CONFIGS.lazy("cognate", "agent_forge.phases.cognate.config:CognateConfig")
PHASE_CONFIGS.lazy("evomerge", "agent_forge.phases.evomerge.config:EvoMergeConfig")
PHASE_CONFIGS.lazy("quietstar", "agent_forge.phases.quietstar.config:QuietStarConfig")
PHASE_CONFIGS.lazy("bitnet", "agent_forge.phases.bitnet.config:BitNetConfig")


class ModelPlan(Config):
    """What the parameter-budget solver starts from."""

    family: str = "trm_titans"
    """Model family; `gpt` is the plain baseline."""
    target_parameters: Positive = 850_000
    """Parameters wanted."""
    tolerance: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Allowed relative deviation from the target."""
    d_model: Annotated[int, Field(ge=0)] = 0
    """Fixed model width; 0 lets the solver choose."""
    embedding_share: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Ceiling of the embedding's share of the parameters."""
    settings: dict[str, Any] = {}
    """Fields of the family's configuration that are not solved: vocab_size, n_layers, n_heads, window, ..."""

    @model_validator(mode="after")
    def _solvable(self):
        if self.family not in MODEL_CONFIGS:
            known = unknown("model family", self.family, MODEL_CONFIGS.names())
            raise ConfigError(known.what, where="model.family", remedy=known.remedy)
        self.solve()
        return self

    def _with_widths(self) -> dict[str, Any]:
        """The settings with widths that the heads divide: any will do, the solver replaces them."""
        known, widths = MODEL_CONFIGS.get(self.family).model_fields, {}
        for width, heads in (("d_model", "n_heads"), ("d_mem", "memory_heads")):
            number = self.settings.get(heads, 4)
            if width in known and isinstance(number, int) and number > 0:
                widths[width] = 64 * number
        return {**widths, **self.settings}

    def solve(self) -> Budget:
        """The complete model configuration, with its parameter split.

        Raises:
            ConfigError: a setting is refused, or no shape fits.
        """
        template = MODEL_CONFIGS.get(self.family).build(self._with_widths(), path="model.settings")
        limits = {"tolerance": self.tolerance, "embedding_share": self.embedding_share}
        try:
            return solve_budget(template, self.target_parameters, width=self.d_model, **limits)
        except ConfigError as error:
            raise ConfigError(error.what, where=f"model.{error.where}", remedy=error.remedy) from None


class Profile(Config):
    """Settings of a whole run. Phases that a file does not mention are not run at that size yet."""

    name: str
    """The profile's name."""
    about: str = ""
    """One line for people: which machine, how long."""
    context: Positive = 256
    """Longest sequence in tokens."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads of torch; 0 takes one per physical core. Results are the same bits for the same number and the same
    ``side_by_side``."""
    side_by_side: bool = True
    """Trainings that do not depend on each other run at the same time, each with its part of the threads, at least one
    (CPU only)."""
    gate: Annotated[str, Field(pattern="^(stop|fall_back|accept)$")] = "fall_back"
    """What happens when a phase's gate, or a handoff contract, says no."""
    model: ModelPlan = ModelPlan()
    """The model every phase starts from."""
    phases: dict[str, dict[str, Any]] = {}
    """Settings by phase."""
    handoffs: dict[str, dict[str, Any]] = {}
    """Changes to the handoff contracts by boundary: `evomerge->quietstar`, or its target alone."""
    cleanup: CleanupPolicy = CleanupPolicy()
    """How long sessions are kept."""

    @model_validator(mode="after")
    def _handoffs_valid(self):
        contracts(self.handoffs)
        return self

    @model_validator(mode="after")
    def _phases_valid(self):
        for phase, values in self.phases.items():
            if phase not in PHASE_CONFIGS:
                known = unknown("phase", phase, PHASE_CONFIGS.names())
                raise ConfigError(known.what, where=f"phases.{phase}", remedy=known.remedy)
            PHASE_CONFIGS.get(phase).build(values, path=f"phases.{phase}")
        return self

    def phase(self, name: str) -> Config:
        """The typed settings of one phase.

        Raises:
            ConfigError: the profile has none.
        """
        if name not in self.phases:
            raise ConfigError(
                f"profile {self.name!r} has no settings for phase {name!r}",
                where=f"phases.{name}",
                remedy=f"this profile runs: {', '.join(self.phases) or 'nothing'}",
            )
        return PHASE_CONFIGS.get(name).build(self.phases[name], path=f"phases.{name}")

    def model_config_solved(self):
        """The model configuration the budget solver found, with the profile's context length."""
        return self.model.solve().config.replace(max_seq_len=self.context)


def profile_folder() -> Path:
    """Where the shipped profiles are: beside the packages in a checkout, inside ``agent_forge`` when installed."""
    here = Path(__file__).resolve().parent
    return next(p for p in (here / "profiles", here.parent / "profiles") if p.is_dir())


def profile_names() -> list[str]:
    """Names of the shipped profiles, smallest first."""
    order = ("pico", "nano", "micro", "small", "base", "large")
    found = {p.stem for p in profile_folder().glob("*.toml")}
    return [n for n in order if n in found] + sorted(found - set(order))


def with_values(profile: Profile, assignments: list[str]) -> Profile:
    """The profile with some values changed, each written ``key.of.the.field=VALUE`` with a TOML value.

    Raises:
        ConfigError: not an assignment, or the key or the value is refused.
    """
    values = profile.model_dump(mode="json")
    for assignment in assignments:
        key, value = assigned(assignment, "--set")
        parts, place = key.split("."), values
        for part in parts[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{part} has no fields", where=f"--set {key}", remedy="shorten the key")
        place[parts[-1]] = value
    return Profile.build(values, "--set")


def assigned(text: str, option: str) -> tuple[str, Any]:
    """Key and TOML value of ``key=value``; what is no TOML is taken as a string, so that names need no quotes.

    Raises:
        ConfigError: not an assignment.
    """
    key, sign, value = (part.strip() for part in text.partition("="))
    if not sign or not all(key.split(".")):
        remedy = f"write {option} key=value"
        raise ConfigError(f"{text!r} is not an assignment", where=option, remedy=remedy)
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def load_profile(name: str) -> Profile:
    """A shipped profile by name, or one of your own by file path.

    Raises:
        ConfigError: no such profile (nearest names given), or a value in the file is refused.
    """
    path = Path(name)
    if path.suffix not in (".toml", ".json"):
        if name not in profile_names():
            raise unknown("profile", name, profile_names())
        path = profile_folder() / f"{name}.toml"
    return Profile.build(read_config_file(path), source=str(path) if path.name == name else path.name)
