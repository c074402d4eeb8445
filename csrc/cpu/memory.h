// Memory helpers: per-thread workspace, huge pages, read bandwidth.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aqlm::cpu {

// Hands out 64-byte aligned pieces of one buffer that the calling thread keeps between calls
// (fresh pages would cost more than a whole matrix product). Reserve once, then take.
class Workspace {
 public:
  static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  explicit Workspace(int64_t bytes);

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += padded(count * int64_t(sizeof(T)));
    return piece;
  }

 private:
  std::byte* next_;
};

// Asks for huge pages on the whole pages inside [ptr, ptr + nbytes); false if the system refuses
// or has none. Pages that are in memory already are collapsed where the kernel can.
bool advise_huge_pages(void* ptr, int64_t nbytes);

// Seconds of one streaming read by num_threads threads.
double measure_read_bandwidth(const void* ptr, int64_t nbytes, int num_threads);

}  // namespace aqlm::cpu
