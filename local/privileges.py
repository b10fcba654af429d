"""Runs servers that refuse to run as root when the launcher is root: in a user namespace, or else as another user."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

_NAMESPACE = ("unshare", "--user", "--map-user=1000", "--map-group=1000")


def drop_root(directory: Path) -> tuple[str, ...]:
    """Return a prefix for a command that must not be root and works in `directory`, which it may have to own.

    In its own user namespace the command sees user 1000, while the files stay root's. Where namespaces are refused it
    runs as `nobody`. If the directory already belongs to another user, it runs as this user.
    """
    if os.geteuid() != 0:
        return ()
    owner = directory.stat()
    if owner.st_uid == 0 and _has_user_namespaces():
        return _NAMESPACE
    if owner.st_uid == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(directory, nobody.pw_uid, nobody.pw_gid)
        owner = directory.stat()
    # This group may pass through the parent directory. No other user can, and everything else there has mode 0700 or
    # 0600.
    os.chown(directory.parent, -1, owner.st_gid)
    directory.parent.chmod(0o710)
    return ("setpriv", f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups")


def _has_user_namespaces() -> bool:
    if not shutil.which("unshare"):
        return False
    return subprocess.run([*_NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
