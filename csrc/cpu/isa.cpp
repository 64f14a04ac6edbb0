#include "isa.h"

#include <cstdlib>
#include <cstring>

#include <torch/headeronly/util/Exception.h>

namespace textok_fast {

namespace {

Isa best() {
#ifdef TEXTOK_X86_KERNELS
  __builtin_cpu_init();  // asks the operating system too: it must save the registers
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

// TEXTOK_ISA, or null.
const char* wish() {
  const char* wanted = std::getenv("TEXTOK_ISA");
  return wanted == nullptr || *wanted == '\0' ? nullptr : wanted;
}

Isa chosen() {
  const Isa supported = best();
  const char* wanted = wish();
  if (wanted == nullptr) return supported;
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::strcmp(wanted, isa_name(isa)) != 0) continue;
    STD_TORCH_CHECK(isa <= supported, "TEXTOK_ISA=", wanted, ": this processor or build has no more than ", isa_name(supported));
    return isa;
  }
  STD_TORCH_CHECK(false, "TEXTOK_ISA=", wanted, " is none of baseline, avx2, avx512");
}

}  // namespace

Isa isa() {
  static const Isa value = chosen();  // an exception leaves it unset, so that every call reports a wrong TEXTOK_ISA
  return value;
}

#ifdef TEXTOK_X86_KERNELS
bool has_int8_products() {
  static const bool value = isa() == Isa::avx512 && wish() == nullptr && __builtin_cpu_supports("avx512vnni");
  return value;
}

bool has_bf16_products() {
  static const bool value = isa() == Isa::avx512 && wish() == nullptr && __builtin_cpu_supports("avx512bf16");
  return value;
}
#else
bool has_int8_products() { return false; }
bool has_bf16_products() { return false; }
#endif

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

}  // namespace textok_fast
