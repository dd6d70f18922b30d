"""Read, compare and plot the logs of finished and running runs. Needs neither torch nor DeepSpeed."""
