// Depthwise convolution over the tokens with SiLU on NVIDIA GPUs from sm_80 on, in one direction or in both from one
// read of x, forward and backward; activations float32, bfloat16 or float16, arithmetic float32.
//
// 384 channels, 4 taps, SiLU, both directions, bfloat16; us (GB/s, share of the 4.28 TB/s that a copy reaches), medians of
// CUDA graph replays over inputs beyond the L2 cache, the same by PyTorch operations behind; H200, driver 580.159.04, torch
// 2.11.0+cu130, 2026-11-23. conv_forward and conv_backward of conv.py remake it. Forward, two bytes of three are written,
// about 2 TB/s in every variant (a plain fill of them reaches 3.0); backward is bound by the issue of its 52 instructions a channel.
//   (B, L)      forward             PyTorch   backward            PyTorch
//   (8, 6085)   37.5 (2991, 70 %)      1289   57.7 (2590, 61 %)      4151
//   (64, 197)   12.1 (2405, 56 %)       332   23.7 (1635, 38 %)      1140
//   (1, 6085)    7.2 (1941, 45 %)       168   16.5 (1131, 26 %)       570
//   (1, 197)     3.0                     46    8.1                    167
//
// Plan. A warp walks over a run of tokens with 4 neighbouring channels a lane (2 in the general kernels, which take any
// even width, up to 8 taps and no activation). The tokens that the taps reach are kept in registers, so x is read once
// but for the ends of the runs, which come from the caches.
// Backward: at step s the gradient before SiLU is made for token s of the forward direction and token s - K + 1 of the
// reversed one; both need the same K tokens of x, s - K + 1 .. s, and together they finish dx at token s - K + 1. So x and
// both incoming gradients are read once, dx is written once. A lane adds up the gradients of its weights; a block's
// sums are one row of partials, which a second kernel adds in the order of the blocks. What a group of tokens reads comes
// by cp.async one group ahead.
// Bytes a channel and token in bfloat16, both directions: forward 2 read, 4 written; backward 6 read, 2 written.

constexpr int WARPS = 4;

struct Convolution {
  const char *x;
  const float *weight[2], *bias[2];  // (channels, taps), (channels) or null
  char *y[2];                        // contiguous, like dy
  const char *dy[2];
  char *dx;
  float *partials;      // rows of [dweight (directions, channels, taps) | dbias (directions, channels)]
  i64 x_batch, dx_batch;  // strides in bytes
  int x_token, dx_token;
  int batch, length, channels, taps, silu;
  int reverse;    // with one direction only; of two the second is reversed
  int run, runs;  // tokens of a warp, and how often they fit into the length
  int columns;    // how often a warp's channels fit into all
};
struct Sum {
  const float *partials;
  float *dweight, *dbias;
  int rows, num_weights, num_biases;
};

template <class T, int PAIRS>
struct alignas(T::PAIR_BYTES *PAIRS) Pack {
  typename T::Pair v[PAIRS];
  __device__ __forceinline__ float get(int c) const { return c % 2 ? T::second(v[c / 2]) : T::first(v[c / 2]); }
};

// Weights and sums are kept in units that make SiLU short: v / 2 for silu(v) = v / 2 (1 + tanh(v / 2)), whose tanh is right
// to 2^-11, or v UNIT, so that exp(-v) is a bare ex2.
constexpr float UNIT = -LOG2E;

__device__ __forceinline__ float tanh_near(float v) {
  float r;
  asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// Return sigmoid(v) / UNIT of v UNIT.
__device__ __forceinline__ float opening(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(fmaf(UNIT, ex2(v), UNIT)));
  return r;
}

// Where a warp's run is. A reversed direction alone counts its tokens from the end.
template <class T, int PAIRS>
struct Run {
  static constexpr int CHANNELS = 2 * PAIRS;
  int batch, start, stop, channel;
  __device__ __forceinline__ Run(const Convolution &p) {
    const int group = blockIdx.x / p.columns, column = blockIdx.x - group * p.columns;
    const int unit = group * WARPS + threadIdx.x / 32;
    channel = (column * 32 + threadIdx.x % 32) * CHANNELS;
    batch = unit / p.runs;
    start = (unit - batch * p.runs) * p.run;
    stop = batch < p.batch && channel < p.channels ? min(start + p.run, p.length) : start;
  }
};

// Whether a group of tokens lies whole inside the run and the sequence, so that nothing is to be checked.
struct Inside {
  static constexpr bool VALUE = true;
};
struct AtEdge {
  static constexpr bool VALUE = false;
};

// One tensor's tokens at a lane's channels.
template <class T, int PAIRS, class Pointer>
struct Tokens {
  Pointer first;
  int step, length;
  __device__ __forceinline__ Tokens(Pointer p, const Run<T, PAIRS> &at, i64 batch, int token, int length, int reverse)
      : first(p + at.batch * batch + at.channel * (T::PAIR_BYTES / 2) + (reverse ? (i64)(length - 1) * token : 0)),
        step(reverse ? -token : token),
        length(length) {}
  template <bool INSIDE = false>
  __device__ __forceinline__ Pack<T, PAIRS> load(int t) const {  // zeros outside
    if (INSIDE) return *(const Pack<T, PAIRS> *)(first + (i64)t * step);
    Pack<T, PAIRS> r = {};
    if (t >= 0 && t < length) r = *(const Pack<T, PAIRS> *)(first + (i64)t * step);
    return r;
  }
  __device__ __forceinline__ void fetch(Pack<T, PAIRS> *to, int t) const {  // asynchronously; zeros outside
    constexpr int BYTES = sizeof(Pack<T, PAIRS>);
    const u32 at = (u32)__cvta_generic_to_shared(to), bytes = t >= 0 && t < length ? BYTES : 0;
    const char *const from = first + (i64)t * step;
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(at), "l"(from), "r"(bytes), "n"(BYTES) : "memory");
  }
  __device__ __forceinline__ void store(int t, const float (&v)[2 * PAIRS]) const {
    Pack<T, PAIRS> r;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) r.v[i] = T::pack(v[2 * i], v[2 * i + 1]);
    *(Pack<T, PAIRS> *)(first + (i64)t * step) = r;
  }
};

template <class T, int TAPS, int PAIRS>
struct Weights {
  static constexpr int CHANNELS = 2 * PAIRS;
  float tap[TAPS][CHANNELS], bias[CHANNELS];
  __device__ __forceinline__ Weights(const Convolution &p, int direction, int channel, float unit) {
    const float *const weight = p.weight[direction], *const b = p.bias[direction];
    const bool valid = channel < p.channels;
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
      bias[c] = valid && b != nullptr ? unit * b[channel + c] : 0.f;
      if (TAPS == 4 && p.taps == 4) {
        const float4 row = valid ? ((const float4 *)weight)[channel + c] : make_float4(0.f, 0.f, 0.f, 0.f);
        tap[0][c] = unit * row.x, tap[1][c] = unit * row.y, tap[2][c] = unit * row.z, tap[3][c] = unit * row.w;
        continue;
      }
#pragma unroll
      for (int k = 0; k < TAPS; k++) {  // fewer taps: zeros for the farthest
        const int given = k - (TAPS - p.taps);
        tap[k][c] = valid && given >= 0 ? unit * weight[(channel + c) * p.taps + given] : 0.f;
      }
    }
  }
};

template <class T, int TAPS, int PAIRS, int DIRECTIONS, bool QUICK>
__device__ __forceinline__ void conv_forward(const Convolution &p) {
  constexpr int CHANNELS = 2 * PAIRS, REACH = TAPS - 1, AHEAD = DIRECTIONS == 2 ? REACH : 0, STEP = 4;
  wait_for_kernel_before();
  let_next_kernel_start();
  const Run<T, PAIRS> at(p);
  if (at.start >= at.stop) return;
  const int token = p.channels * (T::PAIR_BYTES / 2);
  const i64 sequence = (i64)token * p.length;
  const Tokens<T, PAIRS, const char *> x(p.x, at, p.x_batch, p.x_token, p.length, p.reverse);
  const Tokens<T, PAIRS, char *> y[2] = {{p.y[0], at, sequence, token, p.length, p.reverse},
                                         {p.y[DIRECTIONS - 1], at, sequence, token, p.length, p.reverse}};
  Pack<T, PAIRS> window[REACH + AHEAD + STEP], next[STEP];  // tokens t - REACH .. t + AHEAD + STEP - 1
#pragma unroll
  for (int j = 0; j < REACH + AHEAD; j++) window[j] = x.load(at.start - REACH + j);
#pragma unroll
  for (int j = 0; j < STEP; j++) next[j] = x.load(at.start + AHEAD + j);
  const float unit = !QUICK && !p.silu ? 1.f : T::EXACT ? UNIT : 0.5f;
  const Weights<T, TAPS, PAIRS> weights[2] = {{p, 0, at.channel, unit}, {p, DIRECTIONS - 1, at.channel, unit}};
  int t = at.start;
  const auto group = [&](auto place) {
    constexpr bool INSIDE = decltype(place)::VALUE;
#pragma unroll
    for (int j = 0; j < STEP; j++) window[REACH + AHEAD + j] = next[j];
    if (INSIDE || t + STEP < at.stop) {
#pragma unroll
      for (int j = 0; j < STEP; j++) next[j] = x.template load<INSIDE>(t + STEP + AHEAD + j);
    }
#pragma unroll
    for (int d = 0; d < DIRECTIONS; d++)
#pragma unroll
      for (int i = 0; i < STEP; i++) {
        float sum[CHANNELS];
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) {
          sum[c] = weights[d].bias[c];
#pragma unroll
          for (int k = 0; k < TAPS; k++)
            sum[c] = fmaf(weights[d].tap[k][c], window[d == 0 ? i + k : i + 2 * REACH - k].get(c), sum[c]);
          if (QUICK || p.silu)
            sum[c] = T::EXACT ? sum[c] * opening(sum[c]) : fmaf(sum[c], tanh_near(sum[c]), sum[c]);
        }
        if (INSIDE || t + i < at.stop) y[d].store(t + i, sum);
      }
#pragma unroll
    for (int j = 0; j < REACH + AHEAD; j++) window[j] = window[j + STEP];
    t += STEP;
  };
#pragma unroll 1
  while (t < at.stop) {
    if (QUICK && t + STEP <= at.stop && t + 2 * STEP + AHEAD <= p.length)
      group(Inside());
    else
      group(AtEdge());
  }
}

template <class T, int TAPS, int PAIRS, int DIRECTIONS, bool QUICK>
__device__ __forceinline__ void conv_backward(const Convolution &p) {
  constexpr int CHANNELS = 2 * PAIRS, REACH = TAPS - 1;
  constexpr int SUMS = DIRECTIONS * (TAPS + 1);
  __shared__ union {
    Pack<T, PAIRS> fetched[2][1 + DIRECTIONS][TAPS][32 * WARPS];  // x and dy of a group and of the next, a lane its own
    float sums[WARPS][SUMS][CHANNELS][32];
  } shared;
  wait_for_kernel_before();
  let_next_kernel_start();
  const Run<T, PAIRS> at(p);
  const int token = p.channels * (T::PAIR_BYTES / 2);
  const i64 sequence = (i64)token * p.length;
  const Tokens<T, PAIRS, const char *> x(p.x, at, p.x_batch, p.x_token, p.length, p.reverse);
  const Tokens<T, PAIRS, char *> dx(p.dx, at, p.dx_batch, p.dx_token, p.length, p.reverse);
  const Tokens<T, PAIRS, const char *> dy[2] = {{p.dy[0], at, sequence, token, p.length, p.reverse},
                                                {p.dy[DIRECTIONS - 1], at, sequence, token, p.length, p.reverse}};
  const float unit = QUICK || p.silu ? UNIT : 1.f;
  const Weights<T, TAPS, PAIRS> weights[2] = {{p, 0, at.channel, unit}, {p, DIRECTIONS - 1, at.channel, unit}};
  // the last TAPS tokens of x and of the gradients before SiLU, token s at s % TAPS counted from the run's start
  float values[TAPS][CHANNELS], inner[2][TAPS][CHANNELS], dtap[DIRECTIONS][TAPS][CHANNELS], dbias[DIRECTIONS][CHANNELS];
#pragma unroll
  for (int j = 0; j < TAPS; j++)
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
      inner[0][j][c] = inner[1][j][c] = 0.f;
#pragma unroll
      for (int d = 0; d < DIRECTIONS; d++) dtap[d][j][c] = dbias[d][c] = 0.f;
    }
  if (at.start < at.stop) {
#pragma unroll
    for (int j = 0; j < REACH; j++) {
      const Pack<T, PAIRS> v = x.load(at.start - REACH + j);
#pragma unroll
      for (int c = 0; c < CHANNELS; c++) values[j + 1][c] = v.get(c);
    }
    const auto fetch = [&](int first, int stage) {
#pragma unroll
      for (int i = 0; i < TAPS; i++) {
        x.fetch(&shared.fetched[stage][0][i][threadIdx.x], first + i);
        dy[0].fetch(&shared.fetched[stage][1][i][threadIdx.x], first + i);
        if (DIRECTIONS == 2) dy[1].fetch(&shared.fetched[stage][DIRECTIONS][i][threadIdx.x], first + i - REACH);
      }
    };
    const auto group = [&](int first, int stage, auto place) {
      constexpr bool INSIDE = decltype(place)::VALUE;
#pragma unroll
      for (int i = 0; i < TAPS; i++) {
        const int s = first + i;
        const bool writes = INSIDE || (s - REACH >= at.start && s - REACH < at.stop);
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) values[i][c] = shared.fetched[stage][0][i][threadIdx.x].get(c);
#pragma unroll
        for (int d = 0; d < DIRECTIONS; d++) {
          // forward: token s, tap k meets s - REACH + k; reversed: token s - REACH, tap k meets s - k
          const bool counts = INSIDE || (d == 0 ? s < at.stop : writes);
#pragma unroll
          for (int c = 0; c < CHANNELS; c++) {
            float gradient = shared.fetched[stage][1 + d][i][threadIdx.x].get(c);
            if (QUICK || p.silu) {
              float sum = weights[d].bias[c];
#pragma unroll
              for (int k = 0; k < TAPS; k++)
                sum = fmaf(weights[d].tap[k][c], values[(d == 0 ? i + 1 + k : i + TAPS - k) % TAPS][c], sum);
              const float open = opening(sum);  // silu'(v) / UNIT = open (1 + v (1 - sigmoid(v)))
              gradient *= open * fmaf(sum, 1.f / UNIT - open, 1.f);
            }
            inner[d][(i + d) % TAPS][c] = gradient;
            const float counted = counts ? gradient : 0.f;
#pragma unroll
            for (int k = 0; k < TAPS; k++)
              dtap[d][k][c] = fmaf(counted, values[(d == 0 ? i + 1 + k : i + TAPS - k) % TAPS][c], dtap[d][k][c]);
            dbias[d][c] += counted;
          }
        }
        float sum[CHANNELS];
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) {
          sum[c] = 0.f;
#pragma unroll
          for (int k = 0; k < TAPS; k++) {
            sum[c] = fmaf(weights[0].tap[k][c], inner[0][(i + TAPS - k) % TAPS][c], sum[c]);
            if (DIRECTIONS == 2) sum[c] = fmaf(weights[1].tap[k][c], inner[1][(i + 2 + k) % TAPS][c], sum[c]);
          }
        }
        if (writes) dx.store(s - REACH, sum);
      }
    };
    fetch(at.start, 0);
    asm volatile("cp.async.commit_group;");
    int stage = 0;
#pragma unroll 1
    for (int first = at.start; first < at.stop + REACH; first += TAPS) {
      if (first + TAPS < at.stop + REACH) fetch(first + TAPS, stage ^ 1);
      asm volatile("cp.async.commit_group;");
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      if (QUICK && first > at.start && first + TAPS <= at.stop)
        group(first, stage, Inside());
      else
        group(first, stage, AtEdge());
      stage ^= 1;
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int d = 0; d < DIRECTIONS; d++)
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
#pragma unroll
      for (int k = 0; k < TAPS; k++) shared.sums[warp][d * (TAPS + 1) + k][c][lane] = unit * dtap[d][k][c];
      shared.sums[warp][d * (TAPS + 1) + TAPS][c][lane] = unit * dbias[d][c];
    }
  __syncthreads();
  if (at.channel >= p.channels) return;
  float *const row = p.partials + (i64)(blockIdx.x / p.columns) * (DIRECTIONS * p.channels * (p.taps + 1));
  for (int n = warp; n < SUMS * CHANNELS; n += WARPS) {
    const int d = n / (CHANNELS * (TAPS + 1)), k = n / CHANNELS % (TAPS + 1), c = n % CHANNELS;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += shared.sums[w][d * (TAPS + 1) + k][c][lane];
    const int channel = d * p.channels + at.channel + c, given = k - (TAPS - p.taps);
    if (k == TAPS)
      row[DIRECTIONS * p.channels * p.taps + channel] = sum;
    else if (given >= 0)
      row[channel * p.taps + given] = sum;
  }
}

// 32 columns a block; always the same order of additions.
extern "C" __global__ void __launch_bounds__(1024) conv_sum_kernel(const __grid_constant__ Sum p) {
  __shared__ float sums[32][33];
  const int width = p.num_weights + p.num_biases;
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  wait_for_kernel_before();
  let_next_kernel_start();
  float sum = 0.f;
  if (column < width)
#pragma unroll 4
    for (int r = part; r < p.rows; r += 32) sum += p.partials[(i64)r * width + column];
  sums[part][lane] = sum;
  __syncthreads();
  if (part > 0 || column >= width) return;
  sum = 0.f;
#pragma unroll
  for (int r = 0; r < 32; r++) sum += sums[r][lane];
  if (column < p.num_weights)
    p.dweight[column] = sum;
  else
    p.dbias[column - p.num_weights] = sum;
}

// quick: 4 taps or fewer, SiLU, channels in fours; general: 8 taps or fewer, channels in pairs
#define KERNELS(NAME, T, TAPS, PAIRS, DIRECTIONS, QUICK, FORWARD_BLOCKS, BACKWARD_BLOCKS)                            \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, FORWARD_BLOCKS)                                           \
      conv_forward_kernel_##NAME##_##DIRECTIONS(const __grid_constant__ Convolution p) {                             \
    conv_forward<T, TAPS, PAIRS, DIRECTIONS, QUICK>(p);                                                              \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, BACKWARD_BLOCKS)                                          \
      conv_backward_kernel_##NAME##_##DIRECTIONS(const __grid_constant__ Convolution p) {                            \
    conv_backward<T, TAPS, PAIRS, DIRECTIONS, QUICK>(p);                                                             \
  }
#define ALL(NAME, T, FORWARD_BLOCKS, BACKWARD_BLOCKS)                                       \
  KERNELS(quick_##NAME, T, 4, 2, 1, true, FORWARD_BLOCKS, BACKWARD_BLOCKS)                  \
  KERNELS(quick_##NAME, T, 4, 2, 2, true, FORWARD_BLOCKS, BACKWARD_BLOCKS)                  \
  KERNELS(general_##NAME, T, 8, 1, 1, false, 4, 2)                                          \
  KERNELS(general_##NAME, T, 8, 1, 2, false, 4, 2)
ALL(bfloat16, Bf16, 5, 3)
ALL(float16, Fp16, 5, 3)
ALL(float32, Fp32, 4, 2)
