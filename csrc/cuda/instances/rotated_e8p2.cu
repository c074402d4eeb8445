// One unit of the parallel build: see the .inl file.
#define AQLM_CODING Coding::kE8p
#define AQLM_BITS 2
#include "rotated.inl"
