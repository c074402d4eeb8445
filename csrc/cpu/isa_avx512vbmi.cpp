// Bodies for avx512vbmi. The target pragma comes after every standard header, so that no shared
// inline function is compiled for it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels.h"

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#pragma GCC target("avx512vbmi,avx512vnni")
#define AQLM_LEVEL 3  // g++ does not update __AVX2__ and its kind at the pragma
#define AQLM_ISA "avx512vbmi"
#define AQLM_TABLE table_avx512vbmi
#include "table-inl.h"
#endif
