// The few functions of one element that rules share. All are exact in IEEE arithmetic, so they give the same bits everywhere.
#pragma once

#include <cmath>

#include "portable.h"

namespace gradstep {

GRADSTEP_HD float square_root(float x) { return sqrtf(x); }
GRADSTEP_HD double square_root(double x) { return sqrt(x); }

// The larger of two numbers; NaN if either is NaN.
template <class T>
GRADSTEP_HD T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}

// 1, -1 or +0; NaN of NaN.
template <class T>
GRADSTEP_HD T sign(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : x + T(0);
}

}  // namespace gradstep
