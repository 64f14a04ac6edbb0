// Runs the kernels of csrc/cuda/{norm,guided}.h on the host, the very source that nvcc compiles, to find mistakes in indices,
// strides, alignment and barriers where there is no GPU. Compiled and called by test_native_cuda.py.
//
// A thread of a block is a coroutine that gives way at shuffles and barriers only. A warp runs as far as it can before the next
// one does, from the first to the last or from the last to the first, as the caller wants: so a missing barrier shows.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define TEXTOK_DYNAMIC_SHARED(name) float* const name = emulation::shared.data()

struct Dim {
  unsigned x;
};
static Dim threadIdx, blockIdx, blockDim;

// -- numbers ---------------------------------------------------------------------------------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};

static float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
static __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
static float __half2float(__half value) { return static_cast<float>(value.value); }
static __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }
static float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

// -- threads ---------------------------------------------------------------------------------------------------------------

namespace emulation {

constexpr size_t kStack = 64 << 10;
constexpr unsigned kMostThreads = 1024;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool finished = false;
};

std::vector<float> shared;
std::vector<Thread> threads(kMostThreads);
ucontext_t scheduler;
Barrier block_barrier, warp_barriers[kMostThreads / 32];
float exchanged[kMostThreads];
unsigned progress;              // counts passed barriers and finished threads
bool reversed;                  // which thread runs first
const char* failure = nullptr;  // of the last launch
struct Region {
  const char *begin, *end;
};
std::vector<Region> regions;  // what kernels may read and write

// Called before each access through Pack.
void touch(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) failure = "a misaligned vector";
  const char* const begin = static_cast<const char*>(address);
  const auto inside = [&](const Region& region) { return begin >= region.begin && begin + bytes <= region.end; };
  if (!std::any_of(regions.begin(), regions.end(), inside)) failure = "an access outside of the tensors";
}

void yield() { swapcontext(&threads[threadIdx.x].context, &scheduler); }

void wait(Barrier& barrier, unsigned expected) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++progress;
  }
  while (barrier.generation == generation) yield();
}

void (*body)();

void enter() {
  body();
  threads[threadIdx.x].finished = true;
  ++progress;
  yield();
}

template <typename Arguments>
struct Call {
  static void (*kernel)(Arguments);
  static const Arguments* arguments;
  static void run() { kernel(*arguments); }
};
template <typename Arguments>
void (*Call<Arguments>::kernel)(Arguments) = nullptr;
template <typename Arguments>
const Arguments* Call<Arguments>::arguments = nullptr;

void run_block(unsigned count) {
  std::fill(shared.begin(), shared.end(), NAN);  // what a kernel does not write it must not read
  block_barrier = Barrier{};
  std::fill(std::begin(warp_barriers), std::end(warp_barriers), Barrier{});
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.stack.resize(kStack);
    thread.finished = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  for (unsigned start = progress;; start = progress) {
    unsigned running = 0;
    for (unsigned i = 0; i < count; i += 32) {
      unsigned before;
      do {  // a warp goes on until it waits for another one
        before = progress;
        for (unsigned lane = 0; lane < 32; ++lane) {
          threadIdx.x = reversed ? count - 1 - i - lane : i + lane;
          if (threads[threadIdx.x].finished) continue;
          swapcontext(&scheduler, &threads[threadIdx.x].context);
        }
      } while (progress != before);
      for (unsigned lane = 0; lane < 32; ++lane) running += !threads[reversed ? count - 1 - i - lane : i + lane].finished;
    }
    if (running == 0) return;
    if (progress == start) {
      failure = "threads wait for each other";
      return;
    }
  }
}

struct Launch {
  template <typename Arguments>
  void operator()(void (*kernel)(Arguments), unsigned blocks, unsigned count, size_t bytes, const Arguments& arguments) {
    Call<Arguments>::kernel = kernel;
    Call<Arguments>::arguments = &arguments;
    body = Call<Arguments>::run;
    shared.assign((bytes + 3) / 4 + 4, NAN);
    // Vectors in it are 16 bytes; std::vector aligns at least so.
    regions.push_back({reinterpret_cast<const char*>(shared.data()), reinterpret_cast<const char*>(shared.data()) + bytes});
    blockDim.x = count;
    for (blockIdx.x = 0; blockIdx.x < blocks && failure == nullptr; ++blockIdx.x) run_block(count);
    regions.pop_back();
  }
};

}  // namespace emulation

static void __syncthreads() { emulation::wait(emulation::block_barrier, blockDim.x); }

static float __shfl_xor_sync(unsigned, float value, int offset) {
  emulation::Barrier& warp = emulation::warp_barriers[threadIdx.x / 32];
  emulation::exchanged[threadIdx.x] = value;
  emulation::wait(warp, 32);
  const float other = emulation::exchanged[threadIdx.x ^ static_cast<unsigned>(offset)];
  emulation::wait(warp, 32);
  return other;
}

#include "../../csrc/cuda/guided.h"
#include "../../csrc/cuda/norm.h"

// -- what Python calls -------------------------------------------------------------------------------------------------------

using namespace textok_fast::cuda;

// A tensor: its first number, strides in numbers, and the memory that may be touched. Null where there is none.
struct View {
  void* data;
  int64_t batch, row;
  const char *begin, *end;
};

namespace {

void allow(const View& view) {
  if (view.data != nullptr) emulation::regions.push_back({view.begin, view.end});
}

template <typename T>
Rows<T> rows(const View& view) {
  allow(view);
  return {static_cast<const T*>(view.data), view.batch, view.row};
}

template <typename T>
Samples<T> samples(const View& view) {
  allow(view);
  return {static_cast<const T*>(view.data), view.batch};
}

template <typename T>
T* out(const View& view) {
  allow(view);
  return static_cast<T*>(view.data);
}

void begin(int order) {
  emulation::regions.clear();
  emulation::failure = nullptr;
  emulation::reversed = order != 0;
}

template <typename T>
void forward(const View* v, const int64_t* sizes, float offset, float eps) {
  NormForward<T> p{};
  p.x = rows<T>(v[0]);
  p.branch = rows<T>(v[1]);
  p.gate = samples<T>(v[2]);
  p.shift = samples<T>(v[3]);
  p.scale = samples<T>(v[4]);
  p.residual = out<T>(v[5]);
  p.out = out<T>(v[6]);
  p.batch = static_cast<uint32_t>(sizes[0]);
  p.rows = static_cast<uint32_t>(sizes[1]);
  p.width = static_cast<uint32_t>(sizes[2]);
  p.offset = offset;
  p.eps = eps;
  emulation::Launch launch;
  v[1].data != nullptr ? launch_norm_forward<T, true>(p, launch) : launch_norm_forward<T, false>(p, launch);
}

template <typename T>
void backward(const View* v, const int64_t* sizes, float offset, float eps) {
  NormBackward<T> p{};
  p.grad = rows<T>(v[0]);
  p.x = rows<T>(v[1]);
  p.grad_residual = rows<T>(v[2]);
  p.branch = rows<T>(v[3]);
  p.gate = samples<T>(v[4]);
  p.scale = samples<T>(v[5]);
  p.dx = out<T>(v[6]);
  p.dbranch = out<T>(v[7]);
  for (int i = 0; i < 3; ++i) p.sums[i] = out<T>(v[8 + i]);
  p.batch = static_cast<uint32_t>(sizes[0]);
  p.rows = static_cast<uint32_t>(sizes[1]);
  p.width = static_cast<uint32_t>(sizes[2]);
  p.offset = offset;
  p.eps = eps;
  norm_backward_chunks(p);
  if (sizes[3] > 0) {
    p.chunk_rows = static_cast<uint32_t>(sizes[3]);
    p.chunks = (p.rows + p.chunk_rows - 1) / p.chunk_rows;
  }
  std::vector<float> partial(static_cast<size_t>(p.batch) * p.chunks * p.kinds() * p.width, NAN);
  p.partial = partial.data();
  launch_norm_backward(p, emulation::Launch{});
}

template <typename TO, typename TX>
void step(const View* v, const int64_t* s) {
  GuidedStep<TO, TX> p{};
  p.output = out<TO>(v[0]);
  p.x = out<TX>(v[1]);
  p.noise = out<float>(v[2]);
  p.noise_type = static_cast<NumberType>(s[7]);
  p.table = out<float>(v[3]);
  p.index = out<int64_t>(v[4]);
  p.out = out<TX>(v[5]);
  p.count = s[0];
  p.group = s[1];
  p.guided = s[2];
  p.steps = s[3];
  p.pair = s[4] != 0;
  p.learned = s[5] != 0;
  p.clip = s[6] != 0;
  launch_guided_step(p, emulation::Launch{});
}

}  // namespace

// Each returns null, or what a kernel did that it must not. Types: 0 float32, 1 bfloat16, 2 float16.
extern "C" {

// views: x, branch, gate, shift, scale, residual, out; sizes: B, N, D
const char* emulate_forward(int type, int order, const View* views, const int64_t* sizes, float offset, float eps) {
  begin(order);
  if (type == 0) forward<float>(views, sizes, offset, eps);
  if (type == 1) forward<__nv_bfloat16>(views, sizes, offset, eps);
  return emulation::failure;
}

// views: grad, x, grad_residual, branch, gate, scale, dx, dbranch, dshift, dscale, dgate; sizes: B, N, D, rows a block or 0
const char* emulate_backward(int type, int order, const View* views, const int64_t* sizes, float offset, float eps) {
  begin(order);
  if (type == 0) backward<float>(views, sizes, offset, eps);
  if (type == 1) backward<__nv_bfloat16>(views, sizes, offset, eps);
  return emulation::failure;
}

// views: output, x, noise, table, index, out; sizes: count, group, guided, steps, pair, learned, clip, type of noise
const char* emulate_guided(int output_type, int x_type, const View* views, const int64_t* sizes) {
  begin(0);
  if (output_type == 0 && x_type == 0) step<float, float>(views, sizes);
  if (output_type == 1 && x_type == 0) step<__nv_bfloat16, float>(views, sizes);
  if (output_type == 2 && x_type == 1) step<__half, __nv_bfloat16>(views, sizes);
  return emulation::failure;
}

// Place of number i of x: into result[0] its prediction's in the output, into result[1] its own in the group.
void emulate_place(int64_t i, int64_t group, int learned, int64_t* result) {
  const Place place = place_of(i, group, learned != 0);
  result[0] = place.output;
  result[1] = place.within;
}

// Whether each slot has a column of its own that is the one slot_of() says; for the layouts in use.
int emulate_slots() {
  const auto layout = [](auto vector, auto chunks) {
    constexpr int V = decltype(vector)::value, CHUNKS = decltype(chunks)::value;
    std::vector<int> seen(warp_slots<V, CHUNKS>());
    for (uint32_t k = 0; k < CHUNKS; ++k) {
      for (uint32_t j = 0; j < V; ++j) {
        for (uint32_t lane = 0; lane < 32; ++lane) {
          const uint32_t slot = slot_of<V>(k, j, lane);
          if (slot >= seen.size() || seen[slot]++ || column_of_slot<V>(slot) != warp_column<V>(k, lane) + j) return false;
        }
      }
    }
    return true;
  };
  return layout(Constant<8>{}, Constant<5>{}) && layout(Constant<4>{}, Constant<10>{}) && layout(Constant<1>{}, Constant<8>{});
}

}  // extern "C"
