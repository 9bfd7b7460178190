"""The folder that Hydra makes for a run before anything is known of it: deleted where the run doesn't need it."""

from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from gptq_awq.storage.atomic import remove_unlocked


def remove_unused_hydra_folder(out: Path) -> None:
    """Delete the folder that Hydra made for this run, which stays empty where `out` is another one."""
    if HydraConfig.initialized():
        folder = Path(HydraConfig.get().runtime.output_dir)
        if folder.resolve() != out.resolve():
            remove_empty_folder(folder)


def remove_empty_folder(folder: Path) -> None:
    """Delete a folder that Hydra made, if it is empty and no run is at work there; likewise outputs/DATE and outputs.

    No folder above is touched that somebody else may have made.
    """
    made = Path.cwd() / "outputs"
    with suppress(OSError):
        remove_unlocked(folder)
        for parent in folder.parents:
            if made not in (parent, *parent.parents):
                break
            remove_unlocked(parent)
