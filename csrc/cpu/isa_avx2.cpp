// Bodies for avx2. The target pragma comes after every standard header, so that no shared
// inline function is compiled for it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels.h"

#pragma GCC target("avx2,fma,f16c")
#define AQLM_LEVEL 1  // g++ does not update __AVX2__ and its kind at the pragma
#define AQLM_ISA "avx2"
#define AQLM_TABLE table_avx2
#include "table-inl.h"
#endif
