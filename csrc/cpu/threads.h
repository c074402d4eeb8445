// Sharing rows out over OpenMP threads; one thread never enters OpenMP.
#pragma once

#include <omp.h>

#include <cstdint>

namespace aqlm::cpu {

// body(thread, threads) on each of num_threads threads; body must not throw.
template <class Body>
void on_threads(int num_threads, const Body& body) {
  if (num_threads <= 1) {
    body(0, 1);
    return;
  }
#pragma omp parallel num_threads(num_threads)
  body(omp_get_thread_num(), omp_get_num_threads());
}

// Waits for the other threads of on_threads.
inline void thread_barrier(int threads) {
  if (threads <= 1) return;
#pragma omp barrier
}

// body(begin, end) over [0, rows) in contiguous shares, cut at multiples of `grain`.
template <class Body>
void parallel_rows(int64_t rows, int64_t grain, int num_threads, const Body& body) {
  const int64_t pieces = (rows + grain - 1) / grain;
  on_threads(int64_t(num_threads) < pieces ? num_threads : int(pieces),
             [&](int thread, int threads) {
               const int64_t begin = pieces * thread / threads * grain;
               const int64_t end = pieces * (thread + 1) / threads * grain;
               if (begin < rows) body(begin, end < rows ? end : rows);
             });
}

}  // namespace aqlm::cpu
