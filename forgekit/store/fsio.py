"""Files that survive a kill, and disk errors told in one line.

What is being written or removed carries a temporary name, ``.{name}.{pid}-{start}-{token}.unfinished``, beside its
final place. The name says who owns it, so :func:`sweep_unfinished` removes exactly what dead processes left behind.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from forgekit.errors import ResourceError
from forgekit.store.process import own_process, process_alive

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_UNUSABLE = {errno.EIO, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG}
_UNFINISHED = re.compile(r"\.(\d+)-(\d+)-[0-9a-f]{8}\.unfinished$")


@contextmanager
def disk_errors(folder: Path | str, need: int = 0) -> Iterator[None]:
    """Tell a full disk, a missing permission or an unusable path as a :class:`ResourceError` that names ``folder``.

    Args:
        folder: where the work happens.
        need: bytes the work takes at most; 0 when unknown.
    """
    try:
        yield
    except OSError as error:
        explained = _explain(error.errno, str(error.strerror), Path(folder), need)
        if explained is None:
            raise
        raise explained from None
    except SafetensorError as error:  # its writer reports the system's error as text
        found = re.search(r"\(os error (\d+)\)", str(error))
        explained = _explain(int(found[1]), str(error), Path(folder), need) if found else None
        if explained is None:
            raise
        raise explained from None


def _explain(code: int | None, reason: str, folder: Path, need: int) -> ResourceError | None:
    if code in _FULL:
        wanted = f"up to {need / 1e6:.1f} MB needed, " if need else ""
        what = f"the disk is full: {wanted}{free_bytes(folder) / 1e6:.1f} MB free"
        return ResourceError(what, where=str(folder), remedy="free some space, e.g. `agent-forge clean --all`")
    if code in _DENIED:
        remedy = "change its permissions or choose another folder"
        return ResourceError(f"no permission ({reason})", where=str(folder), remedy=remedy)
    if code in _UNUSABLE:
        return ResourceError(f"cannot be used ({reason})", where=str(folder), remedy="choose another folder")
    return None


def free_bytes(path: Path | str) -> int:
    """Bytes free for this user on the disk that holds ``path``, or would hold it."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def fsync_dir(folder: Path | str) -> None:
    """Make the entries of ``folder`` durable: a renamed file is safe only after this."""
    if os.name == "nt":  # Windows cannot open a folder; its renames are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path | str) -> Path:
    """Create ``folder`` and its missing parents durably.

    Raises:
        ResourceError: no permission, no space, or a file stands in the way.
    """
    folder = Path(folder)
    with disk_errors(folder):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            fsync_dir(path.parent)
    return folder


def write_atomic(path: Path | str, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds the old bytes or all the new ones, whatever happens meanwhile.

    Raises:
        ResourceError: disk full, or no permission.
    """
    path = Path(path)
    make_folder(path.parent)
    work = temporary_for(path)
    with disk_errors(path.parent, len(data)):
        try:
            write_synced(work, data)
            os.replace(work, path)
        except BaseException:
            work.unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and force it to the disk; its folder entry is not yet durable."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Force a file that someone else wrote to the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def sha256_file(path: Path | str) -> str:
    """Hexadecimal SHA-256 of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_bytes(folder: Path) -> int:
    """Bytes in all files below ``folder``; links count as themselves, what vanishes meanwhile counts nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def temporary_for(path: Path) -> Path:
    """A fresh temporary name beside ``path`` that says which process owns it."""
    pid, started = own_process()
    name = _UNFINISHED.sub("", path.name).removeprefix(".")  # claiming a temporary must not lengthen its name
    return path.with_name(f".{name}.{pid}-{int(started)}-{secrets.token_hex(4)}.unfinished")


def write_folder(output: Path, fill: Callable[[Path], None], need: int = 0) -> None:
    """Make a folder of plain files that is complete or absent: filled under a temporary name, then renamed.

    Args:
        output: the folder; nothing may be there.
        fill: writes the files into the folder it is given.
        need: bytes, for the message of a full disk.

    Raises:
        ResourceError: disk full, or no permission.
    """
    make_folder(output.parent)
    work = temporary_for(output)
    with disk_errors(output.parent, need=need):
        work.mkdir()
        try:
            fill(work)
            for path in sorted(work.iterdir()):
                sync_file(path)
            fsync_dir(work)
            os.rename(work, output)
        except BaseException:
            remove_tree(work)
            raise
        fsync_dir(output.parent)


def set_aside(path: Path) -> Path | None:
    """Take ``path`` out of sight in one step by giving it a temporary name; None if it is not there."""
    work = temporary_for(path)
    with disk_errors(path.parent):
        try:
            os.rename(path, work)
        except FileNotFoundError:
            return None
    return work


def remove_tree(path: Path) -> int:
    """Delete a file or a folder with all it holds; returns the bytes it held."""
    with disk_errors(path):
        if path.is_dir() and not path.is_symlink():
            size = tree_bytes(path)
            shutil.rmtree(path)
        else:
            size = path.lstat().st_size
            path.unlink()
    return size


def sweep_unfinished(root: Path | str) -> int:
    """Delete every temporary below ``root`` whose owner is dead; returns the bytes freed.

    What a living process is writing stays. Two sweeps at once do not disturb each other: each claims by renaming.
    """
    freed = 0
    for folder, names, files in os.walk(root):
        for name in [*names, *files]:
            owner = _UNFINISHED.search(name)
            if not owner:
                continue
            if name in names:
                names.remove(name)  # do not walk into it
            if process_alive(int(owner[1]), float(owner[2])):
                continue
            claimed = set_aside(Path(folder, name))
            freed += remove_tree(claimed) if claimed else 0
    return freed
