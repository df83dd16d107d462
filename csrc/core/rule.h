// What a rule is: the math of one element, as a plain struct of doubles.
//
//   struct Rule {
//     double lr, ...;                               // its settings, as Python gives them; lr comes first
//     static constexpr const char* name;            // under which the registry lists it
//     static constexpr std::array<Field, n> fields; // one a setting: its name and what it may be
//     static constexpr std::array<State, k> states; // their names, and which are never negative
//     template <class T> struct Update {            // the constants of one step, in the compute type
//       Update(const Rule&, double step);           // computed in double; step counts from 1
//       T operator()(T p, T g, T& state...) const;  // updates the states, returns what is to be subtracted from p
//     };
//     template <class T> struct First;              // optional: made from an Update, used instead of it at step 1
//   };
//
// A rule returns its update and leaves the subtraction to the engine, so that whatever happens between update and parameter
// (decoupled decay today; trust ratios, masks, statistics) is written once for all rules.
#pragma once

#include <array>
#include <cstddef>
#include <cstring>

#include "portable.h"

namespace gradstep {

inline constexpr int kMaxStates = 4;

// What a setting may be. Every setting is finite but a kNumber, which may be infinite.
enum class Range { kFinite, kNonNegative, kPositive, kBelowOne, kNumber };

struct Field {
  const char* name;
  Range range;
};

struct State {
  const char* name;
  bool is_unsigned = false;
};
inline constexpr bool kUnsigned = true;

template <class... Ts>
struct List {
  static constexpr int size = sizeof...(Ts);
};

// The rule whose settings stand at `values`, in the order of its fields.
template <class Rule>
GRADSTEP_HD Rule from_values(const double* values) {
  Rule rule;
  if constexpr (!Rule::fields.empty()) {
    static_assert(sizeof(Rule) == sizeof(double) * Rule::fields.size(), "a rule is a struct of doubles, one a field");
    std::memcpy(&rule, values, sizeof rule);
  }
  return rule;
}

template <class Rule>
concept HasFirst = requires { typename Rule::template First<float>; };

}  // namespace gradstep
