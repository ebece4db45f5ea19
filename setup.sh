#!/usr/bin/env bash
# Builds .venv in this checkout, or brings it up to the pins; does nothing where it is current.
#   PYTHON=python3.12         another interpreter (3.11 or 3.12)
#   GRAIL_FBGEMM=cpu|cuda     overrides which fbgemm build goes with torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

venv=.venv
log=$venv/setup.log
stamp_file=$venv/grail-stamp
num_steps=6
step=0

main() {
    local stamp
    take_lock
    choose_python
    stamp=$(compute_stamp)
    if [ -f "$stamp_file" ] && [ "$stamp" = "$(cat "$stamp_file")" ]; then
        echo "set-up is current ($venv, Python $python_version)"
        return
    fi
    echo "setting up $venv with Python $python_version (log: $log)"
    rm -f "$stamp_file"
    run_step "virtual environment" make_venv
    run_step "torch $(pin torch)" install_torch
    run_step "pinned packages" install_packages
    run_step "fbgemm $(pin torchrec)" install_fbgemm
    run_step "grail command" install_grail
    run_step "import of every package" import_packages
    echo "$stamp" >"$stamp_file"
    echo "set-up is done: $(tail -n 1 "$log")"
}

# Two set-ups at once, or one beside what an interrupted one left running, would undo each other's files.
take_lock() {
    mkdir -p $venv
    if command -v flock >/dev/null; then
        exec 9>$venv/setup.lock
        flock --nonblock 9 || { echo "waiting for another set-up of $venv" && flock 9; }
    fi
}

# --- which interpreter ------------------------------------------------------------------------------------------------

choose_python() {
    local candidate candidates=(python3.11 python3.12 python3 python)
    if [ -n "${PYTHON:-}" ]; then
        candidates=("$PYTHON")
    elif $venv/bin/python -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then
        # Its base, since the environment may have to be made again (copied from another folder, say).
        candidates=("$($venv/bin/python -c 'import sys; print(sys._base_executable)')")
    fi
    for candidate in "${candidates[@]}"; do
        python_version=$("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue
        case $python_version in 3.11.* | 3.12.*) python=$candidate && return ;; esac
    done
    fail "Python 3.11 or 3.12 is required, and ${candidates[*]} gave: ${python_version:-none that runs}." \
        "Install one of them and name it, for example: make setup PYTHON=/usr/bin/python3.11"
}

# The pins, the interpreter, the choice of fbgemm and the folder (a virtual environment cannot be moved).
compute_stamp() {
    "$python" -I - "$python_version" "${GRAIL_FBGEMM:-auto}" "$PWD" \
        requirements.txt requirements-dev.txt pyproject.toml setup.sh <<'PYTHON'
import hashlib, pathlib, sys
digest = hashlib.sha256(repr(sys.argv[1:4]).encode())
for name in sys.argv[4:]:
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PYTHON
}

# --- the steps --------------------------------------------------------------------------------------------------------

make_venv() {
    local home="$python_version in $PWD"
    if [ "$home" = "$(cat $venv/grail-home 2>/dev/null)" ] && $venv/bin/python -m pip --version; then
        return
    fi
    need_disk_gib 5
    find $venv -mindepth 1 -maxdepth 1 ! -name 'setup.*' -exec rm -rf {} +
    "$python" -m venv $venv
    echo "$home" >$venv/grail-home
}

install_torch() {
    # Alone and first, so that no other package can pull another build of it; which build is left to pip.
    pip_install --constraint requirements.txt "torch==$(pin torch)"
}

install_packages() {
    pip_install --no-deps -r requirements.txt -r requirements-dev.txt
}

install_fbgemm() {
    local build=${GRAIL_FBGEMM:-}
    if [ -z "$build" ]; then
        build=$($venv/bin/python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
    fi
    case $build in
        cpu) install_fbgemm_build fbgemm-gpu-cpu fbgemm-gpu ;;
        cuda) install_fbgemm_build fbgemm-gpu fbgemm-gpu-cpu ;;
        *) echo "GRAIL_FBGEMM must be cpu or cuda, and is $build" && return 1 ;;
    esac || {
        # The CPU build may not load beside a CUDA torch on a machine without a driver.
        [ -z "${GRAIL_FBGEMM:-}" ] && [ "$build" = cpu ] && torch_is_cuda || return 1
        install_fbgemm_build fbgemm-gpu fbgemm-gpu-cpu
    }
}

install_fbgemm_build() {
    local wanted=$1 other=$2
    if $venv/bin/python -m pip show --quiet "$other"; then
        # Both are the module fbgemm_gpu, so removing one takes files of the other with it.
        $venv/bin/python -m pip uninstall --yes "$other" "$wanted" || return 1
    fi
    pip_install --no-deps "$wanted==$(pin torchrec)" && $venv/bin/python -c 'import torch, fbgemm_gpu'
}

torch_is_cuda() {
    $venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'
}

install_grail() {
    pip_install --no-deps --no-build-isolation --editable .
}

import_packages() {
    DS_ACCELERATOR=$(torch_device) OMP_NUM_THREADS=1 $venv/bin/python - <<'PYTHON'
import importlib, importlib.metadata as metadata, platform
modules = """torch torchrec fbgemm_gpu deepspeed ray webdataset wandb tensordict torchmetrics numpy scipy polars
pyarrow.parquet tyro rich matplotlib faiss fsspec safetensors yaml jaxtyping psutil pytest beartype
transformers launch trainer sharding models rl data_streams cluster"""
for module in modules.split():
    print("importing", module, flush=True)
    importlib.import_module(module)
installed = {package.name.lower().replace("_", "-"): package.version for package in metadata.distributions()}
fbgemm = next(name for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if name in installed)
shown = ["torch", "torchrec", fbgemm, "deepspeed", "ray"]
print(f"Python {platform.python_version()},", ", ".join(f"{name} {installed[name]}" for name in shown))
PYTHON
}

torch_device() {
    $venv/bin/python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")'
}

# --- tools of the steps -----------------------------------------------------------------------------------------------

pin() {
    sed -n "s/^$1==//p" requirements.txt
}

pip_install() {
    # Holds also where pip builds a package from source in an environment of its own (deepspeed is one).
    grep '^setuptools==' requirements.txt >$venv/build-constraints.txt
    PIP_CONSTRAINT=$venv/build-constraints.txt PIP_BUILD_CONSTRAINT=$venv/build-constraints.txt \
        $venv/bin/python -m pip install --no-input --disable-pip-version-check --progress-bar off "$@"
}

need_disk_gib() {
    local free_gib
    free_gib=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1048576))
    if [ "$free_gib" -lt "$1" ]; then
        echo "No space left on device: $1 GiB are required here and $free_gib GiB are free"
        return 1
    fi
}

run_step() {
    local name=$1 start=$SECONDS status=0
    shift
    step=$((step + 1))
    printf '  [%d/%d] %-32s' "$step" "$num_steps" "$name"
    # A step runs in a shell of its own with -e, which `if` or `||` around it would switch off.
    set +e
    (set -e; "$@") >"$log.step" 2>&1
    status=$?
    set -e
    cat "$log.step" >>"$log"
    if [ $status -ne 0 ]; then
        printf 'failed after %d s\n' $((SECONDS - start))
        { grep -vE 'already satisfied|^WARNING: Location' "$log.step" || true; } | tail -n 12 | sed 's/^/    | /' >&2
        fail "set-up failed at step $step of $num_steps: $name." "$(remedy "$log.step")"
    fi
    rm -f "$log.step"
    printf '%4d s\n' $((SECONDS - start))
}

remedy() {
    if grep -qiE 'no space left|disk quota' "$1"; then
        echo "The disk is full: free 5 GiB in this folder (10 GiB with a CUDA torch), then run make setup again."
    elif grep -qiE 'connection|timed out|name resolution|max retries|sslerror|certificate' "$1"; then
        echo "No package index could be reached: check the network, the proxy and \`$venv/bin/pip config list\`," \
            "then run make setup again; what was installed so far is kept."
    elif grep -qiE 'no matching distribution|could not find a version' "$1"; then
        echo "pip found no such version for $(uname -sm) and Python $python_version. Check that its index can be reached" \
            "and has it (\`$venv/bin/pip config list\`), or try PYTHON=python3.11; then run make setup again."
    elif grep -qiE 'ensurepip|no module named (venv|pip)' "$1"; then
        echo "Python $python_version lacks venv or pip: install them (Debian: apt install python${python_version%.*}-venv)."
    elif grep -qiE 'gcc|g\+\+|clang|Python\.h|failed building wheel|failed to build' "$1"; then
        echo "A package had to be compiled and could not be: install a C++ compiler and the Python headers" \
            "(Debian: apt install build-essential python${python_version%.*}-dev), then run make setup again."
    elif grep -qE 'GRAIL_FBGEMM|Could not load this library.*fbgemm' "$1"; then
        echo "Leave GRAIL_FBGEMM unset, or set it to the build that loads with this torch: cpu, or cuda, which needs" \
            "an NVIDIA driver on this machine."
    else
        echo "The lines above say why; the whole log is $log. \`make clean setup\` starts from nothing."
    fi
}

fail() {
    printf '%s\n' "$1" "What to do: $2" >&2
    exit 1
}

main
