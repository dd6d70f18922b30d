# Sourced by the other scripts, from the repository root: the virtual environment and DeepSpeed's settings.
PATH="$PWD/.venv/bin:$PATH"
# DeepSpeed compiles small C++ parts at first use; kept outside the repository and apart from other projects'.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/seqlen-curriculum/torch_extensions}"
export PATH
accelerators=$(python -c 'import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)')
if [ "$accelerators" = 0 ]; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    command -v c++ >/dev/null || echo "warning: no C++ compiler; DeepSpeed needs one on a CPU (Debian: apt-get install g++)" >&2
fi
