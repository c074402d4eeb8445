// One unit of the parallel build: see the .inl file.
#include <cuda_fp16.h>
#define AQLM_T __half
#define AQLM_INT8 false
#define AQLM_LAUNCH launch_mma_exact
#include "mma.inl"
