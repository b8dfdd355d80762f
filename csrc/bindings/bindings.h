// What the parts of ftfast._C read their arguments with.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace py = pybind11;

namespace ftfast {

inline std::vector<int64_t> numbers(const py::tuple& tuple) {
  std::vector<int64_t> values;
  values.reserve(tuple.size());
  for (const auto& item : tuple) values.push_back(item.cast<int64_t>());
  return values;
}

}  // namespace ftfast
