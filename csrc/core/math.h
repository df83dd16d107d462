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
  const T larger = a > b ? a : b;
  return a != a ? a : larger;
}

GRADSTEP_HD float magnitude(float x) { return fabsf(x); }
GRADSTEP_HD double magnitude(double x) { return fabs(x); }

// x within [low, high]; NaN of NaN.
template <class T>
GRADSTEP_HD T clamp(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

// 1, -1 or +0; NaN of NaN.
template <class T>
GRADSTEP_HD T sign(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : x + T(0);
}

}  // namespace gradstep
