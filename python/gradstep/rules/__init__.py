"""The optimizers: for each rule its settings, its function and its class for NumPy loops."""

from gradstep.rules.adagrad import Adagrad, adagrad_
from gradstep.rules.adam import Adam, AdamW, adam_, adamw_
from gradstep.rules.lion import Lion, lion_
from gradstep.rules.rmsprop import RMSprop, rmsprop_
from gradstep.rules.sgd import SGD, sgd_

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Lion", "RMSprop", "adagrad_", "adam_", "adamw_", "lion_", "rmsprop_", "sgd_"]
