"""The optimizers: for each rule its settings, its function and its class for NumPy loops."""

from gradstep.rules.adagrad import Adagrad, adagrad_
from gradstep.rules.adam import Adam, AdamW, adam_, adamw_
from gradstep.rules.lamb import LAMB, lamb_
from gradstep.rules.lars import LARS, lars_
from gradstep.rules.lion import Lion, lion_
from gradstep.rules.novograd import NovoGrad, novograd_
from gradstep.rules.rmsprop import RMSprop, rmsprop_
from gradstep.rules.sgd import SGD, sgd_

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
    "adagrad_",
    "adam_",
    "adamw_",
    "lamb_",
    "lars_",
    "lion_",
    "novograd_",
    "rmsprop_",
    "sgd_",
]
