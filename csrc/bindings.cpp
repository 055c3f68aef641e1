// mmrpt_kernels._C: plain addresses, sizes and (for kernels) a stream. No torch headers: one build serves every torch.
// The callers in Python own checks, devices and lifetimes; nothing here looks behind an address.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

#include "common/row_math.h"

namespace py = pybind11;

#ifndef MMRPT_CUDA_ARCHITECTURES
#define MMRPT_CUDA_ARCHITECTURES ""
#endif

namespace {

using mmrpt::RowSums;
using Address = std::uintptr_t;

// As a GPU does it: parts are summed on their own and merged, which also keeps float32 rounding small on long rows.
constexpr std::int64_t kPart = 256;

RowSums sums_of_row(const float* logits, std::int64_t vocab) {
  RowSums row = mmrpt::empty_sums();
  for (std::int64_t begin = 0; begin < vocab; begin += kPart) {
    RowSums part = mmrpt::empty_sums();
    for (std::int64_t j = begin; j < std::min(begin + kPart, vocab); ++j) part = mmrpt::push(part, logits[j]);
    row = mmrpt::merge(row, part);
  }
  return row;
}

// logits (rows, vocab) float32, `stride` floats from row to row; targets (rows) int64; lse, logp, entropy (rows) float32.
void row_statistics(Address logits, Address targets, Address lse, Address logp, Address entropy, std::int64_t rows,
                    std::int64_t vocab, std::int64_t stride) {
  for (std::int64_t i = 0; i < rows; ++i) {
    const float* row = reinterpret_cast<const float*>(logits) + i * stride;
    const RowSums sums = sums_of_row(row, vocab);
    reinterpret_cast<float*>(lse)[i] = mmrpt::log_sum_exp(sums);
    reinterpret_cast<float*>(logp)[i] =
        mmrpt::log_probability(sums, row[reinterpret_cast<const std::int64_t*>(targets)[i]]);
    reinterpret_cast<float*>(entropy)[i] = mmrpt::entropy(sums);
  }
}

// As above, and per row the coefficients d loss / d logp and d loss / d entropy (float32); writes d loss / d logits into
// gradient (rows, vocab), contiguous, float32. May be the logits themselves when stride == vocab.
void row_gradient(Address logits, Address targets, Address d_logp, Address d_entropy, Address gradient,
                  std::int64_t rows, std::int64_t vocab, std::int64_t stride) {
  for (std::int64_t i = 0; i < rows; ++i) {
    const float* row = reinterpret_cast<const float*>(logits) + i * stride;
    float* out = reinterpret_cast<float*>(gradient) + i * vocab;
    const RowSums sums = sums_of_row(row, vocab);
    const float row_entropy = mmrpt::entropy(sums);
    const std::int64_t target = reinterpret_cast<const std::int64_t*>(targets)[i];
    for (std::int64_t j = 0; j < vocab; ++j)
      out[j] = mmrpt::logit_gradient(sums, row_entropy, row[j], j == target,
                                     reinterpret_cast<const float*>(d_logp)[i],
                                     reinterpret_cast<const float*>(d_entropy)[i]);
  }
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cuda_architectures"] = MMRPT_CUDA_ARCHITECTURES;  // "" when no CUDA source was compiled
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.doc() = "Compiled kernels of mmrpt_kernels; import through mmrpt_kernels.common.extension.";
  module.def("build_info", &build_info);
  module.def("row_statistics", &row_statistics, release(), py::arg("logits"), py::arg("targets"), py::arg("lse"),
             py::arg("logp"), py::arg("entropy"), py::arg("rows"), py::arg("vocab"), py::arg("stride"));
  module.def("row_gradient", &row_gradient, release(), py::arg("logits"), py::arg("targets"), py::arg("d_logp"),
             py::arg("d_entropy"), py::arg("gradient"), py::arg("rows"), py::arg("vocab"), py::arg("stride"));
}
