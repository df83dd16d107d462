// Instruction sets: which are built in, which this processor has, which one is used.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "kernels.h"

namespace gradstep::cpu {

// The instruction sets that this processor can run, widest last.
std::vector<std::string> isas();

std::string_view isa();

// Uses the instruction set of that name from the next sweep on. False if there is none of that name here.
bool set_isa(std::string_view name);

// The loops of the instruction set in use.
const Kernels& kernels();

}  // namespace gradstep::cpu
