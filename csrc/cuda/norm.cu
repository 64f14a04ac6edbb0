#include "kernels.h"

namespace textok_fast::cuda {

template <typename T>
void run_norm_forward(const NormForward<T>& arguments, bool residual, Stream& stream) {
  residual ? launch_norm_forward<T, true>(arguments, stream) : launch_norm_forward<T, false>(arguments, stream);
}

template <typename T>
void run_norm_backward(const NormBackward<T>& arguments, Stream& stream) {
  launch_norm_backward(arguments, stream);
}

template void run_norm_forward(const NormForward<float>&, bool, Stream&);
template void run_norm_forward(const NormForward<__nv_bfloat16>&, bool, Stream&);
template void run_norm_forward(const NormForward<__half>&, bool, Stream&);
template void run_norm_backward(const NormBackward<float>&, Stream&);
template void run_norm_backward(const NormBackward<__nv_bfloat16>&, Stream&);
template void run_norm_backward(const NormBackward<__half>&, Stream&);

}  // namespace textok_fast::cuda
