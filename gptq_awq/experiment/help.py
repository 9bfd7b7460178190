"""`gptq-awq --help`: the main job, subcommands, choices as the configs' folders have them, often changed options."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from gptq_awq.runtime.configs import CONFIGS

HELP = """\
Quantize a causal language model, score it against full precision, store one results row.

  gptq-awq method=awq bits=4                      the default model; in a checkout also: python run.py method=awq bits=4
  gptq-awq -m method=rtn,awq,gptq bits=2,3,4,8    a sweep, one run after the other
  gptq-awq -m method=rtn,awq bits=3,4 --dry-run   lists the runs, what is finished and how long the rest takes
  gptq-awq method=gptq --help                     what a preset is, and its own values
  gptq-awq method=gptq eval=full                  with lm-eval tasks
  gptq-awq experiment=weight_only                 a published table: 2/3/4/8 bits, group sizes
  gptq-awq method=gptq bits=3 group_size=32 model=local model.path=DIR data=local data.path=FILE \\
      data.samples=32 data.seqlen=256 eval.perplexity.path=FILE eval.perplexity.seqlen=256 \\
      eval.perplexity.windows=16 out=OUTDIR

Subcommands (gptq-awq SUBCOMMAND --help)

  report     tables and a page of stored runs           replay     compute a stored run again, name what differs
  export     verify checkpoints, run them in engines    push       upload a verified checkpoint to the hub
  generate   let a run or checkpoint write text         compare    what runs write beside full precision
  frontier   size against quality: table and plot       cache      list or clear what runs share on disk
  ls         methods, grids, models … with a line each  completion bash|zsh|fish: the Tab key
  --version  the version of gptq_awq

Choices (group=choice)

{groups}

Often changed (key=value)

  bits=4                         2 to 8
  group_size=64                  columns that share a scale; -1: per channel
  sym=false                      symmetric grid
  grid.search=minmax             how ranges are chosen: minmax, mse, hessian
  seed=0                         draws the calibration text
  memory_budget=4GB              of this process: larger models are read from disk, block by block
  device=auto                    cpu, cuda, cuda:1 ...
  dtype=float32                  of weights and evaluation
  compute_dtype=auto             of calibration forwards
  model.path=DIR  model.id=ORG/NAME          with model=local, model=hub
  data.path=FILE  data.samples=32  data.seqlen=512  data.packing=windows|documents
  eval.perplexity.path=FILE  eval.perplexity.seqlen=2048  eval.perplexity.windows=8
  eval.compute_dtype=float32     of evaluation's forwards: auto, bfloat16 are faster, with a noise floor
  eval.texts=[wikitext2,c4,FILE]  eval.metrics=[ppl,kl]     several texts, some metrics only
  eval.samples=FILE              prompts that both models go on from: text to read, in reports
  eval.tasks=[lambada_openai]  eval.limit=200  eval.num_fewshot=0  eval.include_path=FOLDER
  method.solver.act_order=true  method.solver.damping=0.01  method.transforms.awq.objective=linear|module
  experts.policy=route|shared|rtn|keep  experts.min_tokens=128    of mixtures: experts that few tokens reach
  act=int8|int4|fp8  kv=int8|int4|fp8        activations, cached keys and values (bits=8 act=int8 is W8A8)
  grid=q4_k_m|nf4|ternary|...    other number formats, which have bits of their own
  head=solve                     the output head too, by the method's solver (rtn: to nearest); untie_head=true
  protect=auto                   the sites that rounding costs most stay in full precision (protect_share=0.02 of the
                                 weights); protect=["*.down_proj"] names them
  export.formats=[gptq,gguf]     checkpoints: gptq awq compressed_tensors gguf mlx bnb hf
  tracking=wandb  tracking.mode=offline
  hydra/launcher=joblib|slurm|ray  with -m or experiment=: docs/sweeps.md
  resume=false                   compute anew what is finished, or was interrupted
  profile=true                   where the time goes: OUT/profile.md, OUT/trace.json.gz
  cache_gb=20                    what runs may share on disk
  ranks_timeout_minutes=30       torchrun --nproc-per-node 2 run.py …: docs/sweeps.md
  out=FOLDER                     where results.json, ledger.jsonl, config.yaml and run.log go

  The whole configuration, as composed from a command line: gptq-awq method=awq bits=4 --cfg job
  Groups of your own: --config-dir FOLDER; Hydra's own options: --hydra-help
"""
SHOWN = ("method", "grid", "model", "data", "eval", "act", "kv", "export", "tracking", "experiment", "hydra/launcher")


def help_text(config_dir: Path | None = None, arguments: Sequence[str] = ()) -> str:
    """The text of `--help`: of presets that the command line names, else of all there is.

    Choices of a folder given with `--config-dir` are shown, too.
    """
    named = [a.partition("=")[::2] for a in arguments if a.partition("=")[0] in SHOWN and "," not in a]
    if named and all((CONFIGS / group / f"{choice}.yaml").is_file() for group, choice in named):
        return "\n".join(_preset(group, choice) for group, choice in named)
    return HELP.replace("{groups}", "\n".join(_group(name, config_dir) for name in SHOWN))


def _preset(group: str, choice: str) -> str:
    """A preset's comment, and the options that it has with the values that it gives them."""
    text = (CONFIGS / group / f"{choice}.yaml").read_text(encoding="utf-8")
    comment = [line[1:].strip() for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    lines = [
        f"{group}={choice}",
        "",
        *(f"  {line}" for line in comment),
        "",
        "Options, with the values that it gives them",
        "",
    ]
    chosen = [f"{group}={choice}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("config", overrides=chosen)
    if group == "experiment":
        return "\n".join([*lines[:-3], "", text])
    parts = [group, "grid"] if group == "method" else [group.partition("/")[0]]
    for part in parts:
        lines += [f"  {path}={value}" for path, value in _leaves(OmegaConf.to_container(composed[part]), part)]
    return "\n".join([*lines, "", f"All options: gptq-awq {group}={choice} --cfg job", ""])


def _leaves(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if not str(key).startswith("_"):
                yield from _leaves(value, f"{path}.{key}")
    else:
        yield path, "null" if node is None else str(node).lower() if isinstance(node, bool) else str(node)


def _group(name: str, config_dir: Path | None) -> str:
    folders = [folder / name for folder in (CONFIGS, config_dir) if folder is not None]
    pattern = "**/*.yaml" if name == "experiment" else "*.yaml"  # elsewhere folders inside are groups of their own
    choices = sorted({path.relative_to(f).with_suffix("").as_posix() for f in folders for path in f.glob(pattern)})
    lines, line = [], f"  {name}:"
    for choice in choices:
        if len(line) + 1 + len(choice) > 118:
            lines.append(line)
            line = " " * (len(name) + 3)
        line += f" {choice}"
    return "\n".join([*lines, line])
