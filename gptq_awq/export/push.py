"""Upload a checkpoint to the Hugging Face hub: `gptq-awq push FOLDER REPO`, once it is verified to be what was scored.

    gptq-awq push outputs/…/checkpoints/gptq ORG/NAME --dry-run     what would be uploaded: files, sizes, the model card
    gptq-awq push outputs/…/checkpoints/gptq ORG/NAME --private     a new repository that only its owners see

The token is the hub's own: HF_TOKEN, or what `hf auth login` stored. Where the hub can't be reached the same is shown,
nothing is uploaded, and the exit code is 1.
"""

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gptq_awq.errors import UserError
from gptq_awq.export.verify import CARD, RECORD, VerificationRecord, verify
from gptq_awq.runtime.commands import described_parser, exit_code
from gptq_awq.storage.assets import hub_reachable

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
"""Files of a repository that readers may take for the weights of a folder, whoever put them there."""
FILES_OF_THEIR_OWN = ("gguf", "imatrix")
"""Formats that readers open by the name of a file, so that others in a repository do no harm."""


def parser() -> argparse.ArgumentParser:
    """Parser of the options of `gptq-awq push`."""
    options = described_parser("gptq-awq push", __doc__)
    options.add_argument("folder", type=Path, metavar="FOLDER", help="OUT/checkpoints/FORMAT")
    options.add_argument("repo", metavar="REPO", help="ORG/NAME, or NAME for one of your own; made if there is none")
    options.add_argument("--private", action="store_true", help="a new repository that only its owners see")
    options.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made if need be (default: main)")
    options.add_argument("--message", metavar="TEXT", help="of the commit; default: the format and the version")
    options.add_argument("--replace", action="store_true", help="delete other weights that the repository holds")
    options.add_argument("--dry-run", action="store_true", help="show what would be uploaded, and do nothing")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 where the hub can't be reached, or 2 with one line on stderr for a mistake."""
    options = parser().parse_args(arguments)
    return exit_code(lambda: push(options))


def push(options: argparse.Namespace) -> int:
    """Verify a checkpoint, show what it consists of, and upload that; returns the exit code.

    Raises:
        UserError: the folder is no checkpoint or was altered, or the hub refuses it.
    """
    record = VerificationRecord.read(options.folder)
    _say(f"{options.folder}: {verify(options.folder)}")
    files = checkpoint_files(options.folder, record)
    _show(options.folder, files, options.repo)
    if options.dry_run:
        _say("dry run: nothing was uploaded")
        return 0
    if why := _offline():
        _say(f"nothing was uploaded: {why}")
        return 1
    from huggingface_hub.errors import HfHubHTTPError

    try:
        _say(f"uploaded: {_upload(options, files, record)}")
    except (HfHubHTTPError, OSError, ValueError) as error:  # ValueError: names and cards that the hub doesn't take
        raise UserError(f"push {options.repo}: {' '.join(str(error).split()):.300}") from error
    return 0


def checkpoint_files(folder: Path, record: VerificationRecord) -> list[Path]:
    """Files of a checkpoint: those that were written with it, its record and its model card."""
    return [folder / name for name in (CARD, *sorted(record.files), RECORD) if (folder / name).is_file()]


def _show(folder: Path, files: Sequence[Path], repo: str) -> None:
    """Print the files with their sizes, what stays behind, and the model card."""
    sizes = [path.stat().st_size for path in files]
    _say(f"{len(files)} files, {sum(sizes) / 1e6:,.1f} MB, for {repo}:")
    for path, size in zip(files, sizes, strict=True):
        _say(f"{size:15,d}  {path.name}")
    for path in sorted(set(folder.iterdir()) - set(files)):
        _say(f"    stays here:  {path.name} (it was not written with the checkpoint)")
    card = folder / CARD
    _say(
        "\n" + (card.read_text(encoding="utf-8") if card.is_file() else f"There is no {CARD}: the page stays empty.\n")
    )


def _offline() -> str:
    """The reason why the hub can't be asked; "" if it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return "" if hub_reachable() else f"{constants.ENDPOINT} does not answer"


def _upload(options: argparse.Namespace, files: Sequence[Path], record: VerificationRecord) -> str:
    """Commit the files to the repository, in one commit, and return its address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    if get_token() is None:
        raise UserError(f"push {options.repo}: there is no token of the hub; run `hf auth login`, or set HF_TOKEN")
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    repo = api.create_repo(options.repo, private=options.private or None, exist_ok=True).repo_id
    if options.private and not api.repo_info(repo).private:
        raise UserError(f"push {repo}: it exists and is public; --private is for new ones, so make it private first")
    if options.revision:
        api.create_branch(repo, branch=options.revision, exist_ok=True)
    others = _other_weights(api, repo, options.revision, files, record.format)
    if others and not options.replace:
        raise UserError(
            f"push {repo}: it holds {others[0]}, which readers may take for weights of this checkpoint; --replace "
            f"deletes it{f' and {len(others) - 1} more' if others[1:] else ''}, or name another REPO or --revision"
        )
    changes = [CommitOperationAdd(path.name, path) for path in files] + [CommitOperationDelete(n) for n in others]
    message = options.message or f"{record.format}, by {record.facts.get('method', 'gptq_awq')}"
    return str(api.create_commit(repo, changes, commit_message=message, revision=options.revision).commit_url)


def _other_weights(api: Any, repo: str, revision: str | None, files: Sequence[Path], format_name: str) -> list[str]:
    """Names of weights in the repository that the upload would leave beside the checkpoint's."""
    if format_name in FILES_OF_THEIR_OWN:
        return []
    held = api.list_repo_files(repo, revision=revision)
    own = {path.name for path in files}
    return [name for name in held if name not in own and any(fnmatch(name, pattern) for pattern in WEIGHTS)]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
