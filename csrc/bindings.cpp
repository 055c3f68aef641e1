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

#include "logprobs/rows.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Shape = std::pair<std::int64_t, int>;      // rows, vocab
using Scalars = std::array<double, 3>;           // temperature, softcap, logit_scale
using Where = std::optional<std::pair<int, Address>>;  // device index and stream; nothing: the host

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The host's version of a kernel, or the device's, which this build may lack.
template <typename Call, typename OnHost, typename OnDevice>
void dispatch(const Call& call, const Where& where, OnHost on_host, OnDevice on_device) {
  if (call.rows == 0) return;
  if (!where) return on_host(call);
  const char* error = on_device(call, where->first, at<void>(where->second));
  if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}

#if defined(MMRPT_CUDA_ARCHITECTURES)
const auto partials_on_device = &mmrpt::partials_on_device;
const auto gradient_on_device = &mmrpt::gradient_on_device;
const auto exponentials_on_device = &mmrpt::exponentials_on_device;
#else
#define MMRPT_CUDA_ARCHITECTURES ""
const auto not_built = [](auto&&...) { return "this build of mmrpt_kernels._C has no CUDA sources (no nvcc)"; };
const auto partials_on_device = not_built;
const auto gradient_on_device = not_built;
const auto exponentials_on_device = not_built;
#endif

// logits (rows, vocab) float32, `stride` floats from row to row; targets (rows,) int64; out (4, rows) float32: top,
// total, dots and the target's logit.
void row_partials(Address logits, std::int64_t stride, const Shape& shape, Address targets, Address out, bool want_dots,
                  const Scalars& scalars, const Where& where) {
  const mmrpt::PartialsCall call{at<float>(logits), at<std::int64_t>(targets), at<float>(out),
                                 shape.first,       stride,                    shape.second,
                                 want_dots,         mmrpt::make_head(scalars[0], scalars[1], scalars[2])};
  dispatch(call, where, &mmrpt::partials_on_host, partials_on_device);
}

mmrpt::Element element_of(const std::string& name) {
  static const std::map<std::string, mmrpt::Element> known{{"float32", mmrpt::Element::kFloat32},
                                                           {"bfloat16", mmrpt::Element::kBfloat16},
                                                           {"float16", mmrpt::Element::kFloat16}};
  return known.at(name);
}

// As above; columns: addresses of top, total, entropy, d_logps, d_entropy, each (rows,) float32, entropy and d_entropy 0
// where no entropy has a gradient; out (rows, vocab) of `element`, `out_stride` elements from row to row. out may be the
// logits themselves.
void row_gradient(Address logits, std::int64_t stride, const Shape& shape, Address targets,
                  const std::array<Address, 5>& columns, Address out, std::int64_t out_stride,
                  const std::string& element, const Scalars& scalars, const Where& where) {
  const mmrpt::GradientCall call{at<float>(logits),
                                 at<std::int64_t>(targets),
                                 at<float>(columns[0]),
                                 at<float>(columns[1]),
                                 at<float>(columns[2]),
                                 at<float>(columns[3]),
                                 at<float>(columns[4]),
                                 at<void>(out),
                                 element_of(element),
                                 shape.first,
                                 stride,
                                 out_stride,
                                 shape.second,
                                 mmrpt::make_head(scalars[0], scalars[1], scalars[2])};
  dispatch(call, where, &mmrpt::gradient_on_host, gradient_on_device);
}

// As above, without float16; sums (3, rows) float32: the target's z - base, and total and dots of the other words.
void row_exponentials(Address logits, std::int64_t stride, const Shape& shape, Address targets, Address sums, Address out,
                      std::int64_t out_stride, const std::string& element, bool want_dots, float most_above,
                      const Scalars& scalars, const Where& where) {
  const mmrpt::ExponentialsCall call{at<float>(logits),
                                     at<std::int64_t>(targets),
                                     at<float>(sums),
                                     at<void>(out),
                                     element_of(element),
                                     shape.first,
                                     stride,
                                     out_stride,
                                     shape.second,
                                     want_dots,
                                     most_above,
                                     mmrpt::make_head(scalars[0], scalars[1], scalars[2])};
  if (call.element == mmrpt::Element::kFloat16) throw std::invalid_argument("out: float16's range is too short");
  dispatch(call, where, &mmrpt::exponentials_on_host, exponentials_on_device);
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
  module.def("row_partials", &row_partials, release(), py::arg("logits"), py::arg("stride"), py::arg("shape"),
             py::arg("targets"), py::arg("out"), py::arg("want_dots"), py::arg("scalars"), py::arg("where"));
  module.def("row_gradient", &row_gradient, release(), py::arg("logits"), py::arg("stride"), py::arg("shape"),
             py::arg("targets"), py::arg("columns"), py::arg("out"), py::arg("out_stride"), py::arg("element"),
             py::arg("scalars"), py::arg("where"));
  module.def("row_exponentials", &row_exponentials, release(), py::arg("logits"), py::arg("stride"), py::arg("shape"),
             py::arg("targets"), py::arg("sums"), py::arg("out"), py::arg("out_stride"), py::arg("element"),
             py::arg("want_dots"), py::arg("most_above"), py::arg("scalars"), py::arg("where"));
}
