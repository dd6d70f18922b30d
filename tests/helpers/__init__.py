"""Helpers of several test modules: capabilities of the machine, launchers, shared launches, runs and small models."""
