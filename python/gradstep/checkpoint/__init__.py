"""Checkpoints: ``opt.save(path)`` and ``Class.load(path, params)`` of all optimizers. Contents and promises: docs/checkpoints.md."""

from gradstep.checkpoint.holder import HoldsCheckpoints

__all__ = ["HoldsCheckpoints"]
