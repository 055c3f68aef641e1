// mmrpt_kernels._C: plain addresses, sizes and (for kernels) a stream. No torch headers: one build serves every torch.
// The callers in Python own checks, devices and lifetimes; nothing here looks behind an address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "lm_head/row_softmax.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Where = std::optional<std::pair<int, Address>>;  // device index and stream; nothing: the host

#if defined(MMRPT_CUDA_ARCHITECTURES)
const auto run_on_device = &mmrpt::run_on_device;
#else
#define MMRPT_CUDA_ARCHITECTURES ""
const auto run_on_device = [](auto&&...) { return "this build of mmrpt_kernels._C has no CUDA sources (no nvcc)"; };
#endif

const std::map<std::string, mmrpt::Kernel> kKernels{{"exponentials", mmrpt::Kernel::kExponentials},
                                                    {"statistics", mmrpt::Kernel::kStatistics},
                                                    {"gradient", mmrpt::Kernel::kGradient}};
const std::map<std::string, mmrpt::Element> kElements{{"float32", mmrpt::Element::kFloat32},
                                                      {"bfloat16", mmrpt::Element::kBfloat16},
                                                      {"float16", mmrpt::Element::kFloat16}};

// One of the row kernels; `mmrpt::Call` says what it reads and writes. addresses: of logits, bias (0: none), targets,
// numbers and out. sizes: rows, vocab, the logits' row stride and that of out. head: inner, outer, slope.
void row_softmax(const std::string& kernel, const std::string& element, const std::array<Address, 5>& addresses,
                 const std::array<std::int64_t, 4>& sizes, bool entropy, float max_above_target,
                 const std::array<float, 3>& head, bool capped, const Where& where) {
  mmrpt::Call call{};
  call.kernel = kKernels.at(kernel);
  call.element = kElements.at(element);
  call.logits = reinterpret_cast<const float*>(addresses[0]);
  call.bias = reinterpret_cast<const float*>(addresses[1]);
  call.targets = reinterpret_cast<const std::int64_t*>(addresses[2]);
  call.numbers = reinterpret_cast<float*>(addresses[3]);
  call.out = reinterpret_cast<void*>(addresses[4]);
  call.rows = sizes[0];
  call.vocab = static_cast<int>(sizes[1]);
  call.stride = sizes[2];
  call.out_stride = sizes[3];
  call.entropy = entropy;
  call.max_above_target = max_above_target;
  call.head = mmrpt::Head{head[0], head[1], head[2], capped};
  if (call.kernel == mmrpt::Kernel::kExponentials && call.element == mmrpt::Element::kFloat16)
    throw std::invalid_argument("out: float16's range is too short for exponentials");
  if (call.rows == 0) return;
  if (!where) return mmrpt::run_on_host(call);
  const char* error = run_on_device(call, where->first, reinterpret_cast<void*>(where->second));
  if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cuda_architectures"] = MMRPT_CUDA_ARCHITECTURES;  // "" when no CUDA source was compiled
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of mmrpt_kernels; import through mmrpt_kernels.common.extension.";
  module.def("build_info", &build_info);
  module.def("row_softmax", &row_softmax, py::call_guard<py::gil_scoped_release>(), py::arg("kernel"),
             py::arg("element"), py::arg("addresses"), py::arg("sizes"), py::arg("entropy"),
             py::arg("max_above_target"), py::arg("head"), py::arg("capped"), py::arg("where"));
}
