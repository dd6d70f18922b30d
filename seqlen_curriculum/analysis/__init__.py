"""What a finished or running run shows, read from its log: needs neither torch nor DeepSpeed."""
