"""What is asked of the Hub: ids with a revision, downloads, and why one failed, in one line."""

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from huggingface_hub import errors, snapshot_download

from nearid_personalize.errors import InputError

# The client that huggingface_hub speaks through has changed from release to release; its errors are no OSErrors.
_HTTP_ERROR: type[Exception] = errors.HfHubHTTPError.__bases__[0]
HUB_ERRORS = (OSError, errors.HFValidationError, _HTTP_ERROR)
"""What a download may end in."""

_HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\S+))?")


def is_hub_id(name: object) -> bool:
    """Whether `name` reads as owner/name or owner/name@revision; whether there is such a one is not asked."""
    return _HUB_ID.fullmatch(str(name)) is not None


def split_revision(name: str) -> tuple[str, str | None]:
    """ "owner/name@revision" -> "owner/name" and the branch, tag or commit; paths and plain ids come back with None."""
    found = _HUB_ID.fullmatch(name)
    return (found["id"], found["revision"]) if found and not Path(name).exists() else (name, None)


def download(name: str, patterns: Sequence[str], repository_type: Literal["model", "dataset"] = "model") -> Path:
    """The local folder of a repository: what fits `patterns`, downloaded unless it is in the cache.

    name: owner/name, or owner/name@revision. Raises InputError, which says why it cannot be had.
    """
    repository, revision = split_revision(name)
    try:
        return Path(
            snapshot_download(repository, repo_type=repository_type, revision=revision, allow_patterns=list(patterns))
        )
    except HUB_ERRORS as error:
        raise InputError(f"{name}: {download_fault(error)}") from None


def download_fault(error: Exception) -> str:
    """What went wrong with a download and what would work; `error` may be what a library made of the true one."""
    chain = list(_chain(error))
    for is_the_fault, reason in _FAULTS:
        if any(is_the_fault(link) for link in chain):
            return reason
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_a(kind: type[Exception], error: BaseException) -> bool:
    return isinstance(error, kind)


def _is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


def _is_cut_short(error: BaseException) -> bool:
    return any(mark in str(error) for mark in ("Consistency check failed", "peer closed connection", "IncompleteRead"))


def _is_unreachable(error: BaseException) -> bool:
    # By name: the clients of different releases have classes of the same names.
    no_connection = type(error).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError")
    return no_connection or isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled)


# The first that holds of any error in the chain: the plainest cause goes before what follows from it.
_FAULTS: tuple[tuple[Callable[[BaseException], bool], str], ...] = (
    (_is_full_disk, "the disk is full; make room, or let HF_HOME name a folder on another disk"),
    (_is_cut_short, "the download was cut short; run the same again"),
    (
        partial(_is_a, errors.GatedRepoError),
        "open only to those whom its owner lets in; accept its terms on the Hub, then run `hf auth login`",
    ),
    (
        partial(_is_a, errors.RepositoryNotFoundError),
        "not on the Hub, or not open to you; check the name, or run `hf auth login`",
    ),
    (partial(_is_a, errors.RevisionNotFoundError), "no such revision on the Hub; give a branch, tag or commit of it"),
    (_is_unreachable, "the Hub cannot be reached, and no copy is in the cache; run it once where there is a network"),
    (partial(_is_a, errors.EntryNotFoundError), "lacks a file that is needed here; is it a repository of this kind?"),
)
