// One unit of the parallel build: see the .inl file.
#include <cuda_fp16.h>
#define AQLM_T __half
#include "owned.inl"
