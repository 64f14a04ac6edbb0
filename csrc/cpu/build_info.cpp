// textok_fast::build_info() -> str: what this library was built with and what the processor it runs on can do.
//
// One "key=value" line each for: compiler, torch_target (the oldest PyTorch whose stable ABI it needs), isa (vector
// extensions of this processor, asked at run time, because the library may run on another machine than the one that
// built it), kernels (which of the compiled instruction sets runs, see isa.h), products ("vnni", "bf16", both or "none":
// which instructions for products of int8 and of bf16 the packed products use), cuda ("no", or the toolkit and the
// architectures compiled in) and, with CUDA code, cuda_ptx (those of them that newer GPUs can run too).

#include "ops.h"

#include <exception>
#include <string>

#include "../build_info.h"
#include "isa.h"

namespace textok_fast {

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

std::string torch_target() {
  // TORCH_TARGET_VERSION is 0xMMmmpp0000000000: major, minor and patch in the three highest bytes.
  constexpr unsigned long long version = TORCH_TARGET_VERSION;
  return std::to_string(version >> 56) + "." + std::to_string((version >> 48) & 0xff);
}

std::string instruction_sets() {
  std::string names;
  [[maybe_unused]] const auto add = [&names](const char* name, bool supported) {
    if (!supported) return;
    if (!names.empty()) names += ',';
    names += name;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  add("avx2", __builtin_cpu_supports("avx2"));
  add("fma", __builtin_cpu_supports("fma"));
  add("avx512f", __builtin_cpu_supports("avx512f"));
  add("avx512vnni", __builtin_cpu_supports("avx512vnni"));
  add("avx512bf16", __builtin_cpu_supports("avx512bf16"));
#elif defined(__aarch64__)
  add("neon", true);
#endif
  return names.empty() ? "baseline" : names;
}

std::string kernels() {
  try {
    return isa_name(isa());
  } catch (const std::exception&) {
    return "none: TEXTOK_ISA names no instruction set of this machine";
  }
}

std::string products() {
  try {
    const std::string names = std::string(has_int8_products() ? ",vnni" : "") + (has_bf16_products() ? ",bf16" : "");
    return names.empty() ? "none" : names.substr(1);
  } catch (const std::exception&) {  // as in kernels()
    return "none";
  }
}

}  // namespace

std::string build_info() {
#ifdef TEXTOK_WITH_CUDA
  const std::string cuda = cuda_build() + "\ncuda_ptx=" TEXTOK_CUDA_PTX;
#else
  const std::string cuda = "no";
#endif
  return "compiler=" + compiler() + "\ntorch_target=" + torch_target() + "\nisa=" + instruction_sets() +
         "\nkernels=" + kernels() + "\nproducts=" + products() + "\ncuda=" + cuda + "\n";
}

}  // namespace textok_fast
