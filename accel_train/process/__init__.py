"""This process: signals, launcher, console, time and memory."""
