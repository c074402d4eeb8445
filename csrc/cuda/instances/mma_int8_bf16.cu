// One unit of the parallel build: see the .inl file.
#include <cuda_bf16.h>
#define AQLM_T __nv_bfloat16
#define AQLM_INT8 true
#define AQLM_LAUNCH launch_mma_int8
#include "mma.inl"
