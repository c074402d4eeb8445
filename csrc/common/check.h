// AQLM_CHECK(condition, parts...): throws std::invalid_argument with the parts streamed together.
//
// Messages name the values: AQLM_CHECK(k % g == 0, "K=", k, " is not a multiple of ", g, " (...)").
// Host code only, and never inside an OpenMP region (an exception must not cross its border).
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace aqlm {

template <class... Parts>
std::string join_message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace aqlm

#define AQLM_CHECK(condition, ...)                                                    \
  do {                                                                                \
    if (!(condition)) throw std::invalid_argument(::aqlm::join_message(__VA_ARGS__)); \
  } while (0)
