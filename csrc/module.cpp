// Registers the compiled kernels; their schemas are defined in ttsr_fast/operators/schemas.py.

#include "check.h"
#include "cpu/isa.h"
#include "ops.h"

namespace ttsr_fast {
namespace {

void cpp_search(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_mask, Tensor score,
                Tensor index, int64_t kernel_size, int64_t padding, bool normalize_query, bool normalize_key,
                double eps, bool add_eps, bool bfloat16, const std::optional<Tensor>& stop) {
  if (stop) {
    check_type(*stop, ScalarType::Int, "stop");
    check_shape(*stop, {1}, "stop");
  }
  check_patch(kernel_size, padding);
  search(query, key, key_mask, score, index,
         {int(kernel_size), padding, normalize_query, normalize_key, eps, add_eps, bfloat16,
          stop ? static_cast<const int32_t*>(stop->const_data_ptr()) : nullptr});
}

void cpp_gather_fold(const Tensor& value, const Tensor& index, const std::optional<Tensor>& weight,
                     Tensor out, int64_t stride, int64_t kernel_size, int64_t padding, int64_t key_height,
                     int64_t key_width, std::string divisor) {
  gather_fold(value, index, weight, out, {stride, kernel_size, padding, key_height, key_width, divisor});
}

void cpp_gather_fold_adjoint(const Tensor& grad, const Tensor& index, const std::optional<Tensor>& weight,
                             Tensor out, int64_t stride, int64_t kernel_size, int64_t padding,
                             int64_t key_height, int64_t key_width, std::string divisor) {
  gather_fold_adjoint(grad, index, weight, out,
                      {stride, kernel_size, padding, key_height, key_width, divisor});
}

void cpp_gather_dot(const Tensor& value, const Tensor& grad, const Tensor& index, Tensor out, int64_t stride,
                    int64_t kernel_size, int64_t padding, int64_t key_height, int64_t key_width,
                    std::string divisor) {
  gather_dot(value, grad, index, out, {stride, kernel_size, padding, key_height, key_width, divisor});
}

std::string cpp_isa() { return best_isa().name; }

}  // namespace
}  // namespace ttsr_fast

STABLE_TORCH_LIBRARY_IMPL(ttsr_fast, CPU, m) {
  m.impl("cpp_search", TORCH_BOX(&ttsr_fast::cpp_search));
  m.impl("cpp_gather_fold", TORCH_BOX(&ttsr_fast::cpp_gather_fold));
  m.impl("cpp_gather_fold_adjoint", TORCH_BOX(&ttsr_fast::cpp_gather_fold_adjoint));
  m.impl("cpp_gather_dot", TORCH_BOX(&ttsr_fast::cpp_gather_dot));
}

STABLE_TORCH_LIBRARY_IMPL(ttsr_fast, CompositeExplicitAutograd, m) {
  m.impl("cpp_isa", TORCH_BOX(&ttsr_fast::cpp_isa));
}
