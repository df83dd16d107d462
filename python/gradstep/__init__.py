"""gradstep: optimizer steps in one sweep over memory.

Three faces, one engine: functions that update arrays in place (`adamw_`, ...), optimizers for NumPy loops (`AdamW`, ...), and in
`gradstep.torch` drop-in replacements of the classes of `torch.optim`.

>>> import gradstep, numpy as np
>>> w = np.ones(3, np.float32)
>>> opt = gradstep.AdamW(w, lr=0.1)
>>> opt.step(np.array([1, 0, -1], np.float32))
>>> w.round(3)
array([0.899, 0.999, 1.099], dtype=float32)
"""

from gradstep import config, cuda, schedules
from gradstep._core import __version__
from gradstep.norms import clip_grad_norm_, global_norm
from gradstep.rules import (
    LAMB,
    LARS,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Lion,
    NovoGrad,
    RMSprop,
    adagrad_,
    adam_,
    adamw_,
    lamb_,
    lars_,
    lion_,
    novograd_,
    rmsprop_,
    sgd_,
)

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "NovoGrad",
    "RMSprop",
    "__version__",
    "adagrad_",
    "adam_",
    "adamw_",
    "clip_grad_norm_",
    "config",
    "cuda",
    "global_norm",
    "lamb_",
    "lars_",
    "lion_",
    "novograd_",
    "rmsprop_",
    "schedules",
    "sgd_",
]
