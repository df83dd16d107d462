// What the programs of the GPU's engine are given: plain data in the device's memory. docs/architecture.md has the picture.
#pragma once

#include "../core/engine.h"

namespace gradstep::cuda {

// One tensor. Pointers in `sweep` lead to device memory.
struct Item {
  Sweep sweep;
  std::byte* long_rows;      // room for a copy of the parameter, where a row is longer than a tile
  std::uint32_t first_block, first_group;  // of its sums
};

// What differs from step to step, as far as the host knows it.
struct Now {
  Moment moment;
  double norm;
  DeviceNumbers numbers;
  DeviceNumber lr;
  std::int32_t settings;  // index
  bool may_be_first;      // its rule has a `First`
};

// A block of sums of one tensor, which one block of threads carries through the pipeline.
struct Chunk {
  std::uint32_t item, block;
};

struct Status {
  std::uint64_t nonfinite = Outcome::kNone;  // as in Outcome
  std::uint64_t result = Outcome::kNone;     // the same, with what GradScaler found
  double clip_factor = 1;
};

// Everything that a program may ask for. The same for all launches of a step, but for what is under "of the launch".
struct Args {
  const Item* items;
  const Now* now;
  const Settings* settings;
  const double* weights;      // of several gradients; null: one
  Pipeline* pipelines;        // one an item, as are the following
  Moment* moments;
  Factors* factors;
  Sums *came, *sums;
  double *norms, *terms;
  Seen* seen;
  Sums *blocks, *groups;
  Status* status;
  StepOptions options;        // `weights` is the host's
  DeviceNumber grad_scale, found_inf;
  std::uint32_t n_items;
  bool settled;               // there were norms, and `status` says what followed from them
  bool sums_all, counts;      // see Needs: sums of all gradients, with counts
  // of the launch
  const Chunk* chunks;
  std::uint32_t n_groups;
  Purpose purpose;
  bool begins;                // the first of the step
  bool only_if_skipped;
};

// Sums of a tensor are added in groups of blocks: see norms.h.
GRADSTEP_HD std::int64_t n_groups(const Sweep& sweep) { return (sweep.n_blocks() + kBlocksTogether - 1) / kBlocksTogether; }

// The threads that are to run a program, and how many blocks of them.
enum class Program : std::uint8_t {
  kPrepare,   // pipelines, one an item
  kGroups,    // sums of groups of blocks
  kSettle,    // what follows from the sums over gradients
  kFollow,    // what follows from those over updates
  kReport,    // what the host asks for
  kSums,      // squares of gradients that are contiguous
  kUpdate,    // a rule, straight to the parameter, where all operands are contiguous
  kTiles,     // any pipeline
};

// How the operands of a kUpdate are stored.
enum class Stored : std::uint8_t { kInPlace, kMixed };

struct Launch {
  Program program;
  std::uint32_t tasks;       // blocks of threads where a program takes a chunk, threads where it takes an item
  Format compute = Format::kFloat32;
  int rule = 0;
  Stored stored = Stored::kInPlace;
  std::uint32_t shared = 0;  // bytes of memory that the threads of a block share
};

// Threads of a block.
inline constexpr std::uint32_t kThreads = 256, kSettleThreads = 1024;

constexpr bool takes_chunks(Program program) { return program >= Program::kSums; }

// The layout of shared memory of kTiles: `Room`, then what rows need, then tiles of `kTile` elements.
struct Room {
  Sums sums;
  double leaves[kMaxRows];
};

struct Rows {
  RowValues values[kMaxRows];
  RowSums sums[kMaxRows];
};

// Operands, then scratch, update and rest.
GRADSTEP_HD int n_slots(const Sweep& sweep) { return sweep.n_operands + 3; }
GRADSTEP_HD std::uint32_t shared_bytes(int slots, std::uint32_t element, bool by_row) {
  return static_cast<std::uint32_t>(sizeof(Room) + (by_row ? sizeof(Rows) : 0)) +
         static_cast<std::uint32_t>(slots) * static_cast<std::uint32_t>(kTile) * element;
}

}  // namespace gradstep::cuda
