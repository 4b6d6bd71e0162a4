"""Upload of a release to the Hugging Face Hub: the very files that `export --to` wrote, verified once more before.

A commit appears whole or not at all. What a broken upload has left on the Hub is not sent again when it is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intaglio.errors import InputError, MismatchError
from intaglio.packed.model import PackedModel
from intaglio.plan.files import read_text
from intaglio.plan.hub import NAME, explained
from intaglio.progress import Progress
from intaglio.runs.release import CARD, MANIFEST, is_release, read_manifest, verify_release


@dataclass(frozen=True)
class Push:
    """A repository, uploaded or planned. files: sizes in bytes by the paths there. card: the text of its README.md.

    url: of the commit; empty for a dry run. unknown: metadata that the card lacks, since no one said them.
    """

    repo: str
    files: dict[str, int]
    card: str
    url: str = ""

    @property
    def unknown(self) -> list[str]:
        head = self.card.split("---\n")[1]
        return [key for key in ("base_model", "license") if f"{key}:" not in head]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "bytes": sum(self.files.values()), "unknown": self.unknown}


def push_release(
    packed: PackedModel,
    folder: str | Path,
    push: str,
    *,
    private: bool = False,
    each: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> list[Push]:
    """Verify a release against its packed model, then upload it to the Hub's repository `push`, and say what it holds.

    each: a repository for every format, `push`-FORMAT, which has its files at the top, where vLLM and MLX look for
    them; else one repository with a folder for each. private: whether a new repository is. dry_run: upload nothing.
    Raises MismatchError for a release that does not hold what was packed, and InputError for whatever the Hub refuses.
    """
    folder, progress, name = Path(folder), progress or Progress(), NAME.fullmatch(push)
    if name is None or name["repo"] != push:
        raise InputError(f"--push {push!r}: expected user/name")
    if not is_release(folder):
        raise InputError(f"{folder}: no {MANIFEST}: expected a release, as `intaglio export --to` writes it")
    progress.stage("Verifying")
    results, wrong = verify_release(packed, folder)
    wrong += [result.summary() for result in results if not result.exact]
    if wrong:
        raise MismatchError(f"{'; '.join(wrong)}: nothing is uploaded: make the release again")
    sums = read_manifest(folder)
    formats = sorted({path.partition("/")[0] for path in sums if "/" in path}) if each else [""]
    return [
        _push(folder / form, f"{push}-{form}" if form else push, _below(sums, form), private, dry_run, progress)
        for form in formats
    ]


def _below(sums: dict[str, str], form: str) -> dict[str, str]:
    """The sums of one format's files, by their paths in its folder; of all files without one."""
    prefix = f"{form}/" if form else ""
    return {path.removeprefix(prefix): digest for path, digest in sums.items() if path.startswith(prefix)}


def _push(folder: Path, repo: str, sums: dict[str, str], private: bool, dry_run: bool, progress: Progress) -> Push:
    manifest = "".join(f"{digest}  {path}\n" for path, digest in sums.items()).encode()
    sizes = {path: (folder / path).stat().st_size for path in sums} | {MANIFEST: len(manifest)}
    planned = Push(repo, sizes, read_text(folder / CARD))
    if dry_run:
        return planned
    progress.stage(f"Uploading {repo}")
    contents: dict[str, Any] = {path: folder / path for path in sums} | {MANIFEST: manifest}
    with explained(repo):
        return Push(repo, sizes, planned.card, _upload(repo, contents, sizes, private, progress))


def _upload(
    repo: str, contents: dict[str, Path | bytes], sizes: dict[str, int], private: bool, progress: Progress
) -> str:
    """Make the repository if there is none, upload these files in one commit, and return its address."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    api = HfApi()
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise InputError(f"{repo}: is there already and is public: make it private on the Hub, or leave out --private")
    stale = sorted({*api.list_repo_files(repo)} - {*contents, ".gitattributes"})
    if stale:
        progress.note(f"{repo}: {len(stale)} files that are no part of this release stay there: {', '.join(stale[:5])}")
    files = [CommitOperationAdd(path, content) for path, content in contents.items()]
    done, total = 0, sum(sizes.values())
    with disable_progress_bars():
        for file in files:
            api.preupload_lfs_files(repo, [file], free_memory=False)
            done += sizes[file.path_in_repo]
            progress.part(done // 1_000_000, total // 1_000_000, "MB")
        said = api.create_commit(repo, files, commit_message="Upload a release of intaglio")
    return str(said.commit_url)
