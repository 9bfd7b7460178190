"""Towers and projector of a model that sees or hears, as llama.cpp reads them: mmproj.gguf beside the text part.

llama.cpp's own converter writes it (`--mmproj`) of the folder that the model came from, as towers and projectors aren't
quantized. They are given with `llama-mtmd-cli -m model.gguf --mmproj mmproj.gguf`.
"""

from pathlib import Path

from transformers import PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export.gguf_converter import imported, projector_of, refusing

PROJECTOR = "mmproj.gguf"


def write_projector(path: Path, root: Path, model: PreTrainedModel, dtype: str) -> str | None:
    """Write the towers and the projector of a model that sees or hears.

    Args:
        path: path of the file to write.
        root: the converter (gguf_converter.converter_root).
        model: the model; its name is that of the folder with its files.
        dtype: of matrices: F16, BF16 or F32.

    Returns:
        None, or why it can't be written: the model has no folder, or the converter doesn't take it.
    """
    alone = f"the file has the text part of {type(model).__name__} alone, without {PROJECTOR}"
    origin = Path(model.name_or_path or ".")
    if not model.name_or_path or not (origin / "config.json").is_file():
        return f"{alone}: the folder that the model came from isn't known"
    try:
        with imported(root) as package, refusing():
            projector_of(package, origin, path, dtype).write()
    except UserError as error:
        path.unlink(missing_ok=True)
        return f"{alone}: {str(error).removeprefix('export.formats=gguf: ').partition('; choose another')[0]}"
    return None
