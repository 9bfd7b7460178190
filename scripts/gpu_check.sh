#!/usr/bin/env bash
# All that a GPU is needed for, in one command on a bare machine: its tests, its benchmark, whole runs, other programs.
#
#   scripts/gpu_check.sh --prepare WHEELS          where packages can be had: fill a folder with those to carry
#   scripts/gpu_check.sh WHEELS [OUT]              on the machine, from a copy of the checkout; needs no network
#   scripts/gpu_check.sh --device cpu --tiny WHEELS [OUT]     the same steps at toy size, to try them without a GPU
#
# The machine has Python 3.12, torch, triton, numba, scipy and pandas; the wheels bring the rest and are unpacked in OUT,
# where they come before the machine's packages. Each step has a time limit and a file in OUT (default: $OUT,
# or outputs/gpu); one that fails stops no other. OUT/summary.txt has exit status and seconds of each.
#
#   PYTHON=python3.12       interpreter of the machine; --prepare takes wheels for its version
#   MODEL=FOLDER            a transformers folder for the whole runs; default: a random Llama made on the spot
#   PEERS=FOLDER            environments of llm-compressor and GPTQModel made by scripts/install_engine.py, to compare
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3.12}"
LIMIT=$((56 * 1024 * 1024))  # bytes of wheels: with the checkout below 64 MiB
CARRIED=(
    transformers tokenizers safetensors regex typer click shellingham annotated-doc accelerate  # too old there
    huggingface_hub hf-xet httpx2 httpcore2 anyio h11 idna certifi sniffio fsspec truststore
    hydra-core omegaconf jaxtyping wadler-lindig greenlet gguf orjson rich markdown-it-py mdurl Pygments
    pydantic pydantic_core annotated-types typing-inspection typing_extensions platformdirs psutil filelock
    PyYAML packaging requests urllib3 charset-normalizer tqdm pytest iniconfig pluggy hypothesis sortedcontainers
)
SOURCES=(antlr4-python3-runtime)  # published as source only: their wheels are built

fail() {
    echo "gpu_check: $*" >&2
    exit 2
}

pinned() {  # each package's line of constraints.txt
    local name
    for name in "$@"; do
        grep -iE "^${name//[-_]/[-_]}==" constraints.txt || echo "gpu_check: constraints.txt has no $name" >&2
    done
}

prepare() {
    local wheels="$1" bytes version
    version="$("$PYTHON" -c 'import sys; print("{}.{}".format(*sys.version_info))')" || fail "no $PYTHON here"
    mkdir -p "$wheels"
    pinned "${CARRIED[@]}" > "$wheels/wheels.txt"
    pinned "${SOURCES[@]}" > "$wheels/sources.txt"
    "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
        --abi "cp${version/./}" --abi abi3 --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64 --platform any \
        -d "$wheels" -r "$wheels/wheels.txt" || fail "the wheels could not be had"
    "$PYTHON" -m pip wheel -q --no-deps -w "$wheels" -r "$wheels/sources.txt" || fail "a wheel could not be built"
    bytes="$(cat "$wheels"/*.whl | wc -c)"
    echo "$(ls "$wheels"/*.whl | wc -l) wheels, $((bytes / 1024 / 1024)) MiB"
    [ "$bytes" -le "$LIMIT" ] || fail "more than $((LIMIT / 1024 / 1024)) MiB"
}

install() {
    "$PYTHON" - "$WHEELS" "$OUT/packages" << 'EOF' || return 1
import sys, zipfile
from pathlib import Path
for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
    zipfile.ZipFile(wheel).extractall(sys.argv[2])  # all that installing is here, also where there is no pip
EOF
    "$PYTHON" - << 'EOF'
import platform, torch, transformers
print("Python", platform.python_version(), "torch", torch.__version__, "transformers", transformers.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
import gptq_awq
EOF
}

gpu_tests() {
    "$PYTHON" -m pytest -m gpu -p no:cacheprovider tests/kernels
    local status=$?
    if [ $status = 5 ] && [ -n "$TINY" ]; then status=0; fi  # there are none to run
    return $status
}

benchmark() {
    "$PYTHON" benchmarks/gpu.py --device "$DEVICE" $TINY --out "$OUT/benchmark.md"
}

whole_runs() {
    "$PYTHON" benchmarks/end_to_end.py --device "$DEVICE" ${MODEL:+--model "$MODEL"} $TINY \
        --out "$OUT/end_to_end.md" --folder "$OUT/runs"
}

peers() {
    if [ -z "${PEERS:-}" ]; then echo "PEERS is not given: nothing to compare with"; return 0; fi
    GPTQ_AWQ_ENGINES="$PEERS" "$PYTHON" benchmarks/peers.py --rows gptq --dtype bfloat16 --repeat 1
}

step() {  # NAME SECONDS: runs the function of that name in a process group of its own, and notes how it ended
    local name="$1" limit="$2" began status
    began=$SECONDS
    timeout --kill-after=10 "$limit" bash "$0" --step "$name" > "$OUT/$name.txt" 2>&1
    status=$?
    printf '%-12s exit %3d  %4d s of %d\n' "$name" "$status" $((SECONDS - began)) "$limit" | tee -a "$OUT/summary.txt"
    [ "$status" = 0 ] || { failed=1; tail -n 15 "$OUT/$name.txt" | sed 's/^/    /'; }
}

export DEVICE="${DEVICE:-cuda}" TINY="${TINY:-}" OUT WHEELS PYTHON
export HF_HUB_OFFLINE=1
if [ "${1:-}" = --step ]; then
    "$2"
    exit
fi
prepares=
while [[ "${1:-}" == --* ]]; do
    case "$1" in
        --prepare) prepares=1 ;;
        --tiny) TINY=--tiny ;;
        --device) DEVICE="${2:-}"; shift ;;
        *) fail "no option $1; see the head of this file" ;;
    esac
    shift
done
[ $# -ge 1 ] || fail "name the folder of wheels"
WHEELS="$(realpath -m "$1")"
if [ -n "$prepares" ]; then
    prepare "$WHEELS"
    exit
fi
OUT="$(realpath -m "${2:-${OUT:-outputs/gpu}}")"
export GPTQ_AWQ_CACHE="$OUT/cache" PYTHONPATH="$PWD:$OUT/packages"
compgen -G "$WHEELS/*.whl" > /dev/null || fail "$WHEELS holds no wheels: fill it with --prepare"
mkdir -p "$OUT"
: > "$OUT/summary.txt"
failed=0
step install 90
step gpu_tests 120
step benchmark 240
step whole_runs 180
step peers 120
exit $failed
