// Runs the kernels of csrc/cuda/{norm,guided,few_rows}.h on the host, the very source that nvcc compiles, to find mistakes in
// indices, strides, alignment and barriers where there is no GPU. Compiled and called by test_native_cuda.py and
// test_few_rows.py.
//
// A thread of a cluster is a coroutine that gives way at shuffles, products and barriers only. A warp runs as far as it can
// before the next one does, from the first to the last or from the last to the first, as the caller wants: so a missing barrier
// shows. Asynchronous copies arrive, and warpgroups' products are computed, as late as they may, or in the other order of
// threads at once.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define TEXTOK_DYNAMIC_SHARED(name) float* const name = emulation::own_shared()

struct Dim {
  unsigned x, y, z;
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
constexpr unsigned kMostThreads = 8 * 1024;  // of a cluster

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
  unsigned group;
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  std::vector<Copy> copies;  // that have not arrived
  unsigned group = 0;
  std::vector<std::pair<unsigned, std::function<void()>>> products;  // of warpgroups, by group
  unsigned product_group = 0;
  bool finished = false;
};

// Fragments of a thread, as tile.h has them.
struct Factors {
  uint32_t a[4], b[2];
};

unsigned cluster_blocks, first_block;    // of the running cluster, along x
std::vector<std::vector<float>> shared;  // of each of its blocks
std::vector<Thread> threads(kMostThreads);
unsigned current;  // thread of the cluster
ucontext_t scheduler;
Barrier cluster_barrier, block_barriers[8], warp_barriers[kMostThreads / 32];
float exchanged[kMostThreads];
Factors factors[kMostThreads];
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

// Aligned as on a GPU.
float* aligned(std::vector<float>& memory) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 1023) / 1024 * 1024);
}

float* own_shared() { return aligned(shared[current / blockDim.x]); }

void yield() { swapcontext(&threads[current].context, &scheduler); }

void resume(unsigned thread) {
  current = thread;
  threadIdx.x = thread % blockDim.x;
  blockIdx.x = first_block + thread / blockDim.x;
  swapcontext(&scheduler, &threads[thread].context);
}

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
  if (!threads[current].copies.empty() || !threads[current].products.empty()) failure = "a thread ends before its copies";
  threads[current].finished = true;
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

void run_cluster(unsigned count) {
  for (auto& each : shared) std::fill(each.begin(), each.end(), NAN);  // what a kernel does not write it must not read
  cluster_barrier = Barrier{};
  std::fill(std::begin(block_barriers), std::end(block_barriers), Barrier{});
  std::fill(std::begin(warp_barriers), std::end(warp_barriers), Barrier{});
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.stack.resize(kStack);
    thread.copies.clear();
    thread.group = 0;
    thread.products.clear();
    thread.product_group = 0;
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
          const unsigned thread = reversed ? count - 1 - i - lane : i + lane;
          if (!threads[thread].finished) resume(thread);
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
    struct {
      unsigned x, y, z, cluster;
    } grid{blocks, 1, 1, 1};
    (*this)(kernel, grid, count, bytes, arguments);
  }

  template <typename Arguments, typename Grid>
  void operator()(void (*kernel)(Arguments), const Grid& grid, unsigned count, size_t bytes, const Arguments& arguments) {
    const unsigned cluster = grid.cluster;
    Call<Arguments>::kernel = kernel;
    Call<Arguments>::arguments = &arguments;
    body = Call<Arguments>::run;
    cluster_blocks = cluster;
    shared.resize(cluster);
    for (auto& each : shared) {
      each.assign((bytes + 3) / 4 + 256, NAN);
      regions.push_back({reinterpret_cast<const char*>(aligned(each)), reinterpret_cast<const char*>(aligned(each)) + bytes});
    }
    blockDim.x = count;
    if (grid.x % cluster != 0) failure = "clusters that are not whole";
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
        for (first_block = 0; first_block < grid.x && failure == nullptr; first_block += cluster) run_cluster(count * cluster);
      }
    }
    regions.resize(regions.size() - cluster);
  }
};

// -- what csrc/cuda/tile.h is made of ----------------------------------------------------------------------------------------

void perform(const Copy& copy) {
  touch(copy.to, 16);
  touch(copy.from, 16);
  if (failure != nullptr) return;
  copy.valid ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

void copy_async(void* to, const void* from, bool valid) {
  Thread& thread = threads[current];
  thread.copies.push_back({to, from, valid, thread.group});
  if (reversed) perform(thread.copies.back());
}

void commit_copies() { ++threads[current].group; }

void wait_for_copies(unsigned but) {
  Thread& thread = threads[current];
  while (!thread.copies.empty() && thread.copies.front().group + but < thread.group) {
    if (!reversed) perform(thread.copies.front());
    thread.copies.erase(thread.copies.begin());
  }
}

void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  Barrier& warp = warp_barriers[current / 32];
  std::copy(std::begin(a), std::end(a), factors[current].a);
  std::copy(b, b + 2, factors[current].b);
  wait(warp, 32);
  const auto number = [](uint32_t word, unsigned half) {
    return __bfloat162float({static_cast<uint16_t>(half ? word >> 16 : word)});
  };
  const unsigned first = current / 32 * 32, g = current % 32 / 4, t = current % 4;
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned k = 0; k < 16; ++k) {
      const Factors& row = factors[first + g * 4 + k % 8 / 2];
      const Factors& column = factors[first + (2 * t + i % 2) * 4 + k % 8 / 2];
      c[i] += number(row.a[k / 8 * 2 + i / 2], k % 2) * number(column.b[k / 8], k % 2);
    }
  }
  wait(warp, 32);
}

const void* rows_of_matrices[kMostThreads];

void load_matrices(uint32_t (&words)[4], const void* row) {
  Barrier& warp = warp_barriers[current / 32];
  touch(row, 16);
  rows_of_matrices[current] = row;
  wait(warp, 32);
  const unsigned first = current / 32 * 32;
  for (unsigned i = 0; i < 4 && failure == nullptr; ++i) {
    words[i] = static_cast<const uint32_t*>(rows_of_matrices[first + i * 8 + current % 32 / 4])[current % 4];
  }
  wait(warp, 32);
}

template <int NT>
void multiply_now(float (&c)[NT][4], uint64_t a, uint64_t b) {
  const auto number = [](uint64_t rows, unsigned row, unsigned k) {
    // bits 4 and 5 of the address are flipped by bits 7 and 8, where a multiple of 512 is counted from
    const uint64_t place = rows + row * 64 + k * 2, address = place ^ (place >> 7 & 3) << 4;
    touch(reinterpret_cast<const void*>(address), 2);
    return failure == nullptr ? __bfloat162float({*reinterpret_cast<const uint16_t*>(address)}) : 0.0f;
  };
  if ((a & 511) > 63 || (b & 511) > 63) failure = "a factor that is not aligned";
  const unsigned lane = current % 32, first = current / 32 % 4 * 16 + lane / 4, t = lane % 4;
  for (unsigned n = 0; n < NT; ++n) {
    for (unsigned i = 0; i < 4; ++i) {
      for (unsigned k = 0; k < 16; ++k) c[n][i] += number(a, first + i / 2 * 8, k) * number(b, n * 8 + 2 * t + i % 2, k);
    }
  }
}

template <int NT>
void multiply_by_group(float (&c)[NT][4], uint64_t a, uint64_t b) {
  if (reversed) return multiply_now(c, a, b);
  Thread& thread = threads[current];
  thread.products.emplace_back(thread.product_group, [&c, a, b] { multiply_now(c, a, b); });
}

void commit_group_products() { ++threads[current].product_group; }

void wait_for_group_products(unsigned but) {
  Thread& thread = threads[current];
  while (!thread.products.empty() && thread.products.front().first + but < thread.product_group) {
    thread.products.front().second();
    thread.products.erase(thread.products.begin());
  }
}

// The halves of the barrier: what each thread has arrived at.
unsigned arrived_at[kMostThreads];

template <bool release>
void cluster_arrive() {
  arrived_at[current] = cluster_barrier.generation;
  if (++cluster_barrier.arrived == cluster_blocks * blockDim.x) {
    cluster_barrier.arrived = 0;
    ++cluster_barrier.generation;
    ++progress;
  }
}

void cluster_wait() {
  while (cluster_barrier.generation == arrived_at[current]) yield();
}

template <typename Four>
Four load_from_rank(const Four* address, unsigned rank) {
  if (rank >= cluster_blocks) {
    failure = "a block outside of the cluster";
    return *address;
  }
  for (unsigned thread = 0; thread < blockDim.x; ++thread) {
    if (threads[rank * blockDim.x + thread].finished) failure = "shared memory of a block that has ended";
  }
  const Four* const there =
      reinterpret_cast<const Four*>(aligned(shared[rank]) + (reinterpret_cast<const float*>(address) - own_shared()));
  touch(there, sizeof(Four));
  return *there;
}

}  // namespace emulation

static void __syncthreads() { emulation::wait(emulation::block_barriers[emulation::current / blockDim.x], blockDim.x); }

static float __shfl_xor_sync(unsigned, float value, int offset) {
  emulation::Barrier& warp = emulation::warp_barriers[emulation::current / 32];
  emulation::exchanged[emulation::current] = value;
  emulation::wait(warp, 32);
  const float other = emulation::exchanged[emulation::current ^ static_cast<unsigned>(offset)];
  emulation::wait(warp, 32);
  return other;
}

#include "../../csrc/cuda/few_rows.h"
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

template <typename T>
void rows_norm(const View* v, const int64_t* s, float eps) {
  RowsNorm<T> p{};
  p.x = out<T>(v[0]);
  p.partial = out<float>(v[1]);
  p.bias = out<__nv_bfloat16>(v[2]);
  p.gate = out<__nv_bfloat16>(v[3]);
  p.shift = out<__nv_bfloat16>(v[4]);
  p.scale = out<__nv_bfloat16>(v[5]);
  p.gate_stride = v[3].batch;
  p.shift_stride = v[4].batch;
  p.scale_stride = v[5].batch;
  p.residual = out<T>(v[6]);
  p.out = out<__nv_bfloat16>(v[7]);
  p.rows = static_cast<uint32_t>(s[0] * s[1]);
  p.tokens = static_cast<uint32_t>(s[1]);
  p.width = static_cast<uint32_t>(s[2]);
  p.splits = static_cast<uint32_t>(s[3]);
  p.eps = eps;
  launch_rows_norm(p, emulation::Launch{});
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

// views: x, weight, bias, out, partial; sizes: M, K, N, columns, cluster, splits, activation, warpgroups
const char* emulate_rows_product(int order, const View* v, const int64_t* s) {
  begin(order);
  RowsProduct p{};
  p.x = out<__nv_bfloat16>(v[0]);
  p.weight = out<__nv_bfloat16>(v[1]);
  p.bias = out<__nv_bfloat16>(v[2]);
  p.out = out<__nv_bfloat16>(v[3]);
  p.partial = out<float>(v[4]);
  p.rows = static_cast<uint32_t>(s[0]);
  p.inputs = static_cast<uint32_t>(s[1]);
  p.outputs = static_cast<uint32_t>(s[2]);
  p.activation = static_cast<Activation>(s[6]);
  const RowsPlan plan{static_cast<uint32_t>(s[3]), static_cast<uint32_t>(s[4]), static_cast<uint32_t>(s[5]), s[7] != 0};
  launch_rows_product(p, plan, emulation::Launch{});
  return emulation::failure;
}

// views: qkv, out; sizes: B, N, H, d
const char* emulate_rows_attention(int order, const View* v, const int64_t* s) {
  begin(order);
  RowsAttention p{};
  p.qkv = out<__nv_bfloat16>(v[0]);
  p.out = out<__nv_bfloat16>(v[1]);
  p.batch = static_cast<uint32_t>(s[0]);
  p.tokens = static_cast<uint32_t>(s[1]);
  p.heads = static_cast<uint32_t>(s[2]);
  p.width = static_cast<uint32_t>(s[3]);
  p.scale = attention_scale(p.width);
  launch_rows_attention(p, emulation::Launch{});
  return emulation::failure;
}

// views: x, partial, bias, gate, shift, scale, residual, out; sizes: B, N, D, splits
const char* emulate_rows_norm(int type, int order, const View* views, const int64_t* sizes, float eps) {
  begin(order);
  type == 0 ? rows_norm<float>(views, sizes, eps) : rows_norm<__nv_bfloat16>(views, sizes, eps);
  return emulation::failure;
}

// Into result: columns, cluster and splits; given what the caller wants of them, or 0.
void plan_rows(int64_t rows, int64_t inputs, int64_t outputs, int partial, int groups, int processors, int64_t* result) {
  const RowsPlan given{
      static_cast<uint32_t>(result[0]), static_cast<uint32_t>(result[1]), static_cast<uint32_t>(result[2]), groups != 0};
  const RowsPlan plan = plan_rows_product(
      static_cast<uint32_t>(rows), static_cast<uint32_t>(inputs), static_cast<uint32_t>(outputs), partial != 0,
      static_cast<uint32_t>(processors), given);
  result[0] = plan.columns;
  result[1] = plan.cluster;
  result[2] = plan.splits;
}

}  // extern "C"
