#include "run.h"

#include <algorithm>
#include <atomic>

#include "isa.h"
#include "pool.h"

namespace gradstep::cpu {
namespace {

std::atomic<bool> flush{true};

// Elements of a chunk: large enough that taking one costs nothing beside running it. Where there is much to do, chunks are
// longer: the longer a thread walks straight on through memory, the better the processor keeps up.
constexpr std::int64_t kChunk = kSumBlock, kLongChunk = 16 * kChunk, kChunks = 256;

// The length of a chunk depends on the amount of work alone, so that the cuts are the same for any number of threads.
std::int64_t chunk_length(std::int64_t total) { return std::clamp(total / kChunks / kChunk * kChunk, kChunk, kLongChunk); }

// Under this many elements the work stays on the caller's thread: waking another costs more than it saves.
constexpr std::int64_t kAlone = 2 * kChunk;

// Bytes from which on the operands of a step no longer fit the caches of one core.
constexpr std::int64_t kLarge = std::int64_t{8} << 20;

// Elements [begin, end) of one sweep.
struct Piece {
  const Work* work;
  std::int64_t begin, end;
};

// A chunk is a run of pieces: part of a large sweep, or several small ones.
struct Chunks {
  const Kernels& kernels;
  bool flush_denormals, prefetch;
  std::vector<Piece> pieces;
  std::vector<std::size_t> starts;  // of each chunk in `pieces`, and one past the last

  void run(std::size_t chunk) const {
    const FloatEnvironment environment(flush_denormals);
    for (std::size_t i = starts[chunk]; i < starts[chunk + 1]; ++i) {
      const auto& [work, begin, end] = pieces[i];
      kernels.of(work->sweep->compute).sweep(*work, begin, end, prefetch);
    }
  }
};

void cut(const std::vector<Work>& works, std::int64_t length, Chunks& chunks) {
  chunks.pieces.reserve(works.size());
  std::int64_t filled = length;
  for (const Work& work : works) {
    // Blocks of sums stay whole.
    const std::int64_t block = work.sweep->block(), piece = std::max(length / block, std::int64_t{1}) * block;
    for (std::int64_t begin = 0; begin < work.sweep->size; begin += piece) {
      const std::int64_t end = std::min(begin + piece, work.sweep->size);
      if (filled + (end - begin) > length) {
        chunks.starts.push_back(chunks.pieces.size());
        filled = 0;
      }
      filled += end - begin;
      chunks.pieces.push_back({&work, begin, end});
    }
  }
  chunks.starts.push_back(chunks.pieces.size());
}

}  // namespace

bool flush_denormals() { return flush.load(std::memory_order_relaxed); }

void set_flush_denormals(bool on) { flush.store(on, std::memory_order_relaxed); }

void run(const std::vector<Work>& works, bool keeps_denormals) {
  const bool flushes = flush_denormals() && !keeps_denormals;
  std::int64_t total = 0, bytes = 0;
  for (const Work& work : works) {
    total += work.sweep->size;
    bytes += work.sweep->bytes();
  }
  const bool prefetch = bytes > kLarge;

  if (total <= kAlone || num_threads() == 1) {
    const FloatEnvironment environment(flushes);
    for (const Work& work : works) kernels().of(work.sweep->compute).sweep(work, 0, work.sweep->size, prefetch);
    return;
  }
  Chunks chunks{kernels(), flushes, prefetch, {}, {}};
  cut(works, chunk_length(total), chunks);
  parallel_for(
      static_cast<std::int64_t>(chunks.starts.size()) - 1,
      [](void* context, std::int64_t i) { static_cast<const Chunks*>(context)->run(static_cast<std::size_t>(i)); }, &chunks);
}

std::vector<Sums> run_and_sum(std::vector<Work>& works, std::vector<Sums>& blocks) {
  std::size_t n_blocks = 0;
  for (const Work& work : works) n_blocks += static_cast<std::size_t>(work.sweep->n_blocks());
  blocks.assign(n_blocks, {});
  Sums* next = blocks.data();
  for (Work& work : works) {
    work.sums = next;
    next += work.sweep->n_blocks();
  }
  run(works);
  std::vector<Sums> sums(works.size());
  for (std::size_t w = 0; w < works.size(); ++w) sums[w] = sum_blocks(works[w].sums, works[w].sweep->n_blocks());
  return sums;
}

}  // namespace gradstep::cpu
