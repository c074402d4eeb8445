// Element-wise helpers around the kernels: type conversion, magnitude check, transpose, epilogue.

namespace aqlm::cpu {
namespace {

template <class T>
void to_float_as(const T* src, int64_t count, float* dst) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store<16>(dst + i, load<16>(src + i));
  for (; i < count; ++i) store<1>(dst + i, load<1>(src + i));
}

void to_float(const void* src, Dtype dtype, int64_t count, float* dst) {
  with_type(dtype, [&](auto* type) {
    to_float_as(static_cast<decltype(type)>(const_cast<void*>(src)), count, dst);
  });
}

uint32_t max_abs_bits(const float* src, int64_t count) {
  int32_t largest = 0;  // signed compares: magnitudes never set the sign bit
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = int32_t(bit_cast<uint32_t>(src[i]) & 0x7fffffffu);
    largest = bits > largest ? bits : largest;
  }
  return uint32_t(largest);
}

// [rows][cols] -> [cols][dst_stride], the padding repeats the first row.
void transpose(const float* src, int64_t rows, int64_t cols, int64_t dst_stride, float* dst) {
  for (int64_t r0 = 0; r0 < dst_stride; r0 += 16) {
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t r = r0; r < r0 + 16; ++r) {
        dst[c * dst_stride + r] = src[(r < rows ? r : 0) * cols + c];
      }
    }
  }
}

template <class Param, class Y>
void finish_as(const FinishArgs& args, const float* sums, int64_t o, int64_t count, Y* y) {
  const Param* scales = static_cast<const Param*>(args.scales) + o;
  const Param* bias = static_cast<const Param*>(args.bias);
  if (bias != nullptr) bias += o * args.og + args.a;
  y += o * args.og + args.a;
  int64_t i = 0;
  if (args.og == 1) {
    for (; i + 16 <= count; i += 16) {
      F<16> value = load<16>(sums + i) * load<16>(scales + i);
      if (bias != nullptr) value += load<16>(bias + i);
      store<16>(y + i, value);
    }
  }
  for (; i < count; ++i) {
    float value = sums[i] * load<1>(scales + i);
    if (bias != nullptr) value += load<1>(bias + i * args.og);
    store<1>(y + i * args.og, value);
  }
}

void finish(const FinishArgs& args, const float* sums, int64_t o, int64_t count, void* y) {
  with_type(args.param_dtype, [&](auto* param) {
    with_type(args.y_dtype, [&](auto* type) {
      using Param = std::remove_pointer_t<decltype(param)>;
      finish_as<Param>(args, sums, o, count, static_cast<decltype(type)>(y));
    });
  });
}

}  // namespace
}  // namespace aqlm::cpu
