// Every schema of torch.ops.textok_fast, and which function runs for tensors on the CPU. The same schemas stand in
// textok_fast/ops/*.py, beside the fake kernels and derivatives; a test compares them.

#include "ops.h"

#include <torch/csrc/stable/library.h>

using namespace textok_fast;

STABLE_TORCH_LIBRARY(textok_fast, m) {
  m.def("build_info() -> str");

  m.def("layer_norm_modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor");
  m.def("layer_norm_modulate_backward(Tensor grad, Tensor x, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gated_residual_layer_norm_modulate(Tensor x, Tensor branch, Tensor? gate, Tensor shift, Tensor scale, float offset, "
      "float eps) -> (Tensor, Tensor)");
  m.def(
      "gated_residual_layer_norm_modulate_backward(Tensor grad_residual, Tensor grad, Tensor residual, Tensor branch, "
      "Tensor? gate, Tensor scale, float offset, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor");
  m.def("patchify_uint8(Tensor images, int patch_size, ScalarType dtype) -> Tensor");
  m.def("unpatchify_uint8(Tensor patches, int patch_size, int rows) -> Tensor");
  m.def("vq_nearest(Tensor x, Tensor codebook, bool normalize) -> Tensor");
  m.def(
      "guided_step(Tensor output, Tensor x, Tensor? noise, Tensor table, Tensor index, int guided_channels, "
      "bool clip_denoised) -> Tensor");
  m.def("pack_linear(Tensor weight, int kind) -> Tensor");
  m.def(
      "packed_block(Tensor x, Tensor hidden, Tensor modulation, Tensor shift, Tensor scale, Tensor[] weights, int heads, "
      "int kind, str activation, float eps) -> (Tensor, Tensor)");
  m.def(
      "few_rows_linear(Tensor x, Tensor weight, Tensor? bias, str activation, bool partial, int columns, int cluster, "
      "int splits, bool warpgroups, bool overlap) -> Tensor");
  m.def("few_rows_attention(Tensor qkv, int heads, bool overlap) -> Tensor");
  m.def(
      "few_rows_norm(Tensor x, Tensor partial, Tensor bias, Tensor gate, Tensor shift, Tensor scale, float eps, "
      "bool overlap) -> (Tensor, Tensor)");
  m.def(
      "packed_linear(Tensor x, Tensor packed, Tensor? scales, Tensor? bias, int out_features, int kind, str activation) "
      "-> Tensor");
}

// Without a tensor argument there is no device to dispatch on, hence not the CPU key.
STABLE_TORCH_LIBRARY_IMPL(textok_fast, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}

STABLE_TORCH_LIBRARY_IMPL(textok_fast, CPU, m) {
  m.impl("layer_norm_modulate", TORCH_BOX(&layer_norm_modulate));
  m.impl("layer_norm_modulate_backward", TORCH_BOX(&layer_norm_modulate_backward));
  m.impl("gated_residual_layer_norm_modulate", TORCH_BOX(&gated_residual_layer_norm_modulate));
  m.impl("gated_residual_layer_norm_modulate_backward", TORCH_BOX(&gated_residual_layer_norm_modulate_backward));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("patchify_uint8", TORCH_BOX(&patchify_uint8));
  m.impl("unpatchify_uint8", TORCH_BOX(&unpatchify_uint8));
  m.impl("vq_nearest", TORCH_BOX(&vq_nearest));
  m.impl("guided_step", TORCH_BOX(&guided_step));
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
  m.impl("packed_block", TORCH_BOX(&packed_block));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
}
