#include "step.h"

#include "../common/check.h"
#include "dispatch.h"
#include "memory.h"
#include "threads.h"

namespace aqlm::cpu {
namespace {

constexpr int64_t kAlone = 1 << 16;  // numbers that one thread reads in about 10 us

int threads_for(int64_t numbers, int num_threads) {
  AQLM_CHECK(num_threads >= 1, "num_threads=", num_threads, " is not positive");
  return numbers > kAlone ? num_threads : 1;
}

const std::byte* at(const void* base, int64_t elements, Dtype dtype) {
  return static_cast<const std::byte*>(base) + elements * dtype_size(dtype);
}

std::byte* at(void* base, int64_t elements, Dtype dtype) {
  return static_cast<std::byte*>(base) + elements * dtype_size(dtype);
}

}  // namespace

void add_norm(const AddNorm& call) {
  const StepKernels& step = kernels().step;
  const Dtype dtype = call.dtype;
  const bool adds = call.delta.data != nullptr;
  const int threads = threads_for(call.M * call.N, call.num_threads);
  parallel_rows(call.M, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const void* delta = adds ? at(call.delta.data, m * call.delta.stride, dtype) : nullptr;
      void* total = adds ? at(call.total, m * call.N, dtype) : nullptr;
      step.norm({at(call.x.data, m * call.x.stride, dtype), delta, call.weight, call.eps, total,
                 at(call.y, m * call.N, dtype), dtype, call.N});
    }
  });
}

void swiglu(const Swiglu& call) {
  const StepKernels& step = kernels().step;
  const Dtype dtype = call.dtype;
  const int threads = threads_for(call.M * call.N, call.num_threads);
  parallel_rows(call.M, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      step.swiglu(at(call.gate.data, m * call.gate.stride, dtype),
                  at(call.up.data, m * call.up.stride, dtype), dtype, call.N,
                  at(call.y, m * call.N, dtype));
    }
  });
}

void argmax(const Rows& scores, Dtype dtype, int64_t M, int64_t N, int64_t* best) {
  AQLM_CHECK(N >= 1, "N=", N, ": no row of scores has a largest");
  for (int64_t m = 0; m < M; ++m) {
    best[m] = kernels().step.argmax(at(scores.data, m * scores.stride, dtype), dtype, N);
  }
}

void rope_attention(const RopeAttention& call) {
  const int64_t heads = call.heads / call.kv_heads, D = call.head_dim, seen = call.filled + 1;
  AQLM_CHECK(call.filled >= 0 && seen <= call.length, "position ", call.filled,
             " is outside a cache of ", call.length);
  for (int64_t b = 0; b < call.batch; ++b) {
    AQLM_CHECK(call.ids[b] >= 0 && call.ids[b] < call.length, "rotary position ", call.ids[b],
               " is outside the ", call.length, " of the cache");
  }
  const StepKernels& step = kernels().step;
  const Dtype dtype = call.dtype;
  const int64_t items = call.batch * call.kv_heads;
  const int threads = threads_for(items * seen * D, call.num_threads);
  const int64_t floats = Workspace::padded(heads * (2 * D + seen) * 4) / 4;
  Workspace workspace(threads * floats * 4);
  float* scratch = workspace.take<float>(threads * floats);
  on_threads(threads, [&](int thread, int count) {
    for (int64_t i = items * thread / count; i < items * (thread + 1) / count; ++i) {
      const int64_t b = i / call.kv_heads, h = i % call.kv_heads;
      const auto of = [&](auto* base, const int64_t* stride) {
        return at(base, b * stride[0] + h * stride[1], dtype);
      };
      const int64_t position = call.ids[b] * D;
      step.attend({at(call.q, b * call.q_stride[0] + h * heads * call.q_stride[1], dtype),
                   call.q_stride[1], heads, D, of(call.key, call.key_stride),
                   of(call.value, call.value_stride), at(call.cos, position, dtype),
                   at(call.sin, position, dtype), of(call.keys, call.keys_stride),
                   of(call.values, call.values_stride), call.keys_stride[2],
                   call.values_stride[2], call.filled, call.mask + b * call.mask_stride,
                   call.scale, at(call.y, (b * call.heads + h * heads) * D, dtype), dtype,
                   scratch + thread * floats});
    }
  });
}

}  // namespace aqlm::cpu
