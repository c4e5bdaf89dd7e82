// The convolutions of both directions with SiLU and the projections behind them in one kernel; 384 channels, up to 4 taps,
// up to 48 outputs a direction, bfloat16 or float16, arithmetic float32; NVIDIA GPUs with 220 KB of shared memory a block
// (H100, H200, B200).
//
// bfloat16, 48 outputs, x a view of xz; us, medians of CUDA graph replays over inputs beyond the L2 cache; apart: the sum of
// conv.cu alone and torch.bmm alone, each measured so; H200, driver 580.159.04, torch 2.11.0+cu130, 2026-11-23; without the
// early start. conv_project of conv_project.py remakes it. The bytes are the limit: without the convolutions' arithmetic
// the kernel takes 44.3 us at (8, 6085). Two bytes of three are written; filling u alone takes 24.8 us.
//   (B, L)       fused   apart
//   (8, 16385)   106.1
//   (8, 6085)     43.9    62.1
//   (64, 197)     18.4    21.2
//   (1, 6085)     12.4    13.1
//   (1, 197)       6.9     5.9   left apart
//
// Plan. A block is persistent. Its 24 producer warps are four groups; a group walks over a run of tokens, a lane with two
// neighbouring channels whose taps stay in registers. The tokens ahead come into shared memory by cp.async, each lane
// fetching what it alone reads, so that no barrier is in the way and more fetches are in flight than registers allow; a
// window of the taps' reach stays in registers. So x is read once, but for three tokens at each end of a run. Each result
// is stored to global memory and to a tile of 4 x 8 tokens in shared memory, of which there are two: while one is filled,
// the four consumer warps (a direction and 16 tokens each) multiply the other with the weights, which stay in shared
// memory. The consumers are the block's first warps and load their operands one step ahead: as the last warps, with
// operands loaded where they are used, they held the producers up (52.0 us instead of 43.9).
// Bytes a channel and token: 2 read, 4 written; a token's projections: 2 * 2 * P written.

constexpr int CHANNELS = 384, OUTPUTS = 48, REACH = 3;
constexpr int GROUPS = 4, GROUP_WARPS = CHANNELS / 64, CONSUMERS = 4, WARPS = CONSUMERS + GROUPS * GROUP_WARPS;
constexpr int STEP = 8;    // tokens that a group adds to a tile
constexpr int AHEAD = 16;  // tokens of a group in shared memory
constexpr int ROW_BYTES = 2 * CHANNELS, PADDED_BYTES = ROW_BYTES + 16;  // padded: ldmatrix without bank conflicts

struct Shared {
  char weights[2][OUTPUTS][PADDED_BYTES];
  char tiles[2][2][GROUPS * STEP][PADDED_BYTES];  // two of both directions
  char ahead[AHEAD][GROUPS][ROW_BYTES];
};
constexpr int DIRECTION_TILE_BYTES = sizeof(Shared::tiles) / 4;

struct ConvProject {
  const char *x;                         // (batch, length, CHANNELS)
  const float *conv_weight, *conv_bias;  // (2, CHANNELS, taps), (2, CHANNELS)
  const char *weight;                    // (2, width, CHANNELS)
  char *u, *projected;                   // (2, batch, length, CHANNELS), (2, batch, length, width)
  i64 x_batch;                           // strides in bytes
  int x_token, batch, length, width, taps;
  int runs, run;  // of an image, and their tokens: whole 16, or 8 if no group has a second run
};

template <class T>
struct Matrix;
#define MATRIX(T, NAME)                                                                                              \
  template <>                                                                                                        \
  struct Matrix<T> {                                                                                                 \
    static __device__ __forceinline__ void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {          \
      asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                                     \
          ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                               \
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                           \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                           \
    }                                                                                                                \
  };
MATRIX(Bf16, "bf16")
MATRIX(Fp16, "f16")
__device__ __forceinline__ void load_matrices(u32 (&v)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from));
}

// Named barriers of all threads: a tile is filled, then free again.
constexpr int FILLED = 1, FREE = 3;
__device__ __forceinline__ void wait_at(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(32 * WARPS) : "memory");
}
__device__ __forceinline__ void arrive_at(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(32 * WARPS) : "memory");
}

__device__ __forceinline__ void copy_pair(u32 to, const char *from, bool valid) {  // zeros where not valid
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// silu(v) of UNIT v, so that exp(-v) is a bare ex2
constexpr float UNIT = -LOG2E;
__device__ __forceinline__ float silu(float v) {
  float opening;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(opening) : "f"(fmaf(ex2(v), UNIT, UNIT)));
  return v * opening;
}

template <class T>
__device__ __forceinline__ void produce(const ConvProject &p, Shared &shared) {
  const int warp = (threadIdx.x >> 5) - CONSUMERS, lane = threadIdx.x & 31, group = warp / GROUP_WARPS;
  const int channel = (warp % GROUP_WARPS) * 64 + 2 * lane, all = p.batch * p.runs;
  const i64 direction_bytes = (i64)p.batch * p.length * ROW_BYTES;
  char *const tile = shared.tiles[0][0][group * STEP] + 2 * channel;
  char *const ahead = shared.ahead[0][group] + 2 * channel;
  const u32 ahead_at = (u32)__cvta_generic_to_shared(ahead);
  float taps[2][REACH + 2][2];  // the last: bias
  bool again = false;           // both tiles have been in use
  for (int first = blockIdx.x; first < all; first += gridDim.x * GROUPS) {
    const int number = first + group * gridDim.x;
    const int image = number / p.runs;
    int token = (number - image * p.runs) * p.run;
    const int length = number < all ? p.length : 0, end = min(length, token + p.run + REACH);
    const char *x = p.x + image * p.x_batch + (i64)(token - REACH) * p.x_token + 2 * channel;
    char *u = p.u + ((i64)image * p.length + token) * ROW_BYTES + 2 * channel, *reversed = u + direction_bytes;
    token -= REACH;  // to fetch next
    u32 window[AHEAD];
    int slot = 0;
    auto fetch = [&]() {  // four tokens
#pragma unroll
      for (int i = 0; i < 4; i++)
        copy_pair(ahead_at + (slot + i) * GROUPS * ROW_BYTES, x + (i64)i * p.x_token, token + i >= 0 && token + i < end);
      asm volatile("cp.async.commit_group;" ::: "memory");
      token += 4, x += 4 * p.x_token, slot = (slot + 4) % AHEAD;
    };
    auto take = [&](int i) { window[i % AHEAD] = *(const u32 *)(ahead + (i % AHEAD) * GROUPS * ROW_BYTES); };
    fetch(), fetch(), fetch();
    if (!again) {
#pragma unroll
      for (int d = 0; d < 2; d++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int at = d * CHANNELS + channel + c;
          taps[d][4][c] = UNIT * p.conv_bias[at];
          if (p.taps == 4) {
            const float4 row = ((const float4 *)p.conv_weight)[at];
            taps[d][0][c] = UNIT * row.x, taps[d][1][c] = UNIT * row.y;
            taps[d][2][c] = UNIT * row.z, taps[d][3][c] = UNIT * row.w;
            continue;
          }
#pragma unroll
          for (int k = 0; k < 4; k++) {  // fewer taps: zeros for the farthest
            const int given = k - 4 + p.taps;
            taps[d][k][c] = given < 0 ? 0.f : UNIT * p.conv_weight[at * p.taps + given];
          }
        }
    }
    wait_for_copies<1>();
#pragma unroll
    for (int i = 0; i < 6; i++) take(i);
#pragma unroll 1
    for (int done = 0; done < p.run; done += 2 * STEP) {
#pragma unroll
      for (int i = 0; i < 2 * STEP; i++) {
        const int half = i / STEP;
        if (i % STEP == 0 && again) wait_at(FREE + half);
        if (i % 4 == 0) fetch();
        if (i % 4 == 0) wait_for_copies<2>();
        if (i % 4 == 2) wait_for_copies<1>();
        if (i % 2 == 0) take(i + 6), take(i + 7);
        const bool valid = token - (AHEAD - REACH) + i % 4 < length;
#pragma unroll
        for (int d = 0; d < 2; d++) {
          float v0 = taps[d][4][0], v1 = taps[d][4][1];
#pragma unroll
          for (int k = 0; k < 4; k++) {
            const u32 pair = window[(d ? i + 6 - k : i + k) % AHEAD];
            v0 = fmaf(taps[d][k][0], T::first(pair), v0), v1 = fmaf(taps[d][k][1], T::second(pair), v1);
          }
          const u32 pair = T::pack(silu(v0), silu(v1));
          *(u32 *)(tile + (half * 2 + d) * DIRECTION_TILE_BYTES + (i % STEP) * PADDED_BYTES) = pair;
          if (valid) *(u32 *)((d ? reversed : u) + i * ROW_BYTES) = pair;
        }
        if (i % STEP == STEP - 1) {
          arrive_at(FILLED + half);
          if (half == 0 && p.run == STEP) return;
        }
      }
      again = true;
      u += 2 * STEP * ROW_BYTES, reversed += 2 * STEP * ROW_BYTES;
    }
    wait_for_copies<0>();  // the next run uses their places
  }
}

template <class T>
__device__ __forceinline__ void consume(const ConvProject &p, const Shared &shared) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, d = warp & 1, half = warp >> 1 & 1;
  const int g = lane >> 2, t = lane & 3, all = p.batch * p.runs, steps = p.run / STEP;
  const u32 from = (u32)__cvta_generic_to_shared(shared.tiles) + d * DIRECTION_TILE_BYTES +
                   (16 * half + (lane & 15)) * PADDED_BYTES + (lane >> 4) * 16;
  const u32 weight =
      (u32)__cvta_generic_to_shared(shared.weights) + (d * OUTPUTS + (lane & 7)) * PADDED_BYTES + (lane >> 3) * 16;
  const int turns = (all - (int)blockIdx.x + gridDim.x * GROUPS - 1) / (gridDim.x * GROUPS) * steps;
  int turn = 0;
  asm volatile("cp.async.wait_all;" ::: "memory");
  for (int first = blockIdx.x; first < all; first += gridDim.x * GROUPS) {
    char *to[2];
    int left[2];  // tokens of the image from here on
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int number = first + (2 * half + i) * gridDim.x, image = number / p.runs;
      const int token = (number - image * p.runs) * p.run + g;
      left[i] = number < all ? p.length - token : 0;
      to[i] = p.projected + ((((i64)d * p.batch + image) * p.length + token) * p.width) * 2;
    }
#pragma unroll 1
    for (int step = 0; step < steps; step++, turn++) {
      float sums[OUTPUTS / 8][4];
#pragma unroll
      for (int n = 0; n < OUTPUTS / 8; n++)
#pragma unroll
        for (int k = 0; k < 4; k++) sums[n][k] = 0.f;
      wait_at(FILLED + (turn & 1));
      const u32 tile = from + (turn & 1) * 2 * DIRECTION_TILE_BYTES;
      // 24 outputs at a time, so that products into one sum are apart; operands are loaded one time ahead
      constexpr int TIMES = 2 * CHANNELS / 32;
      u32 a[2][2][4], b[2][3][4];
      auto load_a = [&](int k) {
        load_matrices(a[k & 1][0], tile + k * 64), load_matrices(a[k & 1][1], tile + k * 64 + 32);
      };
      auto load_b = [&](int i) {
#pragma unroll
        for (int n = 0; n < 3; n++) load_matrices(b[i & 1][n], weight + (i % 2 * 3 + n) * 8 * PADDED_BYTES + i / 2 * 64);
      };
      load_a(0), load_b(0);
#pragma unroll
      for (int i = 0; i < TIMES; i++) {
        const int k = i / 2, block = i % 2 * 3;
        if (i + 1 < TIMES) load_b(i + 1);
        if (i % 2 == 1 && i + 1 < TIMES) load_a(k + 1);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int n = 0; n < 3; n++)
            Matrix<T>::multiply_add(sums[block + n], a[k & 1][h], b[i & 1][n][2 * h], b[i & 1][n][2 * h + 1]);
      }
      if (turn + 2 < turns) arrive_at(FREE + (turn & 1));
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (left[i] > 0) {
#pragma unroll
          for (int n = 0; n < OUTPUTS / 8; n++)
            if (8 * n < p.width) *(u32 *)(to[i] + 16 * n + 4 * t) = T::pack(sums[n][2 * i], sums[n][2 * i + 1]);
        }
        left[i] -= STEP, to[i] += STEP * p.width * 2;
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void conv_project(const ConvProject &p) {
  extern __shared__ uint4 memory[];
  Shared &shared = *(Shared *)memory;
  wait_for_kernel_before();
  let_next_kernel_start();
  for (int at = threadIdx.x >> 5; at < 2 * OUTPUTS; at += WARPS) {
    const int lane = threadIdx.x & 31, d = at >= OUTPUTS, row = at - d * OUTPUTS;
    const char *const from = p.weight + (((i64)d * p.width + row) * CHANNELS + 8 * lane) * 2;
#pragma unroll
    for (int chunk = 0; chunk < CHANNELS / 8; chunk += 32)
      if (chunk + 32 <= CHANNELS / 8 || chunk + lane < CHANNELS / 8)
        copy_async<16>(shared.weights[0][at] + 16 * (chunk + lane), from + 16 * chunk, row < p.width);
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
  if (threadIdx.x < 32 * CONSUMERS)
    consume<T>(p, shared);
  else
    produce<T>(p, shared);
}

#define CONV_PROJECT(NAME, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)                                                        \
      conv_project_kernel_##NAME(const __grid_constant__ ConvProject p) {                                            \
    conv_project<T>(p);                                                                                              \
  }
CONV_PROJECT(bfloat16, Bf16)
CONV_PROJECT(float16, Fp16)
