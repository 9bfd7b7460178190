"""The page about tasks of one's own: its files and its command run as they stand there."""

import json
import os
import re
import shlex

from helpers.forked import call_run
from helpers.paths import ROOT


def test_the_task_of_the_docs_runs_as_written(tmp_path, tiny_folder, tiny_text, forks):
    page = (ROOT / "docs" / "add_a_task.md").read_text()
    files = re.findall(r"`(my_tasks/\S+)`:\n\n```\w+\n(.*?)```", page, flags=re.DOTALL)
    assert len(files) == 2
    for name, content in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (command,) = re.findall(r"```bash\npython run.py (.*?)\n```", page)
    arguments = [
        *shlex.split(command),
        *("group_size=16", "model=local", f"model.path={tiny_folder}", f"eval.perplexity.path={tiny_text}"),
        *("eval.perplexity.seqlen=32", "eval.perplexity.windows=2", "out=out"),
    ]
    done = call_run(arguments, os.environ | {"GPTQ_AWQ_CACHE": str(tmp_path / "cache")}, tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert metrics["lm_eval/seasons/acc"] in (0, 1 / 3, 2 / 3, 1)
    assert {"lm_eval/seasons/acc/baseline", "lm_eval/seasons/acc/delta"} <= metrics.keys()
