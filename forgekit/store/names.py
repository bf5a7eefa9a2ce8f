"""Names that become folders and keys: phases, sessions, models."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from forgekit.errors import ConfigError

PHASES = ("cognate", "evomerge", "quietstar", "bitnet", "curriculum", "baking", "experts", "compression")
PHASE_ALIASES = {"forge": "curriculum", "edge": "experts", "final_compression": "compression"}
MODEL_ID_PATTERN = r"^[a-z0-9_]+_[0-9]{8}_[0-9]{6}(_[0-9]+)?$"
# A session id becomes a folder that cleanup deletes as a whole, so it can never hold a separator or start with a dot.
SESSION_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


def canonical_phase(name: str) -> str:
    """The phase's own name, aliases followed.

    A name outside the eight built-in phases is accepted when it is well formed: phases are an extension point.

    Raises:
        ConfigError: not a lower-case identifier.
    """
    name = PHASE_ALIASES.get(name, name)
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name):
        remedy = f"choose one of {', '.join(PHASES)}"
        raise ConfigError(f"not a phase name: {name!r}", where="phase_name", remedy=remedy)
    return name


def phase_folder(name: str) -> str:
    """The folder of a phase inside its session: ``phase1_cognate`` … ``phase8_compression``, ``phase_<own>``."""
    name = canonical_phase(name)
    return f"phase{PHASES.index(name) + 1 if name in PHASES else ''}_{name}"


def check_session_id(session_id: str) -> str:
    """Return ``session_id`` unchanged.

    Raises:
        ConfigError: it cannot be a folder name.
    """
    if not re.fullmatch(SESSION_ID_PATTERN, session_id):
        remedy = "use at most 64 letters, digits, '.', '_' and '-', starting with a letter or digit"
        raise ConfigError(f"not a session id: {session_id!r}", where="session_id", remedy=remedy)
    return session_id


def folder_name(name: str) -> str:
    """A human-readable model name as a folder name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "model"


def new_model_id(phase: str, name: str, now: datetime | None = None) -> str:
    """``{phase}_{name}_{YYYYMMDD}_{HHMMSS}`` in lower case, UTC."""
    stamp = (now or datetime.now(UTC)).astimezone(UTC).strftime("%Y%m%d_%H%M%S")
    return f"{canonical_phase(phase)}_{folder_name(name).lower().replace('-', '_')}_{stamp}"


def utc_text(moment: datetime | str | None = None) -> str:
    """One spelling of an instant, ISO 8601 in UTC with microseconds, so that text order is time order.

    Args:
        moment: a datetime or ISO text (without an offset: UTC); now when omitted.

    Raises:
        ValueError: the text is no ISO date.
    """
    moment = datetime.now(UTC) if moment is None else moment
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return moment.isoformat(timespec="microseconds")
