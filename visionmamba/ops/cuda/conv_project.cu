// The convolutions of both directions with SiLU and the projections behind them in one kernel, on NVIDIA GPUs from sm_80 on;
// 384 channels, up to 4 taps, up to 48 outputs a direction, bfloat16 or float16, arithmetic float32.
//
// (B, L)
//
// Plan. A block is persistent. Its 24 producer warps are four groups; a group walks over a run of tokens, a lane with two
// neighbouring channels whose taps stay in registers. The tokens ahead come into shared memory by cp.async, each lane
// fetching what it alone reads, so no barrier and no scoreboard is in the way of many fetches in flight; a window of the
// taps' reach stays in registers. So x is read once, but for three tokens at each end of a run. Each result is stored to
// global memory and to a tile of 4 x 8 tokens in shared memory, of which there are two: while one is filled, the
// four consumer warps (a direction and 16 tokens each) multiply the other with the weights, which stay in shared memory.
// The consumers are the block's first warps, which the schedulers prefer: they are few and full of latency.
// Bytes a channel and token: 2 read, 4 written; a token's projections: 2 * 2 * P written.

constexpr int CHANNELS = 384, OUTPUTS = 48, REACH = 3;
constexpr int GROUPS = 4, GROUP_WARPS = CHANNELS / 64, CONSUMERS = 4, WARPS = CONSUMERS + GROUPS * GROUP_WARPS;
constexpr int STEP = 8;    // tokens that a group adds to a tile
constexpr int AHEAD = 16;  // tokens of a group in shared memory
constexpr int ROW_BYTES = 2 * CHANNELS, PADDED_BYTES = ROW_BYTES + 16;  // padded: ldmatrix without bank conflicts

struct Shared {
  char weights[2][OUTPUTS][PADDED_BYTES];
  char tiles[2][2][GROUPS][STEP][PADDED_BYTES];  // two of both directions
  char ahead[AHEAD][GROUPS][ROW_BYTES];
};

struct ConvProject {
  const char *x;                         // (batch, length, CHANNELS)
  const float *conv_weight, *conv_bias;  // (2, CHANNELS, taps), (2, CHANNELS)
  const char *weight;                    // (2, width, CHANNELS)
  char *u, *projected;                   // (2, batch, length, CHANNELS), (2, batch, length, width)
  i64 x_batch;                           // strides in bytes
  int x_token, batch, length, width, taps;
  int run, runs;  // tokens of a group, and how often they fit into the length
};

// Named barriers of all threads. A tile is filled, then free again.
constexpr int FILLED = 1, FREE = 3, STAGED = 5;
__device__ __forceinline__ void wait_at(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(32 * WARPS) : "memory");
}
__device__ __forceinline__ void arrive_at(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(32 * WARPS) : "memory");
}

template <class T>
struct Matrix;
#define MATRIX(T, NAME)                                                                                               \
  template <>                                                                                                         \
  struct Matrix<T> {                                                                                                  \
    static __device__ __forceinline__ void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {           \
      asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                                      \
          ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                                \
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                            \
    }                                                                                                                 \
  };
MATRIX(Bf16, "bf16")
MATRIX(Fp16, "f16")

__device__ __forceinline__ void load_matrices(u32 (&v)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from));
}

// silu(v) of UNIT v, so that exp(-v) is a bare ex2
constexpr float UNIT = -LOG2E;
__device__ __forceinline__ float silu(float v) {
  float opening;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(opening) : "f"(fmaf(UNIT, ex2(v), UNIT)));
  return v * opening;
}

// The run of tokens that a group walks over; empty for groups beyond the last.
struct Run {
  int image, start, stop;
  __device__ __forceinline__ Run(const ConvProject &p, int number) {
    image = number / p.runs, start = (number - image * p.runs) * p.run;
    stop = image < p.batch ? min(start + p.run, p.length) : start;
  }
};

template <int GROUPS_WAITING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_WAITING) : "memory");
}

template <class T>
__device__ __forceinline__ void produce(const ConvProject &p, Shared &shared) {
  const int warp = threadIdx.x / 32 - CONSUMERS, group = warp / GROUP_WARPS;
  const int channel = warp % GROUP_WARPS * 64 + threadIdx.x % 32 * 2;
  const i64 direction_bytes = (i64)p.batch * p.length * ROW_BYTES;
  const char *const ahead = shared.ahead[0][group] + 2 * channel;
  const u32 ahead_at = (u32)__cvta_generic_to_shared(ahead);
  char *const tile = shared.tiles[0][0][group][0] + 2 * channel;
  float taps[2][REACH + 1][2], bias[2][2];
  bool first = true;
  for (int block = blockIdx.x; block < p.batch * p.runs; block += gridDim.x * GROUPS) {
    const Run at(p, block + group * gridDim.x);
    const int last = min(at.stop + REACH, p.length);
    int left = at.stop - at.start, token = at.start - REACH, slot = 0;  // to finish; to fetch next and where to
    const char *x = p.x + at.image * p.x_batch + (i64)token * p.x_token + 2 * channel;
    char *u = p.u + ((i64)at.image * p.length + at.start) * ROW_BYTES + 2 * channel;
    const auto fetch = [&] {  // four tokens; zeros outside of the image
#pragma unroll
      for (int i = 0; i < 4; i++)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(ahead_at + (slot + i) * GROUPS * ROW_BYTES),
                     "l"(x + (i64)i * p.x_token), "r"((u32)(token + i) < (u32)last && left > 0 ? 4 : 0)
                     : "memory");
      asm volatile("cp.async.commit_group;" ::: "memory");
      token += 4, x += 4 * p.x_token, slot = (slot + 4) % AHEAD;
    };
    u32 window[AHEAD];  // of which 2 * REACH + 2 are in use
    const auto take = [&](int i) { window[i % AHEAD] = *(const u32 *)(ahead + i % AHEAD * GROUPS * ROW_BYTES); };
    fetch(), fetch(), fetch();
    if (first) {
#pragma unroll
      for (int d = 0; d < 2; d++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int row = d * CHANNELS + channel + c;
          bias[d][c] = UNIT * p.conv_bias[row];
          if (p.taps == 4) {
            const float4 all = ((const float4 *)p.conv_weight)[row];
            taps[d][0][c] = UNIT * all.x, taps[d][1][c] = UNIT * all.y;
            taps[d][2][c] = UNIT * all.z, taps[d][3][c] = UNIT * all.w;
            continue;
          }
#pragma unroll
          for (int k = 0; k <= REACH; k++) {  // fewer taps: zeros for the farthest
            const int given = k - (REACH + 1 - p.taps);
            taps[d][k][c] = given >= 0 ? UNIT * p.conv_weight[row * p.taps + given] : 0.f;
          }
        }
    }
    wait_for_copies<1>();
#pragma unroll
    for (int i = 0; i < 2 * REACH; i++) take(i);
#pragma unroll 1
    for (int done = 0; done < p.run; done += 2 * STEP) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (done + half * STEP >= p.run) break;
        if (!first) wait_at(FREE + half);
#pragma unroll
        for (int i = half * STEP; i < (half + 1) * STEP; i++) {
          if (i % 4 == 0) {
            fetch();
            wait_for_copies<2>();
          } else if (i % 4 == 2) {
            wait_for_copies<1>();
          }
          if (i % 2 == 0) take(i + 2 * REACH), take(i + 2 * REACH + 1);
#pragma unroll
          for (int d = 0; d < 2; d++) {
            float v[2] = {bias[d][0], bias[d][1]};
#pragma unroll
            for (int k = 0; k <= REACH; k++) {
              const u32 pair = window[(d ? i + 2 * REACH - k : i + k) % AHEAD];
              v[0] = fmaf(taps[d][k][0], T::first(pair), v[0]), v[1] = fmaf(taps[d][k][1], T::second(pair), v[1]);
            }
            const u32 pair = T::pack(silu(v[0]), silu(v[1]));
            *(u32 *)(tile + ((half * 2 + d) * GROUPS * STEP + i % STEP) * PADDED_BYTES) = pair;
            if (i < left) *(u32 *)(u + d * direction_bytes + i * ROW_BYTES) = pair;
          }
        }
        arrive_at(FILLED + half);
      }
      first = false, left -= 2 * STEP, u += 2 * STEP * ROW_BYTES;
    }
  }
}

template <class T>
__device__ __forceinline__ void consume(const ConvProject &p, Shared &shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, direction = warp % 2, half = warp / 2;
  for (int row = warp; row < 2 * OUTPUTS; row += CONSUMERS) {
    const int output = row % OUTPUTS;
    const char *const from = p.weight + ((i64)(row / OUTPUTS) * p.width + output) * ROW_BYTES;
    for (int chunk = lane; chunk < ROW_BYTES / 16; chunk += 32)
      copy_async<16>(shared.weights[0][row] + 16 * chunk, from + 16 * chunk, output < p.width);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  asm volatile("bar.sync %0, %1;" ::"n"(STAGED), "n"(32 * CONSUMERS) : "memory");

  const int g = lane / 4, t = lane % 4, steps = (p.run + STEP - 1) / STEP;
  const u32 weights = (u32)__cvta_generic_to_shared(shared.weights[direction][lane % 8]) + lane / 8 * 16;
  const u32 tiles =
      (u32)__cvta_generic_to_shared(shared.tiles[0][direction][2 * half + lane / 8 % 2][lane % 8]) + lane / 16 * 16;
  for (int block = blockIdx.x; block < p.batch * p.runs; block += gridDim.x * GROUPS) {
    const bool again = block + gridDim.x * GROUPS < p.batch * p.runs;
    char *projected[2];
    int left[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const Run at(p, block + (2 * half + i) * gridDim.x);
      left[i] = at.stop - at.start - g;
      projected[i] = p.projected + ((((i64)direction * p.batch + at.image) * p.length + at.start + g) * p.width + 2 * t) * 2;
    }
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      float sums[OUTPUTS / 8][4];
#pragma unroll
      for (int n = 0; n < OUTPUTS / 8; n++)
#pragma unroll
        for (int k = 0; k < 4; k++) sums[n][k] = 0.f;
      wait_at(FILLED + step % 2);
      // Three times 8 outputs at a time, so that products into one sum are apart; operands are loaded one time ahead.
      const u32 tile = tiles + step % 2 * (u32)sizeof(shared.tiles[0]);
      u32 a[2][2][4], b[2][3][4];
      const auto load_a = [&](int k) {
        load_matrices(a[k % 2][0], tile + 64 * k), load_matrices(a[k % 2][1], tile + 64 * k + 32);
      };
      const auto load_b = [&](int i) {
#pragma unroll
        for (int n = 0; n < 3; n++) load_matrices(b[i % 2][n], weights + (i % 2 * 3 + n) * 8 * PADDED_BYTES + i / 2 * 64);
      };
      load_a(0), load_b(0);
#pragma unroll
      for (int i = 0; i < 2 * CHANNELS / 32; i++) {
        if (i + 1 < 2 * CHANNELS / 32) load_b(i + 1);
        if (i % 2 == 1 && i / 2 + 1 < CHANNELS / 32) load_a(i / 2 + 1);
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
          for (int n = 0; n < 3; n++)
            Matrix<T>::multiply_add(sums[i % 2 * 3 + n], a[i / 2 % 2][k], b[i % 2][n][2 * k], b[i % 2][n][2 * k + 1]);
      }
      if (step + 2 < steps || again) arrive_at(FREE + step % 2);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (left[i] > 0) {
#pragma unroll
          for (int n = 0; n < OUTPUTS / 8; n++)
            if (8 * n < p.width) *(u32 *)(projected[i] + 16 * n) = T::pack(sums[n][2 * i], sums[n][2 * i + 1]);
        }
        left[i] -= STEP, projected[i] += STEP * p.width * 2;
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void conv_project(const ConvProject &p) {
  extern __shared__ __align__(16) char memory[];
  Shared &shared = *(Shared *)memory;
  wait_for_kernel_before();
  let_next_kernel_start();
  if (threadIdx.x < 32 * CONSUMERS)
    consume<T>(p, shared);
  else
    produce<T>(p, shared);
}

#define CONV_PROJECT(NAME, T)                                                                                         \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)                                                         \
      conv_project_kernel_##NAME(const __grid_constant__ ConvProject p) {                                             \
    conv_project<T>(p);                                                                                               \
  }
CONV_PROJECT(bfloat16, Bf16)
CONV_PROJECT(float16, Fp16)
