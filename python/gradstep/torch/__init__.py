"""Drop-in replacements of the classes of `torch.optim`: same names, arguments, states and errors; one sweep over memory a step.

>>> import torch, gradstep.torch
>>> w = torch.nn.Parameter(torch.ones(3))
>>> opt = gradstep.torch.AdamW([w], lr=0.1)
>>> w.sum().backward()
>>> opt.step()
>>> w.data
tensor([0.8990, 0.8990, 0.8990])
"""

from gradstep.torch.norms import clip_grad_norm_
from gradstep.torch.offload import offload
from gradstep.torch.optimizers import LAMB, LARS, SGD, Adagrad, Adam, AdamW, Lion, NovoGrad, RMSprop
from gradstep.torch.threads import share_torch_threads

__all__ = ["LAMB", "LARS", "SGD", "Adagrad", "Adam", "AdamW", "Lion", "NovoGrad", "RMSprop", "clip_grad_norm_", "offload"]

share_torch_threads()
