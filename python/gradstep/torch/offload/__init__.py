"""Optimizers whose states are in host memory, of parameters on a device: see docs/offload.md.

A step goes over the parameters in chunks. At the same time one chunk's gradients come down into pinned memory, the processor sweeps
over the chunk before, and the parameters of the one before that go up. What the device does stands behind `Transfers`.
"""

from gradstep.torch.offload.optimizer import Offloaded, offload
from gradstep.torch.offload.step import BrokenStepError
from gradstep.torch.offload.sums import look
from gradstep.torch.offload.transfers import CudaTransfers, HostTransfers, Transfers, make_transfers

__all__ = ["BrokenStepError", "CudaTransfers", "HostTransfers", "Offloaded", "Transfers", "look", "make_transfers", "offload"]
