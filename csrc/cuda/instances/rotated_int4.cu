// One unit of the parallel build: see the .inl file.
#define AQLM_CODING Coding::kScalar
#define AQLM_BITS 4
#include "rotated.inl"
