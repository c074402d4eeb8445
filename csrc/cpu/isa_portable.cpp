// Bodies for the compiler's baseline: the only ones outside x86-64.
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels.h"

#define AQLM_LEVEL 0
#define AQLM_ISA "portable"
#define AQLM_TABLE table_portable
#include "table-inl.h"
