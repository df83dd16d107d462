// The list of all rules. Everything else (kernels, Python's handles, tests) is made from it.
#pragma once

#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/lamb.h"
#include "rules/lion.h"
#include "rules/novograd.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

namespace gradstep {

using Rules = List<Sgd, SgdMomentum<false>, SgdMomentum<true>, Adam<false>, Adam<true>, Lion, Adagrad, Rmsprop<false, false>,
                   Rmsprop<true, false>, Rmsprop<false, true>, Rmsprop<true, true>, Lamb, Novograd>;

}  // namespace gradstep
