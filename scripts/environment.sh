# Sourced by the other scripts, from the repository root: the virtual environment and DeepSpeed's settings.
export PATH="$PWD/.venv/bin:$PATH"
read -r prefix accelerators < <(python -c 'import sys, torch; print(sys.prefix, torch.accelerator.device_count() if torch.accelerator.is_available() else 0)')
# DeepSpeed compiles small C++ parts at first use. Each virtual environment keeps its own, because they fit one version of torch.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$prefix/torch_extensions}"
bash scripts/stale_locks.sh "$TORCH_EXTENSIONS_DIR" || exit 1
if [ "$accelerators" = 0 ]; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    command -v c++ >/dev/null || echo "warning: no C++ compiler; DeepSpeed needs one on a CPU (Debian: apt-get install g++)" >&2
fi
