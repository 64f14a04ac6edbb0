#include "kernels.h"

namespace textok_fast::cuda {

template <typename TO, typename TX>
void run_guided_step(const GuidedStep<TO, TX>& arguments, Stream& stream) {
  launch_guided_step(arguments, stream);
}

#define TEXTOK_GUIDED(TO)                                                       \
  template void run_guided_step(const GuidedStep<TO, float>&, Stream&);         \
  template void run_guided_step(const GuidedStep<TO, __nv_bfloat16>&, Stream&); \
  template void run_guided_step(const GuidedStep<TO, __half>&, Stream&);
TEXTOK_GUIDED(float)
TEXTOK_GUIDED(__nv_bfloat16)
TEXTOK_GUIDED(__half)
#undef TEXTOK_GUIDED

}  // namespace textok_fast::cuda
