"""What a model sees with lies beside its text part, written of the folder that the model came from."""

import json
import logging

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from helpers.architectures import tiny_architecture
from helpers.tiny_models import tiny_tokens

from gptq_awq import quantize_model
from gptq_awq.export.base import Source
from gptq_awq.export.gguf import GGUFFormat
from gptq_awq.export.gguf_converter import converter_root
from gptq_awq.export.gguf_projector import PROJECTOR, write_projector
from gptq_awq.export.reference import reference_model
from gptq_awq.export.verify import Probe, VerificationRecord
from gptq_awq.grids.signed import SignedGrid

pytestmark = pytest.mark.usefixtures("converter")


def seeing(name, folder):
    """A model that sees, saved to a folder with its processor's config, by which it is named."""
    model = tiny_architecture(name)
    model.save_pretrained(folder)
    config = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 32, "longest_edge": 1024}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    model.name_or_path = str(folder)
    return model


def test_every_weight_of_what_a_model_sees_with_is_in_the_file(tmp_path):
    model = seeing("glm4v", tmp_path)
    assert write_projector(tmp_path / PROJECTOR, converter_root(None), model, "F32") is None
    found = [tensor.data for tensor in GGUFReader(tmp_path / PROJECTOR).tensors]
    expected = [p for name, p in model.named_parameters() if "language_model" not in name and "lm_head" not in name]
    values = np.sort(np.concatenate([data.flatten() for data in found]))
    assert np.array_equal(values, np.sort(torch.cat([p.flatten() for p in expected]).numpy()))


def test_it_lies_beside_the_text_part_which_is_what_is_read(tmp_path):
    model = seeing("smolvlm", tmp_path / "source")
    weights = quantize_model(model, method="rtn", grid=SignedGrid(4, 32)).weights
    source, format_, folder = (
        Source(model, None, "seeing", weights),
        GGUFFormat(plain_dtype="F32"),
        tmp_path / "written",
    )
    folder.mkdir()
    format_.write(source, folder)
    assert {"model.gguf", PROJECTOR} <= {path.name for path in folder.iterdir()}
    VerificationRecord.of(format_, source, folder, Probe.of(model, tiny_tokens(2, 16), "test"), {}).write(folder)
    logits = model(input_ids=tiny_tokens(), use_cache=False).logits
    torch.testing.assert_close(reference_model(folder)(tiny_tokens()).logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "why"), [("smolvlm", "came from isn't known"), ("aya_vision", "knows no projector")])
def test_where_there_is_none_the_log_says_why(name, why, tmp_path, caplog):
    model = seeing(name, tmp_path)
    if name == "smolvlm":
        model.name_or_path = ""
    with caplog.at_level(logging.WARNING):
        told = write_projector(tmp_path / PROJECTOR, converter_root(None), model, "F16")
    assert why in told
    assert not (tmp_path / PROJECTOR).exists()
