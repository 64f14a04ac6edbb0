#pragma once

#include <string>

namespace textok_fast {

// The CUDA toolkit and the architectures of the compiled device code, such as "13.0 (80,90,100,120)".
std::string cuda_build();

}  // namespace textok_fast
