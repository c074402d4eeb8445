#include "memory.h"

#include <chrono>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace aqlm::cpu {
namespace {

constexpr int64_t kHugePage = 2 << 20;

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Buffer() { std::free(data); }
};

// Sum of 64-bit words with enough independent chains to be bound by memory, not by adds.
uint64_t sum_words(const uint64_t* words, int64_t count) {
  constexpr int64_t kChains = 32, kAhead = 1024;  // prefetch 8 KB ahead, as the kernels do
  uint64_t sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    for (int64_t c = 0; c < kChains; c += 8) __builtin_prefetch(words + i + kAhead + c);
    for (int64_t c = 0; c < kChains; ++c) sums[c] += words[i + c];
  }
  for (; i < count; ++i) sums[0] += words[i];
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

Workspace::Workspace(int64_t bytes) {
  thread_local Buffer buffer;
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.data = nullptr;
    buffer.bytes = 0;
    const int64_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    buffer.data = std::aligned_alloc(size_t(kHugePage), size_t(rounded));
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = rounded;
    advise_huge_pages(buffer.data, rounded);
  }
  next_ = static_cast<std::byte*>(buffer.data);
}

bool advise_huge_pages(void* ptr, int64_t nbytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(ptr) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(ptr) + uintptr_t(nbytes)) / page * page;
  if (end <= begin) return false;
  if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) != 0) return false;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1; refusal leaves the advice standing
  madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
  return true;
#else
  (void)ptr;
  (void)nbytes;
  return false;
#endif
}

double measure_read_bandwidth(const void* ptr, int64_t nbytes, int num_threads) {
  const auto* words = static_cast<const uint64_t*>(ptr);
  const int64_t count = nbytes / 8;
  uint64_t total = 0;
  const auto start = std::chrono::steady_clock::now();
  if (num_threads == 1) {
    total = sum_words(words, count);
  } else {
#pragma omp parallel for num_threads(num_threads) schedule(static) reduction(+ : total)
    for (int part = 0; part < num_threads; ++part) {
      const int64_t begin = count * part / num_threads, end = count * (part + 1) / num_threads;
      total += sum_words(words + begin, end - begin);
    }
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  // The sum must be needed, or the compiler drops the reads.
  asm volatile("" : : "r"(total));
  return seconds.count();
}

}  // namespace aqlm::cpu
