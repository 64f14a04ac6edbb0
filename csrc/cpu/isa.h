// Which of the compiled instruction sets runs on this processor. For the launchers (csrc/cpu/*.cpp), not for the kernels.
//
// Every file in csrc/cpu/kernels/ is compiled once per instruction set, with TEXTOK_ISA defined as its name, and ends in a
// table of functions, such as `const NormKernels TEXTOK_TABLE(norm) = {...};`. A launcher takes the one for this machine:
// `const NormKernels& kernels = TEXTOK_CHOOSE(norm);`.

#pragma once

namespace textok_fast {

enum class Isa { baseline, avx2, avx512 };

// The best one this processor has, or a lower one asked for by the environment variable TEXTOK_ISA (baseline, avx2, avx512),
// read on the first call. Throws when TEXTOK_ISA is another word, or one that this processor or this build lacks.
Isa isa();

const char* isa_name(Isa isa);

// AVX-512's instructions for products of int8 (VNNI) and of bf16, which processors have or lack independently. Not when TEXTOK_ISA
// is set, so that avx512 means AVX-512 without them.
bool has_int8_products();
bool has_bf16_products();

}  // namespace textok_fast

#ifdef TEXTOK_X86_KERNELS
#define TEXTOK_CHOOSE(family)                                        \
  (::textok_fast::isa() == ::textok_fast::Isa::avx512 ? family##_avx512 \
   : ::textok_fast::isa() == ::textok_fast::Isa::avx2 ? family##_avx2   \
                                                      : family##_baseline)
#else
#define TEXTOK_CHOOSE(family) (::textok_fast::isa(), family##_baseline)
#endif
