"""Storing a finished run: everything is written aside, recorded by hashes, and then renamed, the row last."""

import errno
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from gptq_awq.allocation.allocate import Allocation
from gptq_awq.errors import UserError
from gptq_awq.evaluation.samples.difference import Sample, write_samples
from gptq_awq.evaluation.scores import Scores
from gptq_awq.experiment.folder import CHECKPOINTS, FILES, LEDGER, UNFINISHED, clear_earlier, write_recorded
from gptq_awq.experiment.plan import Plan
from gptq_awq.export.write import Exported, write_card
from gptq_awq.results import FILE_NAME, Result
from gptq_awq.storage.atomic import owner
from gptq_awq.storage.records import records_of

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Within: what the system says of a full or read-only disk is the user's to fix. Raises UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror or error})") from error


def told(error: Exception) -> Exception:
    """Make an error of a full or read-only disk, wherever it was met, a `UserError`; any other one is returned."""
    if not isinstance(error, OSError) or error.errno not in NO_ROOM:
        return error
    where = f" ({error.filename})" if error.filename else ""
    return UserError(f"the disk can't be written{where}: {error.strerror}; make room, and type the same command again")


def store(
    plan: Plan,
    result: Result,
    scores: Scores,
    allocation: Allocation | None,
    checkpoints: Sequence[Exported],
    samples: Sequence[Sample] = (),
) -> Result:
    """Store all files of a finished run in its folder, and return its row with their records.

    A full disk leaves an earlier run's results whole. Checkpoints are in place already; their cards get the row.
    """
    with writing(plan.out), tempfile.TemporaryDirectory(dir=plan.out, prefix=f".storing-{owner()}-") as folder:
        aside = Path(folder)
        scores.write(aside)
        if allocation is not None:
            allocation.write(aside)
        if samples:
            write_samples(samples, aside)
        (aside / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(dict(plan.config))))
        row = json.loads(result.write(aside).read_text())
        for checkpoint in checkpoints:
            write_card(checkpoint.path, row, [checkpoint.verified])
        (aside / FILE_NAME).unlink()
        (aside / LEDGER).write_bytes((plan.out / UNFINISHED).read_bytes())
        formats = [checkpoint.format for checkpoint in checkpoints]
        files = records_of(aside) | records_of(plan.out, [f"{CHECKPOINTS}/{name}" for name in formats])
        result = write_recorded(result, files, aside)
        clear_earlier(plan.out, formats, [path.name for path in aside.iterdir()])
        for name in FILES:
            if (aside / name).exists():
                (aside / name).replace(plan.out / name)
        (plan.out / UNFINISHED).unlink()
    return result
