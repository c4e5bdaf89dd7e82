// What all kernels share: activations in three dtypes, exponentials, asynchronous copies, early starts. The text is put
// in front of every other source when it is compiled.

typedef unsigned int u32;
typedef long long i64;

constexpr float LN2 = 0.693147180559945f, LOG2E = 1.442695040888963f;

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float number(u32 x) { return __uint_as_float(x); }
__device__ __forceinline__ u32 pack_bf16(float a, float b) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}

// Two neighbouring activations: how they lie in memory and what they are worth.
struct Bf16 {
  typedef u32 Pair;
  static constexpr bool EXACT = false;
  static constexpr int PAIR_BYTES = 4;
  static __device__ __forceinline__ float first(u32 v) { return number(v << 16); }
  static __device__ __forceinline__ float second(u32 v) { return number(v & 0xffff0000u); }
  static __device__ __forceinline__ u32 pack(float a, float b) { return pack_bf16(a, b); }
  static __device__ __forceinline__ u32 no_step() { return 0xff80ff80u; }  // minus infinity: softplus gives exactly 0
};
struct Fp16 {
  typedef u32 Pair;
  static constexpr bool EXACT = false;
  static constexpr int PAIR_BYTES = 4;
  static __device__ __forceinline__ float first(u32 v) {
    float r;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(r) : "r"(v));
    return r;
  }
  static __device__ __forceinline__ float second(u32 v) {
    float r;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(r) : "r"(v));
    return r;
  }
  static __device__ __forceinline__ u32 pack(float a, float b) {  // saturates: float16 never becomes infinite here
    u32 r;
    a = fminf(fmaxf(a, -65504.f), 65504.f), b = fminf(fmaxf(b, -65504.f), 65504.f);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
  }
  static __device__ __forceinline__ u32 no_step() { return 0xfc00fc00u; }
};
struct Fp32 {
  typedef float2 Pair;
  static constexpr bool EXACT = true;
  static constexpr int PAIR_BYTES = 8;
  static __device__ __forceinline__ float first(float2 v) { return v.x; }
  static __device__ __forceinline__ float second(float2 v) { return v.y; }
  static __device__ __forceinline__ float2 pack(float a, float b) { return make_float2(a, b); }
  static __device__ __forceinline__ float2 no_step() { return make_float2(number(0xff800000u), number(0xff800000u)); }
};
template <class P>
__device__ __forceinline__ P load_pair(const char *p) {
  return __ldg((const P *)p);
}
template <class P>
__device__ __forceinline__ void load_pair(P &r, const char *p, bool valid) {
  if (valid) r = load_pair<P>(p);
}

// On sm_90 and newer a kernel may start before the one it depends on has ended, up to the place where it waits.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <int BYTES>
__device__ __forceinline__ void copy_async(void *to, const void *from, bool valid) {  // zeros where not valid
  const u32 at = (u32)__cvta_generic_to_shared(to), bytes = valid ? BYTES : 0;
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}
