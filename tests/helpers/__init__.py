"""What several test modules use: the machine's capabilities, the real launcher, shared launches, runs and small models."""
