#include "../build_info.h"

namespace textok_fast {

std::string cuda_build() {
  constexpr int capabilities[] = {__CUDA_ARCH_LIST__};  // nvcc's list of what it compiles for: 800, 900, ...
  std::string text = std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + " (";
  for (int capability : capabilities) {
    if (text.back() != '(') text += ',';
    text += std::to_string(capability / 10);
  }
  return text + ")";
}

}  // namespace textok_fast
