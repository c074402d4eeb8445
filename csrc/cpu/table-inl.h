// One instruction set: all bodies under the target pragma of the including isa_*.cpp, which
// defines AQLM_ISA (the name) and AQLM_TABLE (the exported function).
#include "vec-inl.h"
#include "convert-inl.h"
#include "lut_float-inl.h"
#include "lut_tokens-inl.h"
#if defined(__AVX512VBMI__)
#include "lut_bytes-inl.h"
#endif
#include "direct-inl.h"
#include "decode-inl.h"

namespace aqlm::cpu {
namespace {

constexpr KernelTable kTable = {
    AQLM_ISA,
#if defined(__AVX512VBMI__)
    kLutBytesExact, kLutBytesFast,
#else
    kLutFloat, kLutFloat,
#endif
    kLutFloat, kLutTokens,
#if defined(__AVX512VBMI__)
    16, 32, 16,
#else
    3, 32, 16,
#endif
    kDirectTokens, direct, decode_rows, finish, to_float, max_abs_bits, transpose,
};

}  // namespace

const KernelTable& AQLM_TABLE() { return kTable; }

}  // namespace aqlm::cpu
