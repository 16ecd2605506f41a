"""A model's few small files, from a folder, from the hub's cache or from the hub.

Only what tokenizing and rendering need is read or fetched: never weights, never code.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from deployments.settings import ModelsSettings
from kvcore.errors import (
    HubBusyError,
    HubError,
    HubTimeoutError,
    ModelDamagedError,
    ModelError,
    ModelForbiddenError,
    ModelNotFoundError,
    ModelUnsupportedError,
)

log = logging.getLogger(__name__)

_JSON_FILES = (
    "chat_template.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_WANTED = (*_JSON_FILES, "chat_template.jinja", "additional_chat_templates/*.jinja")
# tokenizer.json files end at 33 MB today; anything far beyond is not one.
_MAX_FILE_BYTES = 256 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


@dataclass(frozen=True)
class ModelFiles:
    """Texts of a model's files, by name, and where they are from."""

    texts: Mapping[str, str]
    listing: frozenset[str]  # everything the model has, wanted or not
    source: str
    json: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # parsed, by name

    @property
    def tokenizer(self) -> str:
        """Text of tokenizer.json."""
        return self.texts["tokenizer.json"]

    def parsed(self, name: str) -> dict[str, Any]:
        """Return a JSON file's object; an absent file is an empty one."""
        return self.json.get(name, {})


def check_name(name: str) -> None:
    """Refuse what cannot be a model's name before it gets near a path or an URL.

    Raises:
        ModelNotFoundError: It is none.
    """
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        shown = name if len(name) <= 100 else name[:100] + "…"
        raise ModelNotFoundError(f"{shown!r} is not a model's name")


def find_local(name: str, settings: ModelsSettings) -> Path | None:
    """Return the folder of a model among the configured ones, None where there is none.

    Raises:
        ModelNotFoundError: The folder configured for it does not exist.
    """
    if name in settings.folders:
        folder = Path(settings.folders[name]).expanduser()
        if not folder.is_dir():
            raise ModelNotFoundError(f"the folder configured for {name} does not exist")
        return folder
    for root in map(Path, settings.search):
        folder = root.expanduser() / name
        if (folder / "tokenizer.json").is_file():
            return folder
        cached = _find_snapshot(root.expanduser(), name, settings.revisions.get(name, "main"))
        if cached is not None:
            return cached
    return None


def _find_snapshot(cache: Path, name: str, revision: str) -> Path | None:
    """The model's snapshot in a folder that has the hub cache's layout."""
    repo = _repo(cache, name)
    ref = repo / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    folder = repo / "snapshots" / commit
    return folder if (folder / "tokenizer.json").is_file() else None


def _repo(cache: Path, name: str) -> Path:
    return cache / f"models--{name.replace('/', '--')}"


def read_folder(folder: Path, source: str) -> ModelFiles:
    """Read a model's files.

    Raises:
        ModelUnsupportedError: There is no tokenizer.json.
        ModelDamagedError: A file is not readable, not UTF-8 or not JSON.
    """
    listing = frozenset(
        path.relative_to(folder).as_posix()
        for pattern in ("*", "additional_chat_templates/*")
        for path in folder.glob(pattern)
    )
    texts: dict[str, str] = {}
    for name in _wanted(listing):
        texts[name] = _read(folder / name, source)
    return _checked(texts, listing, source)


def _read(path: Path, source: str) -> str:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ModelDamagedError(f"{source}: {path.name} has over {_MAX_FILE_BYTES:,} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelDamagedError(f"{source}: {path.name} cannot be read: {error}") from error


def _checked(texts: dict[str, str], listing: frozenset[str], source: str) -> ModelFiles:
    if "tokenizer.json" not in texts:
        raise ModelUnsupportedError(f"{source} has no tokenizer.json, so ids cannot be computed")
    parsed = {}
    for name in _JSON_FILES:
        if name in texts and name != "tokenizer.json":  # tokenizers parses that one itself
            try:
                parsed[name] = json.loads(texts[name])
            except (ValueError, RecursionError) as error:
                raise ModelDamagedError(f"{source}: {name} is not JSON: {error}") from error
            if not isinstance(parsed[name], dict):
                raise ModelDamagedError(f"{source}: {name} is not a JSON object")
    return ModelFiles(texts, listing, source, parsed)


def _wanted(listing: Iterable[str]) -> list[str]:
    return sorted(name for name in listing if any(fnmatch(name, want) for want in _WANTED))


def is_offline(settings: ModelsSettings) -> bool:
    """Whether the hub must not be asked."""
    return not settings.use_hub or constants.HF_HUB_OFFLINE


def fetch(name: str, settings: ModelsSettings, *, force: bool = False) -> ModelFiles:
    """Fetch a model from the hub through its cache; blocks, so call it in a thread.

    An unreachable hub is answered from the cache, where that has the model.

    Raises:
        ModelNotFoundError: The hub does not know it, or its revision.
        ModelForbiddenError: The hub wants a token or an accepted licence.
        HubBusyError: The hub answered 429 until the retries ran out.
        HubTimeoutError: The hub did not answer in time.
        HubError: The hub cannot be reached, or failed otherwise.
        ModelUnsupportedError: It has no tokenizer.json.
        ModelDamagedError: A file arrived incomplete or is not what it should be.
    """
    revision = settings.revisions.get(name, "main")
    cache = Path(settings.cache_dir or constants.HF_HUB_CACHE)
    if is_offline(settings):
        folder = _find_snapshot(cache, name, revision)
        if folder is None:
            raise HubError(f"{name} is not in the hub's cache, and the hub is switched off")
        return read_folder(folder, f"{name} in the hub's cache")
    try:
        return _fetch_online(name, revision, settings, force)
    except HubError as error:
        folder = _find_snapshot(cache, name, revision)
        if folder is None:
            raise
        log.warning("%s: %s; using the hub cache's copy", name, error)
        return read_folder(folder, f"{name} in the hub's cache")


def _fetch_online(name: str, revision: str, settings: ModelsSettings, force: bool) -> ModelFiles:
    api = HfApi(endpoint=settings.endpoint)
    info = _ask(
        name,
        settings,
        lambda: api.model_info(name, revision=revision, timeout=settings.hub_timeout_s),
    )
    listing = frozenset(sibling.rfilename for sibling in info.siblings or ())
    if "tokenizer.json" not in listing:
        raise ModelUnsupportedError(f"{name} has no tokenizer.json, so ids cannot be computed")
    texts = {}
    started = time.monotonic()
    for file in _wanted(listing):
        path = _name_errors(  # the client tries a busy hub again itself, for half a minute
            name,
            lambda file=file: hf_hub_download(
                name,
                file,
                revision=info.sha,
                cache_dir=settings.cache_dir,
                endpoint=settings.endpoint,
                etag_timeout=settings.hub_timeout_s,
                force_download=force,
            ),
        )
        texts[file] = _read(Path(path), name)
        log.info("%s: %s, %d characters", name, file, len(texts[file]))
    # By its commit the hub's client would not find it again under the branch's name.
    ref = _repo(Path(settings.cache_dir or constants.HF_HUB_CACHE), name) / "refs" / revision
    if info.sha and revision != info.sha:
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(info.sha)
    log.info("%s: %d files in %.1f s", name, len(texts), time.monotonic() - started)
    return _checked(texts, listing, name)


_Answer = TypeVar("_Answer")


def _ask(name: str, settings: ModelsSettings, question: Callable[[], _Answer]) -> _Answer:
    """Ask the hub what its client asks but once; try again where waiting can help."""
    wait_s = 0.5
    for attempt in range(settings.hub_retries + 1):
        try:
            return _name_errors(name, question)
        except HubBusyError:
            if attempt == settings.hub_retries:
                raise
            log.warning("%s: the hub is busy, next try in %.1f s", name, wait_s)
            time.sleep(wait_s)
            wait_s *= 2
    raise AssertionError  # the loop returns or raises


def _name_errors(name: str, question: Callable[[], _Answer]) -> _Answer:
    try:
        return question()
    except HfHubHTTPError as error:
        raise _refusal(name, error) from error
    except EntryNotFoundError as error:
        # hf_hub_download hides a lost connection behind "not in the cache".
        raise _disturbance(name, error.__cause__ or error) from error
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise _disturbance(name, error) from error


def _refusal(name: str, error: HfHubHTTPError) -> ModelError:
    """The hub answered, but not with what was asked for."""
    status = error.response.status_code if error.response is not None else None
    if isinstance(error, GatedRepoError):
        return ModelForbiddenError(f"{name} is gated: accept its licence, and set HF_TOKEN")
    if status in (401, 403):
        return ModelForbiddenError(
            f"the hub does not give {name} to this HF_TOKEN ({status}): it is private or unknown"
        )
    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)) or status == 404:
        return ModelNotFoundError(f"the hub has no model {name} at that revision")
    if status in (429, 503):
        return HubBusyError(f"the hub is rate limiting or busy ({status}); try {name} later")
    return HubError(f"the hub answered {status} for {name}")


def _disturbance(name: str, error: BaseException) -> ModelError:
    """The hub did not answer, or not to the end."""
    if isinstance(error, httpx2.TimeoutException):
        return HubTimeoutError(f"the hub did not answer in time for {name}")
    if isinstance(error, HfHubHTTPError):
        return _refusal(name, error)
    # Both clients, the hub's and the one below it, say so in words only.
    is_incomplete = "complete" in str(error) or "Consistency check" in str(error)
    if isinstance(error, (httpx2.RemoteProtocolError, OSError)) and is_incomplete:
        return ModelDamagedError(f"a file of {name} arrived incomplete: {error}")
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return ModelError(f"the hub's cache cannot take {name}: {error}")
    if isinstance(error, ValueError):
        return HubError(f"the hub's answer for {name} makes no sense: {error}")
    return HubError(f"the hub cannot be reached for {name}: {error}")
