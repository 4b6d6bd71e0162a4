"""Models of the Hugging Face Hub: `find_model` makes a folder of huggingface_hub's cache out of a name.

Every argument that names a model passes through it. Only weights, configs, tokenizers and cards are downloaded: no
code, and no pickles. huggingface_hub keeps whole files, and takes what is in its cache without a network.
"""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intaglio.errors import ConfigError, InputError, IntaglioError, OutputError
from intaglio.plan.files import one_line
from intaglio.progress import Progress

CONFIG_ONLY = ("config.json",)
TEXTS = (  # a model without weights; README.md says its licence
    *CONFIG_ONLY,
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "generation_config.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "README.md"),
)
MODEL = (*TEXTS, "adapter_config.json", "*.safetensors", "*.safetensors.index.json")
SINGLE_FILES = (".gguf", ".litertlm", ".tflite")  # each a whole model, of which a repository may hold many
ARTIFACT = (*MODEL, *(f"*{suffix}" for suffix in SINGLE_FILES))
WEIGHTS = (".safetensors", *SINGLE_FILES)

PART = r"[A-Za-z0-9](?:[\w-]|\.(?!\.))*"
PARTS = rf"{PART}(?:/{PART})*"
NAME = re.compile(rf"(?P<repo>{PART}/{PART})(?:@(?P<revision>{PARTS}))?(?::(?P<path>{PARTS}))?")
SNAPSHOT = re.compile(r"/models--(?P<user>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>\w+)(/|$)")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def find_model(name: str | Path, progress: Progress | None = None, files: Sequence[str] = MODEL) -> Path:
    """The folder or file that a model argument stands for.

    name: a path; or a name of the Hub, `user/model`, `user/model@revision` or `user/model@revision:path`, where the
    path is a file or a folder in the repository. A path that exists wins over a name, and anything that is neither
    comes back as it is. files: patterns of the files that are wanted.
    Raises InputError for a repository that cannot be had, and OutputError for a disk that is too full.
    """
    path, match = Path(name), NAME.fullmatch(str(name))
    if match is None or path.exists():
        return path
    inner = match["path"] or ""
    if inner.endswith(WEIGHTS):
        patterns, nested = [inner], []
    else:
        prefix = f"{inner}/" if inner else ""
        patterns = [prefix + pattern for pattern in files]
        nested = [f"{prefix}*/{pattern}" for pattern in files if pattern.startswith("*")]  # other copies of a model
    root = _download(match["repo"], match["revision"], patterns, nested, progress or Progress())
    whole = [found for found in (root / inner).glob("*") if found.name.endswith(SINGLE_FILES)]
    taken = files == ARTIFACT and whole and not any((root / inner).glob("*.safetensors"))
    return whole[0] if taken else root / inner


def origin(path: str | Path) -> str | None:
    """The name, `user/model@commit`, of a model in the Hub's cache; None for any other path."""
    found = SNAPSHOT.search(Path(path).absolute().as_posix())
    return f"{found['user']}/{found['name']}@{found['commit']}" if found else None


def _download(repo: str, revision: str | None, patterns: list[str], nested: list[str], progress: Progress) -> Path:
    """The snapshot of a model's repository in the cache; files that are missing there are downloaded.

    patterns: of files that are wanted, nested: of those that are not.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RevisionResolutionError

    name = f"{repo}@{revision}" if revision else repo
    with explained(name):
        try:
            before = HfApi().resolve_revision(repo, revision=revision, local_files_only=True).resolved
        except RevisionResolutionError:
            before = None
        commit = HfApi().resolve_revision(repo, revision=revision)
        if before not in (None, commit.resolved):
            progress.note(f"{name}: has moved to {commit.resolved}, which is taken; before it was {repo}@{before}")
        how: dict[str, Any] = {"revision": commit, "tqdm_class": _bar(Progress(), 0)}
        there = snapshot_download(repo, **how, allow_patterns=patterns, ignore_patterns=nested, dry_run=True)
        chosen = _one_model(name, sorted(file.filename for file in there))
        weighty = any(pattern.endswith(WEIGHTS) for pattern in patterns)
        if not any(file.endswith((*WEIGHTS, "adapter_config.json") if weighty else "") for file in chosen):
            names = HfApi().list_repo_files(repo, revision=commit)
            raise ConfigError(
                f"{name}: has no file that is wanted here ({', '.join(patterns[-3:])}): it holds "
                f"{', '.join(names[:12])}: pickles and code are never downloaded; {repo}:FOLDER names a folder in it"
            )
        missing = [file for file in there if file.will_download and file.filename in chosen]
        size = sum(file.file_size or 0 for file in missing)
        if missing:
            progress.stage(f"Downloading {name}")
            _check_room(name, size)
        how |= {"tqdm_class": _bar(progress, size)}
        return Path(snapshot_download(repo, **how, allow_patterns=[glob.escape(file) for file in chosen]))


def _one_model(name: str, names: list[str]) -> list[str]:
    """Drop single-file models beside safetensors; without safetensors expect one such file at most."""
    single = [file for file in names if file.endswith(SINGLE_FILES)]
    if any(file.endswith(".safetensors") for file in names):
        return [file for file in names if file not in single]
    if len(single) > 1:
        raise ConfigError(f"{name}: holds {', '.join(single)}: name one of them, for example {name}:{single[0]}")
    return names


def _check_room(name: str, size: int) -> None:
    """Raise OutputError where the cache's disk has no room for so many bytes."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if size > free:
        raise OutputError(
            f"{name}: takes {size:,} bytes, and the disk of {cache} has {free:,} free: make room, or set HF_HOME to a "
            "folder on another disk"
        )


def _bar(progress: Progress, total: int) -> type:
    """A class of tqdm bars for huggingface_hub, which shows nothing but the bytes that are done, as `progress`."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"disable": True})
            self.of_bytes, self.done = options.get("unit") == "B", 0

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            if self.of_bytes and total >= 1_000_000:  # of two such bars, one of which lags behind, either will do
                progress.part(min(self.done, total) // 1_000_000, total // 1_000_000, "MB")

    return Bar


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Raise InputError for whatever huggingface_hub meets."""
    try:
        yield
    except IntaglioError:
        raise
    except Exception as error:  # every layer below, down to the socket, has exceptions of its own
        raise InputError(f"{name}: {reason(error, 'model')}") from None


def reason(error: BaseException, kind: str) -> str:
    """Say what is wrong and what to do about an error of huggingface_hub, or of its caller; without the token.

    kind: of the repository, "model" or "dataset".
    """
    from huggingface_hub import errors, get_token

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, errors.HfHubHTTPError):
        cause = cause.__cause__
    told = _refusal(cause, kind) if isinstance(cause, errors.HfHubHTTPError) else one_line(error)
    if cause is None and isinstance(error, ValueError):
        told = f"is refused: {told}"
    elif cause is None:
        told = (
            f"no such file or folder, and no {kind} of this name can be read from the Hub, or kept in its cache: "
            f"{told}: check path, network and disk, and repeat the command: files that are whole are kept"
        )
    token = get_token()
    return told.replace(token, "TOKEN") if token else told


def _refusal(error: Any, kind: str) -> str:
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: accept its terms on its page of the Hub, then {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such file or folder, and no such {kind} on the Hub: check the name; if it is private, {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision: expected a branch, a tag or a commit of this repository"
    if status == 401:
        return f"the Hub refuses the token (401): {LOG_IN}, to a valid one, or unset it for what is public"
    if status == 403:
        return f"the Hub forbids it (403): use a token with the rights for it: {LOG_IN}"
    return f"the Hub answered {status}: {one_line(error)}: try again later"
