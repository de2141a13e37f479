"""The system's limit of open files, which bounds connections."""

from __future__ import annotations

from mexit.errors import UsageError

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

_OTHER_FILES = 128  # models, metrics, channels, libraries


def allow_connections(connections: int) -> None:
    """Raise the limit of open files of this process, and of its later children, to a number of connections.

    Raises:
        UsageError: the system does not allow as many files.
    """
    if resource is None:
        return
    needed = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= needed:
        return
    if hard != unlimited and hard < needed:
        raise UsageError(
            f"{connections} connections need {needed} open files and the system allows {hard}: lower "
            "--max-connections, or raise the limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
