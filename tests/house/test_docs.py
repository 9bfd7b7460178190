"""Documentation holds what it says: worked examples run as they stand, links lead somewhere, names and paths exist."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from helpers.forked import call_run
from helpers.paths import CONFIGS, ROOT
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.torch import load_file, save_file
from torch.distributed.run import get_args_parser

from gptq_awq import results
from gptq_awq.__main__ import SUBCOMMANDS
from gptq_awq.experiment.options import check_options

DOCS = ROOT / "docs"
HISTORY = ("log.md", "CHANGELOG.md")
"""Pages that speak of the past, when files had other names."""
IN_REPOSITORY = r"(?<![\w/.-])((?:gptq_awq|configs|tests|docs|scripts|benchmarks|notebooks)/[\w/.-]*\w)"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "benchmarks" / "README.md"])


def page_id(path):
    return str(path.relative_to(ROOT))


class Example:
    """A page's files, written below a folder as the page's command calls it, and that command."""

    def __init__(self, page, folder):
        self.text, self.folder = (DOCS / page).read_text(), folder
        self.command = next(block for block in self.blocks("bash") if block.startswith("PYTHONPATH="))
        self.home = folder / re.match(r"PYTHONPATH=(\S+)", self.command)[1]
        for name, content in re.findall(r"`(\S+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", self.text, flags=re.DOTALL):
            path = self.home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    def blocks(self, language):
        return re.findall(rf"```{language}\n(.*?)```", self.text, flags=re.DOTALL)

    def run(self, *arguments):
        """The page's command, with further options that make it small."""
        variable, python, script, *given = shlex.split(self.command.replace("\\\n", " "))
        assert (python, script) == ("python", "run.py")
        environment = os.environ | {"GPTQ_AWQ_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        done = call_run([*given, *arguments], environment | dict([variable.split("=", 1)]), self.folder)
        assert done.returncode == 0, done.stderr
        return done


@pytest.fixture
def small(tiny_folder, tiny_text, forks):
    """Options that make a run small: a random model and a short text."""
    return {
        "model": ["model=local", f"model.path={tiny_folder}"],
        "data": ["data=local", f"data.path={tiny_text}"],
        "calibration": ["group_size=16", "data.samples=8", "data.seqlen=32"],
        "windows": ["eval.perplexity.seqlen=32", "eval.perplexity.windows=8"],
        "text": [f"eval.perplexity.path={tiny_text}"],
    }


def options(small, *without):
    return [option for name, group in small.items() if name not in without for option in group]


def test_a_method_outside_of_the_repository(tmp_path, small):
    Example("add_a_method.md", tmp_path).run(*options(small), f"out={tmp_path / 'out'}")
    assert results.load(tmp_path / "out").iloc[0]["method"] == "diffusion"
    assert results.read_ledger(tmp_path / "out" / "ledger.jsonl")["solver"].eq("diffusion").all()


def test_a_grid_outside_of_the_repository(tmp_path, small):
    Example("add_a_grid.md", tmp_path).run(*options(small), f"hydra.sweep.dir={tmp_path / 'sweep'}")
    rows = results.load(tmp_path / "sweep")
    assert sorted(rows["grid"]) == sorted(["apot3", "apot5", "apot7"] * 2)
    kl = {(row["method"], row["grid"]): row["metrics"]["tiny/kl"] for _, row in rows.iterrows()}
    for method in ("rtn", "gptq"):
        assert kl[method, "apot3"] > kl[method, "apot5"] > kl[method, "apot7"] > 0
    bits = dict(zip(rows["grid"], rows["bits_per_weight"], strict=True))
    assert bits == {"apot3": 3 + 1, "apot5": 5 + 1, "apot7": 7 + 1}  # a float16 scale per 16 weights


def test_a_dataset_outside_of_the_repository(tmp_path, small):
    example = Example("add_a_dataset.md", tmp_path)
    shutil.copytree(DOCS / "methods", tmp_path / "notes")
    (tmp_path / "manuals").mkdir()
    shutil.copy(DOCS / "footguns.md", tmp_path / "manuals")
    example.run(*options(small, "data", "text"), f"out={tmp_path / 'out'}")
    row = results.load(tmp_path / "out").iloc[0]
    assert {"manuals/ppl@32", "manuals/kl"} <= row["metrics"].keys()
    assert row["config"]["data"]["path"] == "notes"


def test_an_exporter_outside_of_the_repository(tmp_path, small):
    example = Example("add_an_exporter.md", tmp_path)
    example.run(*options(small), "out=OUT")
    (command,) = (shlex.split(block) for block in example.blocks("bash") if "read_npz" in block)
    done = subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "14 layers are those that were scored\n"


def test_models_outside_of_the_repository(tmp_path, small, tiny_folder):
    example = Example("add_a_model.md", tmp_path)
    for name in ("first", "second"):
        shutil.copytree(tiny_folder, tmp_path / "checkpoints" / name)
    second = tmp_path / "checkpoints" / "second" / "model.safetensors"
    save_file({name: 1.1 * weight for name, weight in load_file(second).items()}, second, {"format": "pt"})
    example.run(*options(small, "model"), f"hydra.sweep.dir={tmp_path / 'sweep'}")
    rows = results.load(tmp_path / "sweep").set_index("model")["metrics"]
    assert rows["mine"]["tiny/ppl@32/baseline"] != rows["soup"]["tiny/ppl@32/baseline"]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=page_id)
def test_paths_and_modules_exist(page):
    """Also in code blocks; what a page makes itself (a worked example) is excused by the word that goes before it."""
    text = page.read_text()
    for path in re.findall(IN_REPOSITORY, text):
        made = f"`{path}`:\n" in text or page.name.startswith("add_a")
        assert made or any((base / path).exists() for base in (ROOT, page.parent)), f"{page.name} names {path}"
    for module in re.findall(r"\bgptq_awq(?:\.\w+)+", text):
        parts = module.split(".")
        found = any(_is_module(parts[:depth]) for depth in range(2, len(parts) + 1))
        assert found or page.name.startswith("add_a"), f"{page.name} names {module}"


def _is_module(parts):
    path = ROOT.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def commands(page):
    """Overrides of each `python run.py …` in a page's bash blocks, but for those that leave something out."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?<!\S)(?:run\.py|gptq-awq) (.*)", line.partition(" # ")[0])
            if found is None or re.match(r"[a-z]+( |$)", found[1]) or re.search("…|PYTHONPATH|--help", line):
                continue
            yield [word for word in shlex.split(found[1]) if word not in ("-m", "--cfg", "job", "--dry-run")]


def subcommands(page):
    """Words after `gptq-awq` or `python -m gptq_awq.` in a page's bash blocks, where they are a command of its own."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?<!\S)(?:gptq-awq |python -m gptq_awq\.)([a-z]+(?: .*|$))", line.partition(" # ")[0])
            if found:
                yield shlex.split(found[1].removesuffix(')"').replace("[ROOT …]", ""))


COMMANDS = [(page_id(page), each) for page in PAGES if page.name not in HISTORY for each in commands(page)]


@pytest.mark.parametrize(("page", "given"), COMMANDS, ids=[f"{page}: {' '.join(each)}" for page, each in COMMANDS])
def test_commands_have_options_that_exist(page, given):
    """Each composes, with the first value of every sweep, and its options are those that classes declare."""
    given = [
        re.sub(r"((?:path|samples|imatrix)=)(DIR|FILE|my_tasks)\b", rf"\g<1>{ROOT}", word) for word in given
    ]  # which have to be there
    parsed = [each for each in OverridesParser.create().parse_overrides(given) if "hydra" not in each.key_or_group]
    first = [
        f"{each.get_key_element()}={next(each.sweep_string_iterator())}"
        if each.is_discrete_sweep()
        else each.input_line
        for each in parsed
        if not each.is_interval_sweep() and "tag(" not in each.input_line
    ]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        check_options(compose("config", overrides=[*first, "out=somewhere"]))


def launches(page):
    """A page's lines of torchrun and srun that start ranks: the launcher's words, and the program's."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in block.splitlines():
            found = re.search(r"\b(torchrun|srun) (.*?) ?(?:python )?run\.py (.*)", line.partition(" # ")[0])
            if found:
                yield found[1], shlex.split(found[2]), shlex.split(found[3].replace("model=…", "").replace("…", ""))


LAUNCHES = [(page_id(page), *each) for page in PAGES if page.name not in HISTORY for each in launches(page)]


@pytest.mark.parametrize(("page", "launcher", "words", "given"), LAUNCHES)
def test_lines_that_start_ranks_are_whole(page, launcher, words, given):
    if launcher == "torchrun":
        launched = get_args_parser().parse_args([*words, "run.py", *given])
        assert (launched.training_script, launched.training_script_args) == ("run.py", given)
        assert int(launched.nproc_per_node) > 1
    else:
        assert set(re.findall(r"--[a-z-]+", " ".join(words))) <= {"--ntasks", "--ntasks-per-node", "--gpus-per-task"}
        assert any(word.startswith("--ntasks=") for word in words)  # by it srun says how many ranks there are
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        check_options(compose("config", overrides=[*given, "out=somewhere"]))


OF_THEIR_OWN = [(page_id(page), each) for page in PAGES if page.name not in HISTORY for each in subcommands(page)]


@pytest.mark.parametrize(("page", "given"), OF_THEIR_OWN, ids=[f"{p}: {' '.join(each)}" for p, each in OF_THEIR_OWN])
def test_subcommands_exist_and_take_what_pages_give_them(page, given):
    module, _, _ = SUBCOMMANDS[given[0]].partition(":")
    parser = getattr(importlib.import_module(module), "parser", None)
    if parser is not None:
        parser().parse_args(given[1:])


def test_every_page_is_in_the_index():
    for folder, index in ((DOCS, "index.md"), (DOCS / "methods", "README.md"), (DOCS / "tutorials", "README.md")):
        linked = set(re.findall(r"\]\(([^)#]+)", (folder / index).read_text()))
        assert linked >= {path.name for path in folder.glob("*.md")} - {index}


def test_the_glossary_is_alphabetical():
    terms = re.findall(r"^\*\*(.*?)\*\*", (DOCS / "glossary.md").read_text(), flags=re.MULTILINE)
    assert terms == sorted(terms, key=str.casefold)
    assert len(terms) > 40


def test_the_layout_names_every_module_and_no_other():
    (tree,) = re.findall(r"## Layout\n\n```\n(.*?)```", (DOCS / "design.md").read_text(), flags=re.DOTALL)
    sources = [path for path in (ROOT / "gptq_awq").rglob("*.py") if not path.name.startswith("__")]
    modules = {path.name for path in sources if "programs" not in path.parts}
    named = set(re.findall(r"\b\w+\.py\b", tree))
    assert named >= modules, f"not in docs/design.md: {sorted(modules - named)}"
    assert named <= modules | {"run.py", "__main__.py"}, f"no longer there: {sorted(named - modules)}"
    packages = {path.parent.name for path in (ROOT / "gptq_awq").rglob("__init__.py")}
    assert set(re.findall(r"\b(\w+)/", tree)) >= packages - {"programs"}


def test_readmes_numbers_are_those_of_the_stored_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("readme_numbers")
    assert module.main(["--check"]) == 0, "make readme-numbers writes them"


def test_the_sites_navigation_has_every_page_and_no_other():
    def pages(node):
        for entry in node:
            value = next(iter(entry.values())) if isinstance(entry, dict) else entry
            yield from pages(value) if isinstance(value, list) else [value]

    nav = yaml.safe_load(re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text()))["nav"]
    joined = {"readme.md", "benchmarks.md", "contributing.md", "changelog.md"}
    assert set(pages(nav)) == joined | {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_the_librarys_example_runs(tiny_folder, tiny_text, tmp_path, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "reference.md").read_text(), flags=re.DOTALL)
    names = {"FOLDER": str(tiny_folder), "OUT": str(tmp_path / "out"), "texts": tiny_text.read_text().splitlines()[:30]}
    exec(example.replace("bits=4", "bits=4, group_size=16, seqlen=32"), names)
    assert "QuantizedModel(" in capsys.readouterr().out
    assert names["again"].config.model_type == "llama"


def test_files_that_the_site_needs_are_in_the_repository():
    """mkdocs leaves out what is missing without a word, and a checkout has only what git doesn't ignore."""
    config = yaml.safe_load(re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text()))
    files = [ROOT / "docs" / name for name in (*config["extra_css"], *config["extra_javascript"])]
    assert [file for file in files if not file.is_file()] == []
    if (ROOT / ".git").exists():
        ignored = subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True, check=False)
        assert ignored.stdout == ""
