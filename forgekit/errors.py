"""The one error family of the house.

A user's mistake raises a :class:`ForgeError`. It names *where* (the field or the file), *what* is wrong,
and *what to do*; the command line prints exactly that one line and exits with :attr:`ForgeError.exit_code`.
Our own mistakes stay plain ``assert``/``TypeError`` and show a traceback.
"""

from __future__ import annotations


class ForgeError(Exception):
    """A mistake the user can repair, told in one line.

    Args:
        what: the problem, including the offending value.
        where: the field, file or option it concerns.
        remedy: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        line = f"{head}; {self.remedy}" if self.remedy else head
        return " ".join(line.split())

    def __reduce__(self):
        return _rebuild, (type(self), self.what, self.where, self.remedy)


def _rebuild(kind: type[ForgeError], what: str, where: str, remedy: str) -> ForgeError:
    """Let errors cross process boundaries (workers send them by pickle in memory, never to disk)."""
    return kind(what, where=where, remedy=remedy)


class ConfigError(ForgeError):
    """A configuration value, profile, key or phase name is not valid."""

    exit_code = 2


class DataError(ForgeError):
    """A data set is missing, empty, unreadable or contaminated."""

    exit_code = 3


class ArtifactError(ForgeError):
    """An artifact, checkpoint or database is corrupt, truncated, unfinished or too new."""

    exit_code = 4


class ResourceError(ForgeError):
    """Disk, memory or permission is lacking and no fallback is left."""

    exit_code = 5


class TrainingError(ForgeError):
    """Training diverged and every recovery step has been used."""

    exit_code = 6


class GateError(ForgeError):
    """A gate said no and the profile asks to stop there."""

    exit_code = 7
