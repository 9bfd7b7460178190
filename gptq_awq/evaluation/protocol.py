"""What a run is scored on: the options of configs/eval, and the tokens and tasks they stand for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_awq.data.corpora import Corpus, LocalText
from gptq_awq.data.tokens import TokenSet, evaluation_windows
from gptq_awq.errors import UserError

if TYPE_CHECKING:
    from gptq_awq.evaluation.harness import Tasks


COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Windows of a text.

    Attributes:
        text: the corpus (configs/data), used unless `path` is set.
        path: a .txt, .jsonl or .parquet file instead.
        field: of a jsonl or parquet row.
        seqlen: tokens per window.
        windows: how many, from the start; None: all of the text.
    """

    text: Corpus
    path: str | None = None
    field: str = "text"
    seqlen: int = 2048
    windows: int | None = 8

    def tokens(self, tokenizer: Any, option: str = "eval.perplexity") -> TokenSet:
        """The windows. Raises UserError naming `option`."""
        if self.path is not None:
            text = LocalText(path=self.path, field=self.field).text(option)
        else:
            text = self.text.text(f"{option}.text")
        return evaluation_windows(text, tokenizer, self.seqlen, self.windows, option)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything a model is scored on.

    Attributes:
        perplexity: for perplexity, KL and agreement; None: not measured.
        tasks: lm-eval's, by name, yaml file or config.
        limit: items per task; None: all.
        num_fewshot: examples in the prompt; None: as the task says.
        include_path: a folder of the user's own task yaml files.
        batch_size: items per forward.
        compute_dtype: of forwards, of both models: auto, float32 (as the weights are), bfloat16 or float16.
    """

    perplexity: Perplexity | None = None
    tasks: tuple[str | Mapping[str, Any], ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    batch_size: int = 8
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise UserError(f"eval.compute_dtype={self.compute_dtype}: choose one of {', '.join(COMPUTE_DTYPES)}")

    def token_sets(self, tokenizer: Any) -> tuple[TokenSet, ...]:
        """The windows to score."""
        return () if self.perplexity is None else (self.perplexity.tokens(tokenizer),)

    def load_tasks(self, seed: int) -> "Tasks | None":
        """lm-eval's tasks with their data; None where none is asked for. Raises UserError."""
        if not self.tasks:
            return None
        from gptq_awq.evaluation.harness import load_tasks

        return load_tasks(self.tasks, self.limit, self.num_fewshot, self.include_path, self.batch_size, seed)
