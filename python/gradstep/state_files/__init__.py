"""States in memory-mapped files, the option `state_dir` of all optimizers. What lies there, and promises: docs/checkpoints.md."""

from gradstep.state_files.holder import HoldsStateFiles

__all__ = ["HoldsStateFiles"]
