// Which instruction set runs: detected once, AQLM_CPU_ISA or select_isa() overrides.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace aqlm::cpu {

// The selected table. Throws std::invalid_argument if AQLM_CPU_ISA names no usable set.
const KernelTable& kernels();

// "auto" goes back to the environment or the best set; an unusable name throws.
void select_isa(const std::string& name);

// Usable on this CPU, best first.
std::vector<std::string> supported_isas();

// CPU features relevant to this module.
std::vector<std::pair<std::string, bool>> cpu_features();

// Compiled tables, best first, usable or not.
std::vector<const KernelTable*> compiled_tables();

}  // namespace aqlm::cpu
