// The gate behind the scans on NVIDIA GPUs from sm_80 on: scale (a + b) silu(z) and its gradients; activations float32,
// bfloat16 or float16, arithmetic float32.
//
// 384 channels, bfloat16, two directions; us (GB/s, share of the 4.28 TB/s that a copy reaches), medians of CUDA graph
// replays over inputs beyond the L2 cache, the same by PyTorch operations behind; H200, driver 580.159.04, torch
// 2.11.0+cu130, 2026-11-23. gate_forward and gate_backward of gate.py remake it.
//   (B, L)      forward             PyTorch   forward, sum kept   backward            PyTorch
//   (8, 6085)   37.9 (3942, 92 %)       126   47.4 (3948, 92 %)   47.4 (3944, 92 %)       321
//   (64, 197)   11.3 (3433, 80 %)        34   13.9 (3478, 81 %)   13.9 (3497, 82 %)        86
//   (1, 6085)    6.5 (2900, 68 %)        21    7.7 (3017, 70 %)    7.8 (3007, 70 %)        48
//   (1, 197)     1.2                      7    1.3                 1.7                     19
//
// Plan. A thread takes 16 bytes of each tensor (two channels where the width or a stride does not allow it) and writes
// where it has read, so the results may replace a and b.
// Bytes a channel and token in bfloat16, two directions: forward 6 read, 2 written and 2 more for the sum; backward 6
// read, 4 written.

constexpr int THREADS = 256;

struct Gate {
  const char *a, *b, *z, *dg;  // a, b and dg contiguous; b may be null
  char *out, *sum, *dz;        // out contiguous: g, backward the gradient of a and of b; sum: a + b, may be null
  i64 z_batch, dz_batch, rows;  // strides in bytes
  int z_token, dz_token, length, channels;
  float scale;
};

template <class T, int PAIRS>
struct alignas(T::PAIR_BYTES *PAIRS) Pack {
  typename T::Pair v[PAIRS];
  __device__ __forceinline__ float get(int c) const { return c % 2 ? T::second(v[c / 2]) : T::first(v[c / 2]); }
  __device__ __forceinline__ void set(int i, float first, float second) { v[i] = T::pack(first, second); }
};

__device__ __forceinline__ float sigmoid(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.f + ex2(-LOG2E * v)));
  return r;
}

template <class T, int PAIRS, bool BACKWARD>
__device__ __forceinline__ void gate(const Gate &p) {
  typedef Pack<T, PAIRS> P;
  wait_for_kernel_before();
  let_next_kernel_start();
  const int packs = p.channels / (2 * PAIRS);
  const i64 at = (i64)blockIdx.x * THREADS + threadIdx.x, row = at / packs;
  if (row >= p.rows) return;
  const int column = (int)(at - row * packs), batch = (int)(row / p.length), token = (int)(row - (i64)batch * p.length);
  const P none = {};
  const P z = *((const P *)(p.z + batch * p.z_batch + (i64)token * p.z_token) + column);
  const P a = ((const P *)p.a)[at], b = p.b == nullptr ? none : ((const P *)p.b)[at];
  const P dg = BACKWARD ? ((const P *)p.dg)[at] : none;
  P out, second;  // second: the sum, or dz
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    float first_result[2], second_result[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const float v = z.get(2 * i + c), sum = a.get(2 * i + c) + b.get(2 * i + c), open = sigmoid(v);
      if (BACKWARD) {
        const float d = dg.get(2 * i + c) * p.scale;
        first_result[c] = d * v * open, second_result[c] = d * sum * open * fmaf(v, 1.f - open, 1.f);
      } else {
        first_result[c] = p.scale * sum * v * open, second_result[c] = sum;
      }
    }
    out.set(i, first_result[0], first_result[1]), second.set(i, second_result[0], second_result[1]);
  }
  ((P *)p.out)[at] = out;
  if (BACKWARD)
    *((P *)(p.dz + batch * p.dz_batch + (i64)token * p.dz_token) + column) = second;
  else if (p.sum != nullptr)
    ((P *)p.sum)[at] = second;
}

#define KERNELS(NAME, T, PAIRS)                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS) gate_forward_kernel_##NAME(const __grid_constant__ Gate p) {  \
    gate<T, PAIRS, false>(p);                                                                                         \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS) gate_backward_kernel_##NAME(const __grid_constant__ Gate p) { \
    gate<T, PAIRS, true>(p);                                                                                          \
  }
KERNELS(bfloat16, Bf16, 1)
KERNELS(bfloat16_wide, Bf16, 4)
KERNELS(float16, Fp16, 1)
KERNELS(float16_wide, Fp16, 4)
KERNELS(float32, Fp32, 1)
KERNELS(float32_wide, Fp32, 2)
