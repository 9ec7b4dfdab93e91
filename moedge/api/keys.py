"""API keys: a file of hashes, and the middleware that asks for one of them. Knows no endpoint but the open paths given.

A key is 256 random bits, so one round of SHA-256 is as good as a slow hash, and a wrong key costs a microsecond.
`python -m moedge.api.keys NAME >> keys.txt` makes one.
"""

import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from moedge.api.errors import ApiError
from moedge.api.limits import App, Receive, Scope, Send
from moedge.errors import DataError

PREFIX = "moedge-"
_LINE = re.compile(r"(\S+) sha256:([0-9a-f]{64})")


def make_key(name: str) -> tuple[str, str]:
    """A new key, and the line of the file that lets it in."""
    if not re.fullmatch(r"\S+", name):
        raise DataError(f"key name {name!r} is empty or has spaces: use one word")
    key = PREFIX + secrets.token_urlsafe(32)
    return key, f"{name} sha256:{_digest(key.encode())}"


def read_keys(path: Path) -> dict[str, str]:
    """Name to hash. Empty lines and those that begin with # are skipped. DataError names the line that is wrong."""
    keys: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise DataError(
                f"{path}:{number} is not 'NAME sha256:HASH': make the line with python -m moedge.api.keys NAME"
            )
        keys[match[1]] = match[2]
    if not keys:
        raise DataError(f"{path} has no keys: add one with python -m moedge.api.keys NAME >> {path}")
    return keys


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


class RequireKey:
    """ASGI middleware: 401 without a key of `keys`, but for the paths in `open_paths`."""

    def __init__(self, app: App, keys: Mapping[str, str], open_paths: Collection[str]) -> None:
        self._app, self._open = app, frozenset(open_paths)
        self._hashes = tuple(keys.values())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open and not self._known(scope):
            error = ApiError(
                401,
                "no valid API key: send the header 'Authorization: Bearer KEY' with a key of this server",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer", "connection": "close"},
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._hashes]  # all of them, so time tells nothing
        return any(matches)


def main() -> None:
    """Print the line for the file on stdout and the key, which nobody can read again, on stderr."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m moedge.api.keys NAME >> keys.txt")
    key, line = make_key(sys.argv[1])
    print(line)
    print(f"the key, shown only now: {key}", file=sys.stderr)


if __name__ == "__main__":
    main()
