"""Downloads files: checked, continued after an interruption, once for all processes."""

import errno
import fcntl
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from pathlib import Path
from typing import IO

from src.utils.errors import UserError
from src.utils.progress import ProgressBar, print_status

_TIMEOUT_S = 30
_TRIES = 3
_CHUNK = 1 << 20
_MEGABYTE = 10**6
# The SHA-256 that Hugging Face sends for a large file, before it redirects to where that is kept.
_SHA256_HEADER = "X-Linked-ETag"


class NotFound(UserError):
    """The server has no such file."""


def download(
    url: str,
    target: Path,
    sha256: str = "",
    what: str = "",
    is_valid: Callable[[Path], bool] = lambda path: True,
) -> None:
    """Download ``url`` to ``target``, unless that exists. Shows the progress.

    Proxies are those of the environment (https_proxy, no_proxy). An interrupted download continues
    where it ended, also in the next call, if its checksum is known. Processes of one machine that
    want the same file wait for the first one.

    Args:
        sha256: beginning of the file's SHA-256 in hexadecimal digits; "" if only the server may
            know it.
        what: what to call the file in the message that announces the download.
        is_valid: checks the content of the downloaded file; a file that fails is deleted.

    Raises:
        NotFound: if the server has no such file.
        UserError: if the server or the disk fails, or the file is not the expected one.
    """
    try:
        if target.exists():
            if sha256 and not _sha256(target).startswith(sha256):
                raise UserError(
                    f"'{target}' is not the file of {url}: its SHA-256 does not begin with "
                    f"{sha256}; delete it"
                )
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target.with_name(f".{target.name}.lock")):
                if not target.exists():
                    print_status(f"downloading {what or target.name} from {url} to {target}")
                    _download_whole(checked_address(url), target, sha256, is_valid)
    except OSError as failure:
        raise UserError(f"cannot write '{target}': {failure.strerror or failure}") from None


def sha256_in_name(url: str) -> str:
    """The beginning of the SHA-256 in a name of PyTorch's, as in resnet18-f37072fd.pth; or "".

    Digits without a letter may be a date.
    """
    found = re.search(r"-(?=\d*[a-f])([0-9a-f]{8,64})\.(pth|pt)$", url.partition("?")[0])
    return found[1] if found else ""


def checked_address(url: str) -> str:
    """The address in ASCII. Raises UserError if nothing can be downloaded from it."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UserError(
            f"'{url}' is not an address: it must be https://HOST/FILE or http://HOST/FILE"
        )
    if parts.username is not None:
        raise UserError(
            f"the address of {parts.hostname} has a user name or password, which would be shown in "
            "messages; fetch the file yourself and pass its path"
        )
    return urllib.parse.quote(url, safe="%/:?#[]@!$&'()*+,;=~")


class _Interrupted(Exception):
    """No connection, or one that ended early."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Remembers the checksum that the first server sends."""

    def __init__(self) -> None:
        self.sha256 = ""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        self.sha256 = self.sha256 or _sent_sha256(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download_whole(url: str, target: Path, sha256: str, is_valid: Callable[[Path], bool]) -> None:
    partial = target.with_name(target.name + ".part")
    for attempt in range(_TRIES):
        time.sleep(attempt)
        try:
            expected = _continue(url, partial, sha256)
            break
        except _Interrupted as failure:
            reason = failure
    else:
        proxy = f"{urllib.parse.urlsplit(url).scheme}_proxy"
        through = f" ({proxy} is set)" if proxy[:-6] in urllib.request.getproxies() else ""
        raise UserError(
            f"cannot download {url}: {reason}{through}; run the command again, or fetch the file "
            f"on another machine and save it as {target}"
        )
    found = _sha256(partial)
    if not found.startswith(expected):
        partial.unlink()
        raise UserError(
            f"{url} is not the expected file: its SHA-256 begins with {found[:8]} and not with "
            f"{expected[:8]}; nothing is kept"
        )
    if not is_valid(partial):
        partial.unlink()
        raise UserError(
            f"{url} is not the expected file: it is damaged or of another format; nothing is kept"
        )
    os.replace(partial, target)


def _continue(url: str, partial: Path, sha256: str) -> str:
    """Download what ``partial`` lacks.

    Returns:
        The beginning of the file's SHA-256: ``sha256``, or what the server says, or "".
    """
    done = partial.stat().st_size if partial.exists() else 0
    redirects = _Redirects()
    request = urllib.request.Request(url, headers={"User-Agent": "acnet-mindspore"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    try:
        with urllib.request.build_opener(redirects).open(request, timeout=_TIMEOUT_S) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise UserError(f"{url} is a web page, not a file")
            expected = sha256 or redirects.sha256 or _sent_sha256(answer.headers)
            if answer.status == 206 and not expected:
                # The file on the server may have changed since.
                partial.unlink()
                return _continue(url, partial, sha256)
            _receive(answer, partial, done if answer.status == 206 else 0)
            return expected
    except urllib.error.HTTPError as failure:
        if failure.code == 416 and done:
            # The file is complete, or the partial file belongs to another one.
            if expected := sha256 or redirects.sha256 or _sent_sha256(failure.headers):
                return expected
            partial.unlink()
            return _continue(url, partial, sha256)
        answer_text = f"the server answers {failure.code} {failure.reason}"
        if failure.code >= 500 or failure.code == 429:
            raise _Interrupted(answer_text) from None
        kind = NotFound if failure.code in (404, 410) else UserError
        raise kind(
            f"cannot download {url}: {answer_text}; pass a file instead, or save it as "
            f"{partial.with_suffix('')}"
        ) from None
    except (OSError, http.client.HTTPException) as failure:
        if getattr(failure, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise
        raise _Interrupted(getattr(failure, "reason", None) or failure) from None


def _receive(answer: http.client.HTTPResponse, partial: Path, done: int) -> None:
    """Write the answer to ``partial`` from byte ``done`` on."""
    length = done + int(answer.headers.get("Content-Length", 0))
    with (
        open(partial, "ab" if done else "wb") as file,
        ProgressBar("downloaded", max(length // _MEGABYTE, 1), "megabyte") as progress,
    ):
        shown = 0
        while chunk := answer.read(_CHUNK):
            done += file.write(chunk)
            progress.advance(done // _MEGABYTE - shown)
            shown = done // _MEGABYTE
    if done < length:
        raise _Interrupted(f"the connection ended after {done / _MEGABYTE:.1f} MB")


def _sent_sha256(headers: Message) -> str:
    """The SHA-256 among a server's headers, or ""."""
    tag = headers.get(_SHA256_HEADER, "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{64}", tag) else ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file; the system releases it when the process ends in any way."""
    with open(path, "w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
