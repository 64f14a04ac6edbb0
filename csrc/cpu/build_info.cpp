// textok_fast::build_info() -> str: what this library was built with and what the processor it runs on can do.
//
// One "key=value" line each for: compiler, torch_target (the oldest PyTorch whose stable ABI it needs), isa (vector
// extensions of this processor, asked at run time, because the library may run on another machine than the one that
// built it) and cuda ("no", or the toolkit and the architectures compiled in).

#include <string>

#include <torch/csrc/stable/library.h>

#include "../build_info.h"

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

std::string build_info() {
#ifdef TEXTOK_WITH_CUDA
  const std::string cuda = textok_fast::cuda_build();
#else
  const std::string cuda = "no";
#endif
  return "compiler=" + compiler() + "\ntorch_target=" + torch_target() + "\nisa=" + instruction_sets() + "\ncuda=" + cuda + "\n";
}

}  // namespace

STABLE_TORCH_LIBRARY(textok_fast, m) {
  m.def("build_info() -> str");
}

// Without a tensor argument there is no device to dispatch on, hence not the CPU key.
STABLE_TORCH_LIBRARY_IMPL(textok_fast, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
