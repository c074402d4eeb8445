// Plain translation unit: compiled for the baseline, so it may run on any CPU of the target.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>

#include "../common/check.h"

namespace aqlm::cpu {

const KernelTable& table_portable();
#if defined(__x86_64__)
const KernelTable& table_avx512vbmi();
const KernelTable& table_avx512();
const KernelTable& table_avx2();
#endif

namespace {

struct Candidate {
  const KernelTable* table;
  bool usable;
};

std::vector<Candidate> candidates() {
  std::vector<Candidate> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  // Every CPU with VBMI has VNNI but one that was hardly sold (Cannon Lake).
  const bool vbmi = avx512 && __builtin_cpu_supports("avx512vbmi") &&
                    __builtin_cpu_supports("avx512vnni");
  found.push_back({&table_avx512vbmi(), vbmi});
  found.push_back({&table_avx512(), avx512});
  found.push_back({&table_avx2(), avx2});
#endif
  found.push_back({&table_portable(), true});
  return found;
}

std::string join_names(const std::vector<std::string>& names) {
  std::string joined;
  for (const std::string& name : names) joined += (joined.empty() ? "" : ", ") + name;
  return joined;
}

const KernelTable* find(const std::string& name, const char* origin) {
  for (const Candidate& candidate : candidates()) {
    if (name != candidate.table->isa) continue;
    AQLM_CHECK(candidate.usable, origin, "='", name,
               "': this CPU lacks it; supported here: ", join_names(supported_isas()));
    return candidate.table;
  }
  AQLM_CHECK(
      false, origin, "='", name,
      "' is not an instruction set of this build; supported here: ", join_names(supported_isas()));
  return nullptr;
}

const KernelTable* choose() {
  const char* name = std::getenv("AQLM_CPU_ISA");
  if (name != nullptr && name[0] != '\0' && std::string(name) != "auto") {
    return find(name, "AQLM_CPU_ISA");
  }
  for (const Candidate& candidate : candidates()) {
    if (candidate.usable) return candidate.table;
  }
  return &table_portable();
}

std::atomic<const KernelTable*> g_selected{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = g_selected.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = choose();
    g_selected.store(table, std::memory_order_release);
  }
  return *table;
}

void select_isa(const std::string& name) {
  g_selected.store(name == "auto" ? choose() : find(name, "isa"), std::memory_order_release);
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.usable) names.emplace_back(candidate.table->isa);
  }
  return names;
}

std::vector<std::pair<std::string, bool>> cpu_features() {
  std::vector<std::pair<std::string, bool>> features;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define AQLM_FEATURE(name) features.emplace_back(name, __builtin_cpu_supports(name) != 0)
  AQLM_FEATURE("avx2");
  AQLM_FEATURE("fma");
  AQLM_FEATURE("f16c");
  AQLM_FEATURE("avx512f");
  AQLM_FEATURE("avx512bw");
  AQLM_FEATURE("avx512vl");
  AQLM_FEATURE("avx512dq");
  AQLM_FEATURE("avx512vbmi");
  AQLM_FEATURE("avx512vnni");
  AQLM_FEATURE("avx512bf16");
#undef AQLM_FEATURE
#endif
  return features;
}

std::vector<const KernelTable*> compiled_tables() {
  std::vector<const KernelTable*> tables;
  for (const Candidate& candidate : candidates()) tables.push_back(candidate.table);
  return tables;
}

}  // namespace aqlm::cpu
