"""Who may use which models: API keys from a file, kept as digests and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError
from engine.json_files import read_json
from engine.server.errors import ApiError


@dataclass(frozen=True, slots=True)
class Access:
    """What a caller may use; models None: all, and changing and watching the server."""

    models: frozenset[str] | None = None

    def allows(self, model: str) -> bool:
        """Say whether a model may be used."""
        return self.models is None or model in self.models

    def require_all(self) -> None:
        """Raise a 403 unless the caller may do everything."""
        if self.models is not None:
            raise ApiError(403, "this API key may not do that")


class ApiKeys:
    """The keys of a server; without any, everybody may do everything."""

    def __init__(self, keys: dict[str, frozenset[str] | None]) -> None:
        self._access = [(_digest(key), Access(models)) for key, models in keys.items()]

    def access(self, authorization: str | None) -> Access:
        """Return what the bearer may do. Raises a 401. Every key is compared, so that the time taken tells nothing."""
        if not self._access:
            return Access()
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        found = None
        for digest, access in self._access:
            if hmac.compare_digest(digest, given):
                found = access
        if found is None:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer …", code="invalid_api_key")
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def load_api_keys(path: Path) -> ApiKeys:
    """Read `{"key": ["adapter", …] | "*"}`. Raises UserError, which never shows a key."""
    data = read_json(path)
    if not isinstance(data, dict) or not data:
        raise UserError(f"{path}: must be a JSON object of API keys")
    keys: dict[str, frozenset[str] | None] = {}
    for number, (key, models) in enumerate(data.items(), start=1):
        if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"{path}: key {number} must have at least 8 characters of ASCII and no space")
        if models == "*":
            keys[key] = None
        elif isinstance(models, list) and all(isinstance(name, str) and name for name in models):
            keys[key] = frozenset(models)
        else:
            raise UserError(f'{path}: key {number} must have a list of models, or "*"')
    return ApiKeys(keys)
