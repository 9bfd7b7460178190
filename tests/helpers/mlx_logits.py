"""Logits of a folder that mlx-lm loads, in this process."""

import numpy as np
import pytest
import torch


def mlx_logits(folder, tokens):
    mx = pytest.importorskip("mlx.core")
    load_model = pytest.importorskip("mlx_lm.utils").load_model
    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return torch.from_numpy(np.array(model(mx.array(tokens.numpy()))))
