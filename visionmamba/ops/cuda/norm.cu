// RMSNorm with the residual add on NVIDIA GPUs from sm_80 on, forward and backward; activations float32, bfloat16 or
// float16, the residual stream float32 or like the activations, arithmetic float32.
//
// Width 192, bfloat16 beside a float32 residual; us (GB/s, share of the 4.28 TB/s that a copy reaches), medians of CUDA
// graph replays over inputs beyond the L2 cache, the same by PyTorch operations behind; H200, driver 580.159.04, torch
// 2.11.0+cu130, 2026-11-23. add_rms_norm and add_rms_norm_backward of norm.py remake it.
//   (B, L)      forward             PyTorch   backward            PyTorch
//   (8, 6085)   31.0 (3617, 85 %)       169   41.3 (3625, 85 %)       420
//   (64, 197)    9.7 (3010, 70 %)        48   13.6 (2840, 66 %)       120
//   (1, 6085)    5.8 (2428, 57 %)        32    8.4 (2214, 52 %)        73
//   (1, 197)     1.4                     15    2.8                     31
//
// Plan. 16 or 32 lanes own a row and keep it in registers, 4 neighbouring columns a read; one round of shuffles for the
// mean square, in the backward for it and the mean of the product with the gradient together. Blocks walk over the
// rows, so a lane adds up its columns of the weight's gradient; a block's sums are one row of partials, which a second
// kernel adds in the order of the blocks. Rows wider than 768 or not in whole fours are read twice, one column a lane.
// Bytes a column and row beside a float32 residual: forward 2 + 4 read, 2 + 4 written; backward 2 + 4 + 4 and 2 + 4.

constexpr int THREADS = 256;

struct Norm {
  const char *x, *residual;  // residual may be null
  const float *weight;
  char *normed, *total;  // total may be null, or the residual's memory
  i64 rows;
  int width;
  float eps;
};
struct NormBackward {
  const char *dnormed, *dtotal, *total;  // the first two may be null: zero
  const float *weight;
  char *dx, *dresidual;  // the same values; dresidual may be null
  float *partials;       // rows of width
  i64 rows;
  int width;
  float eps;
};
struct Sum {
  const float *partials;
  float *out;
  int rows, width;
};

template <class T>
struct alignas(2 * T::PAIR_BYTES) Quad {
  typename T::Pair v[2];
};
template <class T>
__device__ __forceinline__ void load(float (&v)[4], const char *row, int quad, bool valid) {
  Quad<T> q = {};
  if (valid) q = ((const Quad<T> *)row)[quad];
  v[0] = T::first(q.v[0]), v[1] = T::second(q.v[0]), v[2] = T::first(q.v[1]), v[3] = T::second(q.v[1]);
}
template <class T>
__device__ __forceinline__ void store(const float (&v)[4], char *row, int quad, bool valid) {
  Quad<T> q;
  q.v[0] = T::pack(v[0], v[1]), q.v[1] = T::pack(v[2], v[3]);
  if (valid) ((Quad<T> *)row)[quad] = q;
}
template <class T>
__device__ __forceinline__ float load_one(const char *row, int column) {
  if constexpr (T::EXACT)
    return ((const float *)row)[column];
  else
    return T::first(((const unsigned short *)row)[column]);
}
template <class T>
__device__ __forceinline__ void store_one(float v, char *row, int column) {
  if constexpr (T::EXACT)
    ((float *)row)[column] = v;
  else
    ((unsigned short *)row)[column] = (unsigned short)T::pack(v, 0.f);
}
template <class T>
__device__ __forceinline__ i64 offset(i64 row, int width) {
  return row * width * (T::PAIR_BYTES / 2);
}
template <int LANES>
__device__ __forceinline__ float sum_over_lanes(float v) {
#pragma unroll
  for (int o = LANES / 2; o > 0; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

template <class X, class R, int LANES, int QUADS>
__device__ __forceinline__ void norm_forward(const Norm &p) {
  constexpr int ROWS = THREADS / LANES;
  const int lane = threadIdx.x % LANES, quads = p.width / 4;
  const float per_column = 1.f / p.width;
  wait_for_kernel_before();
  let_next_kernel_start();
  float weight[QUADS][4];
#pragma unroll
  for (int i = 0; i < QUADS; i++) load<Fp32>(weight[i], (const char *)p.weight, lane + i * LANES, lane + i * LANES < quads);
#pragma unroll 1
  for (i64 first = (i64)blockIdx.x * ROWS; first < p.rows; first += (i64)gridDim.x * ROWS) {
    const i64 row = first + threadIdx.x / LANES;
    const bool valid = row < p.rows;
    const i64 x_at = offset<X>(row, p.width), at = offset<R>(row, p.width);
    float x[QUADS][4], residual[QUADS][4], squares = 0.f;
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
      const int quad = lane + i * LANES;
      load<X>(x[i], p.x + x_at, quad, valid && quad < quads);
      load<R>(residual[i], p.residual + at, quad, valid && quad < quads && p.residual != nullptr);
    }
#pragma unroll
    for (int i = 0; i < QUADS; i++)
#pragma unroll
      for (int c = 0; c < 4; c++) x[i][c] += residual[i][c], squares = fmaf(x[i][c], x[i][c], squares);
    const float scale = rsqrtf(fmaf(sum_over_lanes<LANES>(squares), per_column, p.eps));
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
      const int quad = lane + i * LANES;
      const bool in_row = valid && quad < quads;
      store<R>(x[i], p.total + at, quad, in_row && p.total != nullptr);
#pragma unroll
      for (int c = 0; c < 4; c++) x[i][c] *= scale * weight[i][c];
      store<X>(x[i], p.normed + x_at, quad, in_row);
    }
  }
}

template <class X, class R>
__device__ __forceinline__ void norm_forward_any(const Norm &p) {
  const int lane = threadIdx.x % 32;
  wait_for_kernel_before();
  let_next_kernel_start();
  const i64 row = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (row >= p.rows) return;
  const char *const x = p.x + offset<X>(row, p.width);
  const i64 at = offset<R>(row, p.width);
  const auto value = [&](int c) {
    return load_one<X>(x, c) + (p.residual == nullptr ? 0.f : load_one<R>(p.residual + at, c));
  };
  float squares = 0.f;
  for (int c = lane; c < p.width; c += 32) {
    const float v = value(c);
    squares = fmaf(v, v, squares);
  }
  const float scale = rsqrtf(fmaf(sum_over_lanes<32>(squares), 1.f / p.width, p.eps));
  for (int c = lane; c < p.width; c += 32) {
    const float v = value(c);
    if (p.total != nullptr) store_one<R>(v, p.total + at, c);
    store_one<X>(v * (scale * p.weight[c]), p.normed + offset<X>(row, p.width), c);
  }
}

template <class X, class R, int LANES, int QUADS>
__device__ __forceinline__ void norm_backward(const NormBackward &p) {
  constexpr int ROWS = THREADS / LANES, WIDTH = 4 * LANES * QUADS;
  __shared__ float4 sums[ROWS][WIDTH / 4];
  const int lane = threadIdx.x % LANES, quads = p.width / 4;
  const float per_column = 1.f / p.width;
  wait_for_kernel_before();
  let_next_kernel_start();
  float weight[QUADS][4], dweight[QUADS][4];
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    load<Fp32>(weight[i], (const char *)p.weight, lane + i * LANES, lane + i * LANES < quads);
#pragma unroll
    for (int c = 0; c < 4; c++) dweight[i][c] = 0.f;
  }
#pragma unroll 1
  for (i64 first = (i64)blockIdx.x * ROWS; first < p.rows; first += (i64)gridDim.x * ROWS) {
    const i64 row = first + threadIdx.x / LANES;
    const bool valid = row < p.rows;
    const i64 x_at = offset<X>(row, p.width), at = offset<R>(row, p.width);
    float total[QUADS][4], dnormed[QUADS][4], dtotal[QUADS][4], squares = 0.f, product = 0.f;
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
      const int quad = lane + i * LANES;
      const bool in_row = valid && quad < quads;
      load<R>(total[i], p.total + at, quad, in_row);
      load<X>(dnormed[i], p.dnormed + x_at, quad, in_row && p.dnormed != nullptr);
      load<R>(dtotal[i], p.dtotal + at, quad, in_row && p.dtotal != nullptr);
    }
#pragma unroll
    for (int i = 0; i < QUADS; i++)
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const float v = total[i][c];
        squares = fmaf(v, v, squares), product = fmaf(dnormed[i][c] * weight[i][c], v, product);
      }
    squares = sum_over_lanes<LANES>(squares), product = sum_over_lanes<LANES>(product);
    const float scale = rsqrtf(fmaf(squares, per_column, p.eps)), pull = product * per_column * scale * scale;
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
      const int quad = lane + i * LANES;
      const bool in_row = valid && quad < quads;
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const float d = dnormed[i][c], v = total[i][c];
        dweight[i][c] = fmaf(d * v, scale, dweight[i][c]);
        dtotal[i][c] = fmaf(scale, d * weight[i][c] - v * pull, dtotal[i][c]);
      }
      store<X>(dtotal[i], p.dx + x_at, quad, in_row);
      store<R>(dtotal[i], p.dresidual + at, quad, in_row && p.dresidual != nullptr);
    }
  }
#pragma unroll
  for (int i = 0; i < QUADS; i++)
    sums[threadIdx.x / LANES][lane + i * LANES] = make_float4(dweight[i][0], dweight[i][1], dweight[i][2], dweight[i][3]);
  __syncthreads();
  for (int c = threadIdx.x; c < p.width; c += THREADS) {
    float sum = 0.f;
#pragma unroll
    for (int r = 0; r < ROWS; r++) sum += ((const float *)sums[r])[c];
    p.partials[(i64)blockIdx.x * p.width + c] = sum;
  }
}

// One row of partials a warp: a lane alone reads and writes its columns there.
template <class X, class R>
__device__ __forceinline__ void norm_backward_any(const NormBackward &p) {
  constexpr int WARPS = THREADS / 32;
  const int lane = threadIdx.x % 32;
  const i64 unit = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
  wait_for_kernel_before();
  let_next_kernel_start();
  float *const dweight = p.partials + unit * p.width;
  for (int c = lane; c < p.width; c += 32) dweight[c] = 0.f;
  for (i64 row = unit; row < p.rows; row += (i64)gridDim.x * WARPS) {
    const i64 x_at = offset<X>(row, p.width), at = offset<R>(row, p.width);
    const auto gradient = [&](int c) { return p.dnormed == nullptr ? 0.f : load_one<X>(p.dnormed + x_at, c); };
    float squares = 0.f, product = 0.f;
    for (int c = lane; c < p.width; c += 32) {
      const float v = load_one<R>(p.total + at, c);
      squares = fmaf(v, v, squares), product = fmaf(gradient(c) * p.weight[c], v, product);
    }
    squares = sum_over_lanes<32>(squares), product = sum_over_lanes<32>(product);
    const float scale = rsqrtf(fmaf(squares, 1.f / p.width, p.eps)), pull = product / p.width * scale * scale;
    for (int c = lane; c < p.width; c += 32) {
      const float d = gradient(c), v = load_one<R>(p.total + at, c);
      const float outer = p.dtotal == nullptr ? 0.f : load_one<R>(p.dtotal + at, c);
      const float dv = fmaf(scale, d * p.weight[c] - v * pull, outer);
      dweight[c] = fmaf(d * v, scale, dweight[c]);
      store_one<X>(dv, p.dx + x_at, c);
      if (p.dresidual != nullptr) store_one<R>(dv, p.dresidual + at, c);
    }
  }
}

// 32 columns a block; always the same order of additions.
extern "C" __global__ void __launch_bounds__(1024) norm_sum_kernel(const __grid_constant__ Sum p) {
  __shared__ float sums[32][33];
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  wait_for_kernel_before();
  let_next_kernel_start();
  float sum = 0.f;
  if (column < p.width)
#pragma unroll 4
    for (int r = part; r < p.rows; r += 32) sum += p.partials[(i64)r * p.width + column];
  sums[part][lane] = sum;
  __syncthreads();
  sum = sum_over_lanes<32>(sums[lane][part]);
  if (lane == 0 && blockIdx.x * 32 + part < p.width) p.out[blockIdx.x * 32 + part] = sum;
}

#define KERNELS(NAME, X, R, SIZE, LANES, QUADS)                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
      norm_forward_kernel_##NAME##_##SIZE(const __grid_constant__ Norm p) {                                         \
    norm_forward<X, R, LANES, QUADS>(p);                                                                            \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
      norm_backward_kernel_##NAME##_##SIZE(const __grid_constant__ NormBackward p) {                                \
    norm_backward<X, R, LANES, QUADS>(p);                                                                           \
  }
#define ALL(NAME, X, R)                                                                                             \
  KERNELS(NAME, X, R, 192, 16, 3)                                                                                   \
  KERNELS(NAME, X, R, 384, 32, 3)                                                                                   \
  KERNELS(NAME, X, R, 768, 32, 6)                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
      norm_forward_kernel_##NAME##_any(const __grid_constant__ Norm p) {                                            \
    norm_forward_any<X, R>(p);                                                                                      \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
      norm_backward_kernel_##NAME##_any(const __grid_constant__ NormBackward p) {                                   \
    norm_backward_any<X, R>(p);                                                                                     \
  }
ALL(bfloat16_float32, Bf16, Fp32)
ALL(float16_float32, Fp16, Fp32)
ALL(float32_float32, Fp32, Fp32)
ALL(bfloat16_bfloat16, Bf16, Bf16)
ALL(float16_float16, Fp16, Fp16)
