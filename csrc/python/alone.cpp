#include "alone.h"

#include <deque>
#include <string>
#include <vector>

#include "../core/pipeline.h"
#include "../cpu/run.h"
#include "entry.h"
#include "gil.h"
#include "overlap.h"

namespace gradstep::python {
namespace py = pybind11;
namespace {

// Arrays on their way into a sweep, checked as they are added.
class Batch {
 public:
  explicit Batch(const char* function) : function_(function) {}

  // Adds operands of one shape, the first of which is called `name`; `names`, if any, are those of all.
  void add(const std::vector<PyObject*>& objects, const Roles& roles, const std::string& name,
           const std::vector<std::string>& names = {}) {
    names_.push_back(name);
    std::vector<View> views(objects.size());
    std::size_t at = 0;
    try {
      for (; at < objects.size(); ++at) {
        holds_.object(objects[at]);
        read_host(objects[at], views[at], holds_, function_);
      }
      entries_.emplace_back().update(views.data(), roles, objects.data());
    } catch (Problem& problem) {
      refuse(names.empty() ? name : names[at], problem);
    } catch (OperandProblem& problem) {
      if (names.empty()) refuse(name, problem.problem);
      std::string& text = problem.problem.text;
      if (const std::size_t at = text.find("its parameter"); at != std::string::npos) text.replace(at, 13, names[0]);
      refuse(names[static_cast<std::size_t>(problem.operand)], problem.problem);
    }
    for (std::size_t k = 0; k < objects.size(); ++k) {
      if (roles.is_output(static_cast<int>(k)) && is_tensor(objects[k])) changed_.append(py::handle(objects[k]));
    }
  }

  // Refuses operands of the one entry whose memory lies within each other's bounds.
  void check_apart(const std::vector<std::string>& names) const {
    const Entry& entry = entries_.front();
    for (int k = 2; k < entry.roles().n_operands(); ++k) {
      const Entry::Span one = entry.span(0), other = entry.span(k);
      if (one.begin < other.end && other.begin < one.end) {
        refuse(names[static_cast<std::size_t>(k)], {PyExc_ValueError, "shares memory with " + names[0]});
      }
    }
  }

  // Runs a pipeline over all of them. Returns the sums, if there are to be any.
  Sums run(const Pipeline& pipeline, double factor, bool sums, bool keeps_denormals = false) {
    std::vector<Work> works;
    for (const Entry& entry : entries_) {
      works.push_back({&entry.sweep(), &pipeline, {}, nullptr});
      works.back().factors.gradient = factor;
    }
    check_overlap();
    std::vector<Sums> blocks, found;
    without_gil([&] {
      if (sums) found = cpu::run_and_sum(works, blocks);
      else cpu::run(works, keeps_denormals);
    });
    if (changed_.size() > 0) bump_versions(changed_);
    Sums total;
    for (const Sums& of_one : found) total.add(of_one);
    return total;
  }

 private:
  [[noreturn]] void refuse(const std::string& name, const Problem& problem) const {
    py::set_error(problem.type, (std::string(function_) + ": " + name + " " + problem.text).c_str());
    throw py::error_already_set();
  }

  // Refuses arrays that are written and share memory.
  void check_overlap() const {
    std::vector<const Entry*> entries;
    for (const Entry& entry : entries_) entries.push_back(&entry);
    const Outputs::Clash clash = Outputs().assign(entries);
    if (clash.found)
      refuse(names_[static_cast<std::size_t>(clash.second.entry)],
             {PyExc_ValueError, "shares memory with " + names_[static_cast<std::size_t>(clash.first.entry)]});
  }

  const char* function_;
  std::vector<std::string> names_;
  Holds holds_;
  std::deque<Entry> entries_;
  py::list changed_;
};

// `loads`, `stores`: operands, a bit each.
Pipeline pipeline_of(const Operation& operation, std::uint32_t loads, std::uint32_t stores) {
  Pipeline pipeline;
  pipeline.operations[0] = operation;
  new (pipeline.constants[0]) double(0);  // for those that have any
  pipeline.passes[0] = {0, 1, loads, stores};
  pipeline.size = pipeline.n_passes = 1;
  return pipeline;
}

}  // namespace

void touch(const py::list& outputs, const py::list& inputs) {
  const auto n = static_cast<int>(outputs.size()) + 1;
  if (outputs.empty() || n > 2 + kMaxStates || inputs.size() != 1) {
    throw py::value_error("touch: takes up to 5 outputs and 1 input");
  }
  std::vector<PyObject*> objects{outputs[0].ptr(), inputs[0].ptr()};
  for (int k = 2; k < n; ++k) objects.push_back(outputs[static_cast<std::size_t>(k - 1)].ptr());
  Roles roles;
  roles.n_states = n - 2;
  Batch batch("touch");
  batch.add(objects, roles, "an array");
  const std::uint32_t all = (1u << n) - 1;
  batch.run(pipeline_of({Loop::kTouch, static_cast<std::uint8_t>(n - 2)}, all, all & ~2u), 1, false);
}

double sum_of_squares(const py::list& arrays, const char* function, const char* name) {
  Batch batch(function);
  Roles roles;
  roles.reads_only = true;
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    PyObject* array = arrays[i].ptr();
    batch.add({array, array}, roles, std::string(name) + "[" + std::to_string(i) + "]");
  }
  return batch.run(pipeline_of({Loop::kSumParam}, 1, 0), 1, true).at[kParamSquares];
}

void scale(const py::list& arrays, double factor, const char* function, const char* name) {
  Batch batch(function);
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    PyObject* array = arrays[i].ptr();
    batch.add({array, array}, {}, std::string(name) + "[" + std::to_string(i) + "]");
  }
  batch.run(pipeline_of({Loop::kScale}, 1, 1), factor, false);
}

void swap(const py::list& ones, const py::list& others, const char* function) {
  Batch batch(function);
  Roles roles;
  roles.n_states = 1;
  for (std::size_t i = 0; i < ones.size(); ++i) {
    PyObject* one = ones[i].ptr();
    batch.add({one, one, others[i].ptr()}, roles, "array " + std::to_string(i));
  }
  batch.run(pipeline_of({Loop::kSwap}, 5, 5), 1, false);
}

void convert(const py::tuple& target, const py::tuple& source, bool is_unsigned, const char* function) {
  // The one that is no codes takes the part of the parameter, the other that of a state.
  const bool from_codes = source.size() == 2;
  const py::tuple &param = from_codes ? target : source, &state = from_codes ? source : target;
  Roles roles;
  roles.n_states = 1;
  roles.unsigned_states = is_unsigned;
  roles.compressed = state.size() == 2;
  (from_codes ? roles.reads_states : roles.reads_param) = true;
  std::vector<PyObject*> objects{param[0].ptr(), param[0].ptr(), state[0].ptr()};
  const char* name = from_codes ? "target" : "source";
  std::vector<std::string> names{name, name, from_codes ? "codes" : "target"};
  if (state.size() == 2) {
    objects.push_back(state[1].ptr());
    names.emplace_back("scale");
  }
  Batch batch(function);
  batch.add(objects, roles, name, names);
  batch.check_apart(names);
  if (from_codes) batch.run(pipeline_of({Loop::kCopyFrom}, 4, 1), 1, false, true);
  else batch.run(pipeline_of({Loop::kCopyTo}, 1, 4), 1, false, true);
}

}  // namespace gradstep::python
