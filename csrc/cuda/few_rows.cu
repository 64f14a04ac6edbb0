#include "kernels.h"

namespace textok_fast::cuda {

void run_rows_product(const RowsProduct& arguments, const RowsPlan& plan, Stream& stream) {
  launch_rows_product(arguments, plan, stream);
}

void run_rows_attention(const RowsAttention& arguments, Stream& stream) { launch_rows_attention(arguments, stream); }

template <typename T>
void run_rows_norm(const RowsNorm<T>& arguments, Stream& stream) {
  launch_rows_norm(arguments, stream);
}

template void run_rows_norm(const RowsNorm<float>&, Stream&);
template void run_rows_norm(const RowsNorm<__nv_bfloat16>&, Stream&);

}  // namespace textok_fast::cuda
