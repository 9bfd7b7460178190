"""Fit of rows of tokens to the model that reads them: their length to its context, their ids to its embedding."""

import logging
from dataclasses import MISSING, fields, replace
from typing import Any

from hydra.core.hydra_config import HydraConfig

from gptq_awq.data.tokens import TokenSet, within_vocabulary
from gptq_awq.models.context_length import check_context, context_length
from gptq_awq.models.load import LoadedModel

log = logging.getLogger(__name__)
SEQLEN = "data.seqlen"


def fitted_corpus(corpus: Any, loaded: LoadedModel) -> tuple[Any, LoadedModel]:
    """Corpus whose rows fit the model's context: the default length follows a smaller one, any other length is checked.

    Returns:
        The corpus, and the model with what there is to say of it in its report.

    Raises:
        UserError: naming data.seqlen, where the model has no positions for that length.
    """
    limit = context_length(loaded.model)
    if limit is None or corpus.seqlen <= limit:
        return corpus, loaded
    if corpus.seqlen == _default(corpus) and not _was_given():
        said = f"{SEQLEN}={limit}, the model's context, which is shorter than the default of {corpus.seqlen}"
        log.info("%s", said)
        corpus = replace(corpus, seqlen=limit)
    else:
        said = check_context(corpus.seqlen, loaded.model, SEQLEN) or ""
        log.warning("%s", said)
    return corpus, replace(loaded, report=replace(loaded.report, notes=(*loaded.report.notes, said)))


def readable(tokens: TokenSet, loaded: LoadedModel, option: str) -> TokenSet:
    """The tokens with padding that the model has a row for. Raises UserError naming `option` where a token has none."""
    rows = len(loaded.model.get_input_embeddings().get_parameter("weight"))
    return within_vocabulary(tokens, rows, loaded.tokenizer, option)


def _default(corpus: Any) -> int | None:
    """Length of a corpus' rows unless it is given."""
    return next((f.default for f in fields(corpus) if f.name == "seqlen" and f.default is not MISSING), None)


def _was_given() -> bool:
    """Whether the command line names the length of rows."""
    if not HydraConfig.initialized():
        return False
    names = [override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task]
    return SEQLEN in names
