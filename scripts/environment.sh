# Set up the virtual environment and DeepSpeed's variables. Other scripts source this file from the repository root.
export PATH="$PWD/.venv/bin:$PATH"
accelerators=$(python -c 'import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)')
if [ "$accelerators" = 0 ]; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
