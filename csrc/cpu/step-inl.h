// cpu.step: the operators of step.h, a row or a head at a time.

namespace aqlm::cpu {
namespace {

// body(W, k) for vectors of W = kLanes numbers from 0 on, and for the rest one by one.
template <class Body>
AQLM_INLINE void each_vector(int64_t count, const Body& body) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) body(std::integral_constant<int, kLanes>(), k);
  for (int64_t k = whole; k < count; ++k) body(std::integral_constant<int, 1>(), k);
}

// The value that is left when T stores it.
template <int W, class T>
inline F<W> rounded(F<W> value) {
  T stored[W];
  store<W>(stored, value);
  return load<W>(stored);
}

template <class T>
void norm_of(const NormRow& row) {
  const T *x = static_cast<const T*>(row.x), *delta = static_cast<const T*>(row.delta);
  T* total = static_cast<T*>(row.total);
  F<kLanes> squares = {};
  float rest = 0;
  each_vector(row.count, [&](auto width, int64_t k) {
    constexpr int W = width;
    F<W> value = load<W>(x + k);
    if (delta != nullptr) {
      value = rounded<W, T>(value + load<W>(delta + k));
      store<W>(total + k, value);
    }
    if constexpr (W == 1) rest += value * value;
    else squares += value * value;
  });
  const float mean = (sum_lanes<kLanes>(squares) + rest) / float(row.count);
  const float inverse = 1.0f / __builtin_sqrtf(mean + row.eps);
  const T* source = delta != nullptr ? total : x;
  const T* weight = static_cast<const T*>(row.weight);
  T* y = static_cast<T*>(row.y);
  each_vector(row.count, [&](auto width, int64_t k) {
    constexpr int W = width;
    const F<W> normed = rounded<W, T>(load<W>(source + k) * inverse);
    store<W>(y + k, F<W>(load<W>(weight + k) * normed));
  });
}

// Within 2 units in the last place; below -87 zero, above 88 what 88 gives; NaN stays.
template <int W>
inline F<W> exponential(F<W> x) {
  typedef typename Vec<W>::U U;  // unsigned: NaN gives any number
  const F<W> zero = {}, least = zero - 87.0f, most = zero + 88.0f;
  const F<W> bound = x > most ? most : x < least ? least : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the float.
  const F<W> shifted = bound * 0x1.715476p0f + 0x1.8p23f, n = shifted - 0x1.8p23f;
  const F<W> r = (bound - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  F<W> y = r * 0x1.6c16c2p-10f + 0x1.111112p-7f;  // 1/720, 1/120, ...
  y = y * r + 0x1.555556p-5f;
  y = y * r + 0x1.555556p-3f;
  y = y * r + 0.5f;
  y = y * r * r + r + 1.0f;
  const U power = (bit_cast<U>(shifted) - (0x4b400000u - 127u)) << 23;
  y *= bit_cast<F<W>>(power);
  return x < least ? zero : y;
}

template <class T>
void swiglu_of(const T* gate, const T* up, int64_t count, T* y) {
  each_vector(count, [&](auto width, int64_t k) {
    constexpr int W = width;
    const F<W> x = load<W>(gate + k), zero = {}, least = zero - 88.0f;
    const F<W> silu = x / (exponential<W>(zero - x) + 1.0f);
    const F<W> gated = rounded<W, T>(x < least ? zero : silu);
    store<W>(y + k, F<W>(gated * load<W>(up + k)));
  });
}

// y = rotary embedding of x [D], every product and the sum rounded.
template <class T>
void rotary(const T* x, const T* cos, const T* sin, int64_t D, T* y) {
  const int64_t half = D / 2;
  each_vector(half, [&](auto width, int64_t k) {
    constexpr int W = width;
    const F<W> a = load<W>(x + k), b = load<W>(x + half + k);
    const auto product = [&](F<W> v, const T* table, int64_t at) {
      return rounded<W, T>(v * load<W>(table + at));
    };
    store<W>(y + k, F<W>(product(a, cos, k) - product(b, sin, k)));
    store<W>(y + half + k, F<W>(product(b, cos, half + k) + product(a, sin, half + k)));
  });
}

template <class T>
void attend_of(const AttentionHead& head) {
  const int64_t D = head.head_dim, heads = head.heads, seen = head.filled + 1;
  const T *q = static_cast<const T*>(head.q), *cos = static_cast<const T*>(head.cos);
  const T *value = static_cast<const T*>(head.value), *sin = static_cast<const T*>(head.sin);
  T *keys = static_cast<T*>(head.keys), *values = static_cast<T*>(head.values);
  T* y = static_cast<T*>(head.y);
  rotary(static_cast<const T*>(head.key), cos, sin, D, keys + head.filled * head.keys_stride);
  __builtin_memcpy(values + head.filled * head.values_stride, value, size_t(D) * sizeof(T));

  float *queries = head.scratch, *sums = queries + heads * D, *scores = sums + heads * D;
  for (int64_t h = 0; h < heads; ++h) {
    rotary(q + h * head.q_stride, cos, sin, D, y + h * D);  // y holds nothing else yet
    each_vector(D, [&](auto width, int64_t k) {
      constexpr int W = width;
      store<W>(queries + h * D + k, F<W>(load<W>(y + h * D + k) * head.scale));
      store<W>(sums + h * D + k, F<W>{});
    });
  }
  for (int64_t l = 0; l < seen; ++l) {
    for (int64_t h = 0; h < heads; ++h) {
      F<kLanes> dots = {};
      float rest = 0;
      if (head.mask[l]) {
        each_vector(D, [&](auto width, int64_t k) {
          constexpr int W = width;
          const F<W> product = load<W>(keys + l * head.keys_stride + k) *
                               load<W>(queries + h * D + k);
          if constexpr (W == 1) rest += product;
          else dots += product;
        });
      }
      scores[h * seen + l] = head.mask[l] ? sum_lanes<kLanes>(dots) + rest : -__builtin_inff();
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    float* score = scores + h * seen;
    float largest = -__builtin_inff();
    for (int64_t l = 0; l < seen; ++l) largest = score[l] > largest ? score[l] : largest;
    if (largest == -__builtin_inff()) largest = 0;  // nothing is seen: all weights are zero
    F<kLanes> totals = {};
    float rest = 0;
    each_vector(seen, [&](auto width, int64_t l) {
      constexpr int W = width;
      const F<W> weight = exponential<W>(load<W>(score + l) - largest);
      store<W>(score + l, weight);
      if constexpr (W == 1) rest += weight;
      else totals += weight;
    });
    const float total = sum_lanes<kLanes>(totals) + rest;
    const float inverse = total > 0 || total != total ? 1 / total : 0.0f;
    for (int64_t l = 0; l < seen; ++l) score[l] *= inverse;
  }
  for (int64_t l = 0; l < seen; ++l) {
    if (!head.mask[l]) continue;
    for (int64_t h = 0; h < heads; ++h) {
      const float weight = scores[h * seen + l];
      each_vector(D, [&](auto width, int64_t k) {
        constexpr int W = width;
        float* sum = sums + h * D + k;
        store<W>(sum, F<W>(load<W>(sum) + load<W>(values + l * head.values_stride + k) * weight));
      });
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    each_vector(D, [&](auto width, int64_t k) {
      constexpr int W = width;
      store<W>(y + h * D + k, load<W>(sums + h * D + k));
    });
  }
}

// Block by block: the largest of a block, and where it is only in the block that has the largest.
template <class T>
int64_t argmax_of(const T* scores, int64_t count) {
  constexpr int64_t kBlock = 1024;
  const auto score = [&](auto width, int64_t k) {
    constexpr int W = width;
    const F<W> value = load<W>(scores + k), zero = {};
    return F<W>(value != value ? zero + __builtin_inff() : value);
  };
  float largest = 0;
  int64_t first = -1;
  for (int64_t k0 = 0; k0 < count; k0 += kBlock) {
    const int64_t size = count - k0 < kBlock ? count - k0 : kBlock;
    F<kLanes> most = F<kLanes>{} - __builtin_inff();
    float best = -__builtin_inff();
    each_vector(size, [&](auto width, int64_t k) {
      constexpr int W = width;
      const F<W> value = score(width, k0 + k);
      if constexpr (W == 1) best = value > best ? value : best;
      else most = value > most ? value : most;
    });
    for (int i = 0; i < kLanes; ++i) best = most[i] > best ? most[i] : best;
    if (first < 0 || best > largest) {
      largest = best;
      first = k0;
    }
  }
  while (score(std::integral_constant<int, 1>(), first) != largest) ++first;
  return first;
}

void norm_row(const NormRow& row) {
  with_type(row.dtype, [&](auto* type) { norm_of<std::remove_pointer_t<decltype(type)>>(row); });
}

void swiglu_row(const void* gate, const void* up, Dtype dtype, int64_t count, void* y) {
  with_type(dtype, [&](auto* type) {
    typedef decltype(type) T;
    typedef const std::remove_pointer_t<T>* Source;
    swiglu_of(static_cast<Source>(gate), static_cast<Source>(up), count, static_cast<T>(y));
  });
}

void attend_head(const AttentionHead& head) {
  with_type(head.dtype,
            [&](auto* type) { attend_of<std::remove_pointer_t<decltype(type)>>(head); });
}

int64_t argmax_row(const void* scores, Dtype dtype, int64_t count) {
  int64_t found = 0;
  with_type(dtype, [&](auto* type) {
    found = argmax_of(static_cast<const std::remove_pointer_t<decltype(type)>*>(scores), count);
  });
  return found;
}

constexpr StepKernels kStepKernels = {norm_row, swiglu_row, attend_head, argmax_row};

}  // namespace
}  // namespace aqlm::cpu
