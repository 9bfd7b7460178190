"""The worked example in docs/add_a_method.md, run as it stands there."""

import os
import re
import subprocess
import sys

from helpers.paths import ROOT

from gptq_awq import results


def code_blocks(language):
    text = (ROOT / "docs" / "add_a_method.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_worked_example_runs_as_written(tmp_path, tiny_folder, tiny_text):
    (tmp_path / "configs" / "method").mkdir(parents=True)
    (tmp_path / "diffusion.py").write_text(code_blocks("python")[0])
    (tmp_path / "configs" / "method" / "diffusion.yaml").write_text(code_blocks("yaml")[0])
    arguments = [
        *("--config-dir", str(tmp_path / "configs"), "method=diffusion", "bits=4", "group_size=16"),
        *("model=local", f"model.path={tiny_folder}", f"eval.perplexity.path={tiny_text}"),
        *("eval.perplexity.seqlen=32", "eval.perplexity.windows=8", f"out={tmp_path / 'out'}"),
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "GPTQ_AWQ_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    row = results.load(tmp_path / "out").iloc[0]
    assert row["method"] == "diffusion"
    assert results.read_ledger(tmp_path / "out" / "ledger.jsonl")["solver"].eq("diffusion").all()


def test_the_index_of_methods_has_every_page_and_its_links_lead_somewhere():
    folder = ROOT / "docs" / "methods"
    linked = set(re.findall(r"\]\(([^)#]+)", (folder / "README.md").read_text()))
    assert linked >= {path.name for path in folder.glob("*.md")} - {"README.md"}
    for page in folder.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (folder / target).exists(), f"{page.name} links to {target}"
