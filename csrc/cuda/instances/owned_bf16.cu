// One unit of the parallel build: see the .inl file.
#include <cuda_bf16.h>
#define AQLM_T __nv_bfloat16
#include "owned.inl"
