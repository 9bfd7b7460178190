"""Checkpoints as models again: the weights that a format decodes to, in float32, with the checkpoint's tokenizer."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from gptq_awq.errors import UserError
from gptq_awq.export.reference import reference_model


def load_checkpoint(folder: Path | str) -> tuple[PreTrainedModel, Any]:
    """Load a checkpoint that `export.formats` or `QuantizedModel.save` wrote, of any format, on any machine.

    Weights are the dequantized ones, so the model is as large as in full precision; engines keep them packed.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        UserError: the folder holds no such checkpoint, it can't be decoded, or it has no tokenizer.
    """
    folder = Path(folder)
    model = reference_model(folder).eval().requires_grad_(False)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, _tokenizer(folder)


def _tokenizer(folder: Path) -> Any:
    packed = (folder / "model.gguf").is_file() and not (folder / "tokenizer.json").is_file()
    own = {"gguf_file": "model.gguf"} if packed else {}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **own)
    except Exception as error:
        raise UserError(f"{folder}: its tokenizer can't be loaded ({' '.join(str(error).split())[:200]})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
