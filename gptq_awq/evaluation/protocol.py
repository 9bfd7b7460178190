"""Options of configs/eval: the texts, metrics and tasks that a model is scored on, and how they are loaded."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from gptq_awq.data.corpora import Corpus, LocalText
from gptq_awq.data.text import READERS, Text
from gptq_awq.data.tokens import TokenSet, evaluation_windows
from gptq_awq.errors import UserError
from gptq_awq.evaluation.metrics.base import TokenMetric
from gptq_awq.evaluation.metrics.choice import STANDARD, EvaluationText, chosen
from gptq_awq.runtime.options import ComputeDtype, InputPath, PositiveInt, checked_keywords

if TYPE_CHECKING:
    from gptq_awq.evaluation.harness import Tasks
    from gptq_awq.evaluation.samples.prompts import Prompt


@checked_keywords
class Perplexity:
    """Windows of a text, on which perplexity and the other token metrics are measured.

    Attributes:
        text: corpus (configs/data) that is read unless `path` is set.
        path: .txt, .jsonl or .parquet file that is read instead of the corpus.
        field: name of the field with the text in a jsonl or parquet row.
        seqlen: tokens per window.
        windows: number of windows, from the start of the text; None: all of it.
    """

    text: Corpus
    path: InputPath | None = None
    field: str = "text"
    seqlen: PositiveInt = 2048
    windows: PositiveInt | None = 8

    def tokens(self, tokenizer: Any, option: str = "eval.perplexity") -> TokenSet:
        """Token ids of the windows of `path` or `text`. Raises UserError naming `option`."""
        if self.path is not None:
            text = LocalText(path=self.path, field=self.field).text(option)
        else:
            text = self.text.text(f"{option}.text")
        return self.cut(text, tokenizer, option)

    def cut(self, text: Text, tokenizer: Any, option: str = "eval.perplexity") -> TokenSet:
        """Token ids of the windows of any `text`. Raises UserError naming `option`."""
        return evaluation_windows(text, tokenizer, self.seqlen, self.windows, option)


@checked_keywords
class Evaluation:
    """Texts, metrics and tasks that a model is scored on.

    Attributes:
        perplexity: windows that token metrics are measured on; None: no text is scored.
        texts: names of `corpora` and files that are scored instead of the one text of `perplexity`, in its windows.
        corpora: corpora that `texts` may name.
        metric: token metrics that `metrics` may name.
        metrics: names of the token metrics to measure; None: all in `metric`.
        tasks: lm-eval tasks, by name, yaml file or config.
        limit: items per task, the first ones; None: all.
        num_fewshot: examples in the prompt; None: as the task says.
        include_path: folder of the user's own task yaml files.
        batch_size: items per forward.
        samples: file of prompts that both models go on from, greedily: text to read, in OUT/samples.jsonl.
        sample_tokens: most tokens that they write after each.
        compute_dtype: dtype of both models' forwards: auto, float32 (as the weights are), bfloat16 or float16.

    Raises:
        UserError: a metric or dtype that doesn't exist, or two sources of texts.
    """

    perplexity: Perplexity | None = None
    texts: Sequence[str] | str = ()
    corpora: Mapping[str, Corpus] = field(default_factory=dict)
    metric: Mapping[str, TokenMetric] = field(default_factory=lambda: {metric.name: metric for metric in STANDARD})
    metrics: Sequence[str] | str | None = None
    tasks: tuple[str | Mapping[str, Any], ...] = ()
    limit: PositiveInt | None = None
    num_fewshot: Annotated[int, Ge(0)] | None = None
    include_path: InputPath | None = None
    batch_size: PositiveInt = 8
    compute_dtype: ComputeDtype = "float32"
    samples: InputPath | None = None
    sample_tokens: PositiveInt = 64

    def __post_init__(self) -> None:
        chosen(self.metrics, self.metric)
        if self.texts and self.perplexity is not None and self.perplexity.path is not None:
            raise UserError("eval.texts and eval.perplexity.path: set one of them; eval.texts takes files too")

    def token_sets(self, tokenizer: Any) -> tuple[EvaluationText, ...]:
        """Windows of every text with the metrics to measure on them. Raises UserError naming the option."""
        if self.perplexity is None:
            return ()
        if self.texts:
            texts = [self.texts] if isinstance(self.texts, str) else self.texts
            found = [self.perplexity.cut(self._text(entry), tokenizer) for entry in texts]
        else:
            found = [self.perplexity.tokens(tokenizer)]
        for name, count in Counter(tokens.name for tokens in found).items():
            if count > 1:
                raise UserError(f"eval.texts: {count} texts are called {name}, and metrics go by it: rename a file")
        metrics = chosen(self.metrics, self.metric)
        return tuple(EvaluationText.of(tokens, metrics) for tokens in found)

    def _text(self, entry: str) -> Text:
        """Text of one entry of eval.texts: a corpus by its name, else a file. Raises UserError naming the option."""
        assert self.perplexity is not None
        corpus = self.corpora.get(entry)
        if corpus is None and not Path(entry).expanduser().is_file():
            known = ", ".join(self.corpora)
            raise UserError(f"eval.texts={entry}: neither a file nor a corpus; choose among {known}, or name a file")
        if corpus is None and Path(entry).suffix.lower() not in READERS:
            raise UserError(f"eval.texts={entry}: the suffix must be one of {', '.join(READERS)}")
        try:
            return (corpus or LocalText(path=entry, field=self.perplexity.field)).text("eval.texts")
        except UserError as error:
            raise UserError(_in_options_of_texts(str(error), entry, corpus is None)) from error

    def prompts(self) -> "tuple[Prompt, ...]":
        """Prompts of `samples`; none without. Raises UserError naming the option."""
        if self.samples is None:
            return ()
        from gptq_awq.evaluation.samples.prompts import read_prompts

        return read_prompts(Path(self.samples).expanduser(), "eval.samples")

    def load_tasks(self, seed: int) -> "Tasks | None":
        """Load lm-eval's tasks with their data; None if there are none. Raises UserError."""
        if not self.tasks:
            return None
        from gptq_awq.evaluation.harness import load_tasks

        return load_tasks(self.tasks, self.limit, self.num_fewshot, self.include_path, self.batch_size, seed)


def _in_options_of_texts(message: str, entry: str, is_file: bool) -> str:
    """A corpus' error with the options that the command line has: entries of a list have none of their own."""
    message = message.replace("data@eval.texts=", "eval.texts=").replace("eval.texts.path=", "eval.texts=")
    return message.replace("eval.texts.", "eval.perplexity." if is_file else f"eval.corpora.{entry}.")
