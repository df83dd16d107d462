#include "run.h"

#include <algorithm>
#include <atomic>

#include "isa.h"
#include "pool.h"

namespace gradstep::cpu {
namespace {

std::atomic<bool> flush{true};

// Elements of a chunk: a multiple of the tile, large enough that taking a chunk costs nothing beside running it.
constexpr std::int64_t kChunk = 16 * kTile;

// Under this many elements the work stays on the caller's thread: waking another costs more than it saves.
constexpr std::int64_t kAlone = 2 * kChunk;

// Elements [begin, end) of one sweep.
struct Piece {
  const Sweep* sweep;
  std::int64_t begin, end;
};

// A chunk is a run of pieces: part of a large sweep, or several small ones.
struct Chunks {
  const Kernels& kernels;
  bool flush_denormals;
  std::vector<Piece> pieces;
  std::vector<std::size_t> starts;  // of each chunk in `pieces`, and one past the last

  void run(std::size_t chunk) const {
    const FloatEnvironment environment(flush_denormals);
    for (std::size_t i = starts[chunk]; i < starts[chunk + 1]; ++i) {
      const Piece& piece = pieces[i];
      kernels.of(piece.sweep->compute).sweep(*piece.sweep, piece.begin, piece.end);
    }
  }
};

void cut(const std::vector<Sweep>& sweeps, Chunks& chunks) {
  chunks.pieces.reserve(sweeps.size());
  std::int64_t filled = kChunk;
  for (const Sweep& sweep : sweeps) {
    for (std::int64_t begin = 0; begin < sweep.size; begin += kChunk) {
      const std::int64_t end = std::min(begin + kChunk, sweep.size);
      if (filled + (end - begin) > kChunk) {
        chunks.starts.push_back(chunks.pieces.size());
        filled = 0;
      }
      filled += end - begin;
      chunks.pieces.push_back({&sweep, begin, end});
    }
  }
  chunks.starts.push_back(chunks.pieces.size());
}

}  // namespace

bool flush_denormals() { return flush.load(std::memory_order_relaxed); }

void set_flush_denormals(bool on) { flush.store(on, std::memory_order_relaxed); }

void run(const std::vector<Sweep>& sweeps) {
  std::int64_t total = 0;
  for (const Sweep& sweep : sweeps) total += sweep.size;

  if (total <= kAlone || num_threads() == 1) {
    const FloatEnvironment environment(flush_denormals());
    for (const Sweep& sweep : sweeps) kernels().of(sweep.compute).sweep(sweep, 0, sweep.size);
    return;
  }
  Chunks chunks{kernels(), flush_denormals(), {}, {}};
  cut(sweeps, chunks);
  parallel_for(
      static_cast<std::int64_t>(chunks.starts.size()) - 1,
      [](void* context, std::int64_t i) { static_cast<const Chunks*>(context)->run(static_cast<std::size_t>(i)); }, &chunks);
}

}  // namespace gradstep::cpu
