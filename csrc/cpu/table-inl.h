// One instruction set: all bodies under the target pragma of the including isa_*.cpp, which
// defines AQLM_ISA (the name), AQLM_LEVEL (3 VBMI, 2 AVX-512, 1 AVX2, 0 portable) and AQLM_TABLE
#include "vec-inl.h"
#include "convert-inl.h"
#include "lut_float-inl.h"
#include "lut_tokens-inl.h"
#if AQLM_LEVEL >= 1
#include "lut_words-inl.h"
#include "shuffle-inl.h"
#include "lut_bytes-inl.h"
#endif
#include "entries-inl.h"
#include "direct-inl.h"
#include "decode-inl.h"
#include "direct_tokens-inl.h"
#include "tile-inl.h"
#include "fused-inl.h"
#include "scalar-inl.h"
#include "e8p-inl.h"
#include "hadamard-inl.h"
#include "dense-inl.h"
#include "step-inl.h"

namespace aqlm::cpu {
namespace {

// Measured choices and crossovers, 2x8g8 and 1x16g8 4096 x 4096 (README.md). On AVX2 16-bit
// byte tables were no faster than float32 ones (1.28 against 1.13 ms), so only the 8-bit tables
// use shuffles. VBMI keeps 8-bit tables at any number of tokens: 16 take 1.53 ms, the 16-bit
// token tables 1.73.
#if AQLM_LEVEL >= 2
constexpr LutKernel kLutExact = kLutBytesExact, kLutFast = kLutBytesFast, kLutMany = kLutWords;
constexpr int64_t kExactMaxTokens = AQLM_LEVEL >= 3 ? 13 : 2;
constexpr int64_t kFastMaxTokens = AQLM_LEVEL >= 3 ? 128 : 4, kMaxMLut = 128;
#elif AQLM_LEVEL == 1
constexpr LutKernel kLutExact = kLutFloat, kLutFast = kLutBytesFast, kLutMany = kLutWords;
constexpr int64_t kExactMaxTokens = 3, kFastMaxTokens = 5, kMaxMLut = 64;
#else
constexpr LutKernel kLutExact = kLutFloat, kLutFast = kLutFloat, kLutMany = kLutTokens;
constexpr int64_t kExactMaxTokens = 8, kFastMaxTokens = 8, kMaxMLut = 64;
#endif
constexpr int64_t kDirectMaxTokens = AQLM_LEVEL >= 2 ? 8 : 12, kMaxMDirect = 32;

constexpr KernelTable kTable = {
    AQLM_ISA,      kLutExact,       kLutFast,         kLutFloat,        kLutTokens,
    kLutMany,      kExactMaxTokens, kFastMaxTokens,   kMaxMLut,         kMaxMDirect,
    kDirectTokens, direct,          kDirectMaxTokens, direct_tokens_of, decode_rows,
    finish,        to_float,        max_abs_bits,     transpose,        dense_rows,
    kStepKernels,  kTileKernels,
};

}  // namespace

const KernelTable& AQLM_TABLE() {
  return kTable;
}

}  // namespace aqlm::cpu
