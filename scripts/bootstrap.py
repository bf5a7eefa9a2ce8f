# ruff: noqa: UP031  old Pythons must be able to read this file
"""Make the virtual environment the Makefile works in. Written for any Python 3, to be able to refuse old ones.

Usage: python3 scripts/bootstrap.py VENV EXTRAS   (EXTRAS: comma-separated, or "-" for none)
"""

import hashlib
import os
import shutil
import subprocess
import sys

NEEDED_PYTHON = (3, 11)
NEEDED_DISK = 4 * 10**9


def stop(message):
    """Leave with one line."""
    sys.stderr.write("error: " + message + "\n")
    sys.exit(1)


def check_machine(root):
    """Refuse a Python that is too old, and a disk that is too small for the packages."""
    if sys.version_info < NEEDED_PYTHON:
        stop(
            "Python %d.%d is too old: Agent Forge needs 3.11 or newer; install one and run `make PYTHON=python3.12 ...`"
            % sys.version_info[:2]
        )
    free = shutil.disk_usage(root).free
    if free < NEEDED_DISK:
        needs = "the packages need 4 GB, %.1f GB are free in %s" % (free / 1e9, root)
        stop("the disk is too small: " + needs + "; free some space")


def fingerprint(root, extras):
    """Changes when the dependencies do."""
    digest = hashlib.sha256(extras.encode() + sys.version.encode())
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(root, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def main(venv, extras):
    """Create the environment unless it is there and up to date."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    stamp = os.path.join(venv, "agent-forge.stamp")
    wanted = fingerprint(root, extras)
    if os.path.exists(stamp):
        with open(stamp) as file:
            if file.read() == wanted:
                return
    check_machine(root)
    sys.stderr.write("preparing %s (packages are downloaded once)\n" % venv)
    bin_folder = os.path.join(venv, "Scripts" if os.name == "nt" else "bin")
    python = os.path.join(bin_folder, "python")
    if not os.path.exists(python) and subprocess.call([sys.executable, "-m", "venv", venv]) != 0:
        stop("no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv")
    target = root if extras == "-" else "%s[%s]" % (root, extras)
    command = [python, "-m", "pip", "install", "--quiet", "-c", os.path.join(root, "constraints.txt"), "-e", target]
    if subprocess.call(command) != 0:
        stop("the packages could not be installed (see above); is the package registry reachable?")
    with open(stamp, "w") as file:
        file.write(wanted)


if __name__ == "__main__":
    main(*sys.argv[1:3])
