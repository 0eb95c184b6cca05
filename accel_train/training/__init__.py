"""The loop: Trainer, its state, checkpoints, agreement between ranks, callbacks, hooks."""
