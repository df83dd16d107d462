// Sweeps over arrays alone, without a rule.
#pragma once

#include <pybind11/pybind11.h>

namespace gradstep::python {

// Reads `outputs` (up to five arrays) and `inputs` (one), and writes back to the outputs what was there: a rule's access to
// memory without its math. For benchmarks.
void touch(const pybind11::list& outputs, const pybind11::list& inputs);

// The sum of the squares of all elements of the arrays, each along its tree. `function` and `name` are for messages.
double sum_of_squares(const pybind11::list& arrays, const char* function, const char* name);

// Multiplies the arrays by a number, in place.
void scale(const pybind11::list& arrays, double factor, const char* function, const char* name);

// Exchanges the elements of two lists of arrays, in place.
void swap(const pybind11::list& ones, const pybind11::list& others, const char* function);

// Copies one array into another of the same shape. Either is a tuple of one array, or of codes and their scales; not both of
// codes.
void convert(const pybind11::tuple& target, const pybind11::tuple& source, bool is_unsigned, const char* function);

}  // namespace gradstep::python
