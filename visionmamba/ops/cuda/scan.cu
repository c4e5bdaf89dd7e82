// The selective scan on NVIDIA GPUs from sm_80 on, compiled at run time by NVRTC; forward in float32, bfloat16 and
// float16, backward in bfloat16.
//
// Both directions, 16 states, bfloat16, step sizes (rank 12), softplus and D inside; us, medians of CUDA graph replays
// over inputs beyond the L2 cache; H200, driver 580.159.04, torch 2.11.0+cu130, 2026-11-23. Roof: the exponential unit,
// softplus included, at the 1.80 GHz that the chip holds while tensor cores work (1.98 GHz otherwise).
// mixer_scan_forward and mixer_scan_backward of scan.py remake it.
//   (B, d_inner, L)   forward   of the roof   forward + backward
//   (64, 384, 197)         65          72 %      284
//   (128, 384, 197)       123          76 %      547   443 with the states kept in between
//   (8, 384, 1025)         52          58 %      213
//   (8, 384, 6085)        270          66 %     1140
//   (1, 384, 6085)         68          33 %      498   two passes over eight chunks
//
// Plan. A warp owns a tile of 16 channels x 16 states in the accumulator layout of mma.m16n8: lane (g, t) = (lane / 4,
// lane % 4) holds channels 2g, 2g+1 and states 4t .. 4t+3, eight numbers. Tokens come in groups of 8; lane (g, t) loads,
// softplusses and stores channels 2g, 2g+1 of tokens t and t+4, so nothing but a pair of shuffles a token is exchanged.
//   dt_r W     is one m16n8k16 for every 16 of the rank, whose columns are ordered so that each lane gets its own steps,
//   dt x B     is an outer product: mma.m16n8k4 whose k are four tokens, all but one masked to zero,
//   C h        is a product with k = states and n = tokens; each token keeps its own column,
//   exp(dt A)  is one ex2 a state: dt is kept in units of ln 2, the state in units of 1 / ln 2.
// Tensor cores read 11 bits: h is rounded there for y only, never in the recurrence. float32 activations are split in a
// high and a low part (three products), so they lose nothing.
// Ring: four warps take turns at the groups of one sequence and hand the state on through shared memory; a group's 64
// exponentials are ready in registers before its turn. So one sequence keeps four schedulers busy and every exponential
// is computed once. A lone long sequence is cut in chunks: their end states from zero first, then the rings.
// Backward: the groups from the last to the first, from the states that enter them (bfloat16, left by the forward or made
// by a forward without y). A group makes its states again, hands the adjoint state on and sums over channels with
// movmatrix and m16n8k16; the gradient of the step sizes goes through dt_weight at once and is never written.
// Bytes a channel and token: forward 2 activations (x, y); backward 3 (x, dy, dx) and 4 of saved states; the rows
// [dt_r | B | C] are shared by all channels.

struct Direction {
  // dt: the step sizes, or where they are a product the rows [dt_r | B | C | padding] that B and C point into
  const char *x, *dt, *B, *C, *dy, *dt_weight;
  const float *A, *D, *dt_bias, *initial_state, *dlast_state;
  char *y, *dx, *ddt;
  float *last_state, *drows, *dA, *dD, *ddt_bias, *ddt_weight, *dinitial_state;
  i64 x_batch, dt_batch, B_batch, C_batch, dy_batch;  // strides in bytes
  int x_token, dt_token, B_token, C_token, dy_token, reverse;
};

struct Problem {
  Direction direction[2];
  uint4 *states;  // entering every group of 8 tokens in bfloat16, [sequence tile][group][lane]; for the backward
  float4 *carry;  // end state of every chunk from zero, [sequence tile][chunk][2][lane]
  float2 *carry_dt;
  int batch, length, channels, num_directions, chunk_length, num_chunks;
  int rank, width;     // columns of dt_r, and of a row [dt_r | B | C | padding] and its gradient
  i64 partial_stride;  // floats between the channel tiles' gradients of the rows; 0: all sums are added with atomics
};

constexpr int WARPS = 4;      // of a ring
constexpr int MAX_RINGS = 3;  // of a block
constexpr int PARTS = 8;      // of a chunk whose end state is computed
constexpr float TRUNCATION = 1.000325f;  // what a truncated 11-bit significand loses on average

__device__ __forceinline__ u32 high_part(float x) { return bits(x) & 0xffffe000u; }
__device__ __forceinline__ u32 low_part(float x) { return bits(x - number(high_part(x))); }
__device__ __forceinline__ void mma_k4(float (&d)[4], u32 a0, u32 a1, u32 b0) {
  asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
__device__ __forceinline__ void mma_k8(float (&d)[4], const u32 (&h)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(h[0]), "r"(h[2]), "r"(h[1]), "r"(h[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_k16(Bf16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_k16(Fp16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_k16(Fp32, float (&)[4], const u32 (&)[4], u32, u32) {}  // float32 has its dt given
__device__ __forceinline__ void mma_k8(float (&d)[4], u32 a0, u32 a1, u32 b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
__device__ __forceinline__ void clear(float (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = 0.f;
}

// 2^x; in float32 the slowest decays are rounded once, which a thousand tokens in a row would show
template <bool EXACT>
__device__ __forceinline__ float decay(float x) {
  if (!EXACT || x < -0.0625f) return ex2(x);
  const float y = x * LN2;
  return fmaf(y, fmaf(y, fmaf(y, fmaf(y, fmaf(y, 1.f / 120.f, 1.f / 24.f), 1.f / 6.f), 0.5f), 1.f), 1.f);
}

// softplus in units of ln 2 of v = log2(e) (dt + bias)
template <bool EXACT>
__device__ __forceinline__ float softplus(float v) {
  if (EXACT) return fmaxf(v, 0.f) + LOG2E * log1pf(exp2f(-fabsf(v)));
  const float w = ex2(fminf(v, 64.f));
  const float small = w * fmaf(w, -0.5f * LOG2E, LOG2E);
  return fmaxf(w < 0.00390625f ? small : lg2(1.f + w), v);
}

// A tile's states: 2 n-blocks x (channel 2g: 2 states, channel 2g+1: 2 states). Block e holds states 4t + e, 4t + 2 + e.
struct Tile {
  float v[2][4];
  __device__ __forceinline__ void clear_all() { clear(v[0]), clear(v[1]); }
  __device__ __forceinline__ void load(const float4 *p, int lane) {
    const float4 a = p[lane], b = p[32 + lane];
    v[0][0] = a.x, v[0][1] = a.y, v[0][2] = a.z, v[0][3] = a.w;
    v[1][0] = b.x, v[1][1] = b.y, v[1][2] = b.z, v[1][3] = b.w;
  }
  __device__ __forceinline__ void store(float4 *p, int lane) const {
    p[lane] = make_float4(v[0][0], v[0][1], v[0][2], v[0][3]);
    p[32 + lane] = make_float4(v[1][0], v[1][1], v[1][2], v[1][3]);
  }
  __device__ __forceinline__ uint4 packed() const {  // in bfloat16: block 0 of both channels, then block 1
    return make_uint4(pack_bf16(v[0][0], v[0][1]), pack_bf16(v[0][2], v[0][3]), pack_bf16(v[1][0], v[1][1]),
                      pack_bf16(v[1][2], v[1][3]));
  }
  __device__ __forceinline__ void unpack(uint4 r) {
    v[0][0] = Bf16::first(r.x), v[0][1] = Bf16::second(r.x), v[0][2] = Bf16::first(r.y), v[0][3] = Bf16::second(r.y);
    v[1][0] = Bf16::first(r.z), v[1][1] = Bf16::second(r.z), v[1][2] = Bf16::first(r.w), v[1][3] = Bf16::second(r.w);
  }
  // rows of 16 states, one a channel
  __device__ __forceinline__ void load_rows(const float *p, int t, bool valid, float scale) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const float4 r = valid ? *(const float4 *)(p + 16 * c + 4 * t) : make_float4(0.f, 0.f, 0.f, 0.f);
      v[0][2 * c] = r.x * scale, v[1][2 * c] = r.y * scale, v[0][2 * c + 1] = r.z * scale, v[1][2 * c + 1] = r.w * scale;
    }
  }
  __device__ __forceinline__ void store_rows(float *p, int t, float scale) const {
#pragma unroll
    for (int c = 0; c < 2; c++)
      *(float4 *)(p + 16 * c + 4 * t) = make_float4(v[0][2 * c] * scale, v[1][2 * c] * scale, v[0][2 * c + 1] * scale,
                                                    v[1][2 * c + 1] * scale);
  }
};

struct Lane {
  int lane, g, t, column;  // column: the token whose column of the state product this lane loads
  __device__ __forceinline__ Lane() {
    lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, column = (g >> 1) + 4 * (g & 1);
  }
};

// Where a warp's tile is: direction, batch, channels.
struct Place {
  int direction, batch, channel;  // channel: of this lane's pair
  bool valid, whole;              // the pair exists (channels are even); all pairs of the tile do
  i64 tile;                       // number of the sequence tile
  __device__ __forceinline__ Place(const Problem &p, i64 unit, const Lane &l) {
    const int tiles = (int)((p.channels + 15) / 16);
    tile = unit;
    const i64 sequence = unit / tiles;
    channel = (int)(unit - sequence * tiles) * 16 + 2 * l.g;
    direction = (sequence >= p.batch) + (sequence >= 2 * (i64)p.batch);  // 2: beyond the last
    batch = (int)(sequence - (i64)direction * p.batch);
    valid = channel < p.channels, whole = channel - 2 * l.g + 16 <= p.channels;
  }
};

// The weights of the step sizes of a tile as left operands, 16 columns of dt_r each; RANK of them, none where dt is given.
// The row of channel 2g is g, that of 2g+1 is g+8; lane t holds columns 4t .. 4t+3.
template <int RANK>
struct StepWeights {
  u32 v[RANK > 0 ? RANK : 1][4];
  __device__ __forceinline__ void load(const Direction &d, const Place &at, const Lane &l) {
#pragma unroll
    for (int s = 0; s < RANK; s++) {
      const uint2 *const row = (const uint2 *)(d.dt_weight + ((i64)at.channel * RANK + s) * 32) + l.t;
      const uint2 none = make_uint2(0u, 0u), a = at.valid ? row[0] : none, b = at.valid ? row[4 * RANK] : none;
      v[s][0] = a.x, v[s][1] = b.x, v[s][2] = a.y, v[s][3] = b.y;
    }
  }
};

// What a group of 8 tokens reads.
template <class T, int RANK>
struct Raw {
  typename T::Pair x[2], B[2], C[2], dt[2];  // of tokens t, t + 4; C of the token of this lane's column
  uint2 dt_r[RANK > 0 ? RANK : 1];           // instead of dt, also of the column
};

// Walks a sequence of (x, dt, B, C) group by group, from one end or the other. BRANCH: whole groups are loaded without
// predicates, which pays where the warp is the bottleneck (see docs/log.md).
template <class T, int RANK, int STEP, bool BRANCH>
struct Walk {
  typedef typename T::Pair P;
  const char *x, *dt, *B, *C;
  int sx, sdt, sB, sC;
  __device__ __forceinline__ Walk(const Problem &p, const Direction &d, const Place &at, const Lane &l, int position) {
    const int sign = d.reverse ? -1 : 1;
    const i64 first = d.reverse ? p.length - 1 - position : position;
    sx = sign * d.x_token, sdt = sign * d.dt_token, sB = sign * d.B_token, sC = sign * d.C_token;
    const int pair = at.channel / 2 * T::PAIR_BYTES;
    x = d.x + at.batch * d.x_batch + first * d.x_token + l.t * sx + pair;
    dt = d.dt + at.batch * d.dt_batch + first * d.dt_token + (RANK ? l.column * sdt + 8 * l.t : l.t * sdt + pair);
    B = d.B + at.batch * d.B_batch + first * d.B_token + l.t * sB + l.g * T::PAIR_BYTES;
    C = d.C + at.batch * d.C_batch + first * d.C_token + l.column * sC + 2 * l.t * T::PAIR_BYTES;
  }
  // valid: this lane's channels exist; whole: those of all lanes do
  __device__ __forceinline__ void load(Raw<T, RANK> &r, int left, const Lane &l, bool valid, bool whole) {
    if (BRANCH && left >= 8 && whole) {
#pragma unroll
      for (int q = 0; q < 2; q++) {
        r.x[q] = *(const P *)(x + 4 * q * sx), r.B[q] = load_pair<P>(B + 4 * q * sB);
        r.C[q] = load_pair<P>(C + q * T::PAIR_BYTES);
        if (RANK == 0) r.dt[q] = load_pair<P>(dt + 4 * q * sdt);
      }
#pragma unroll
      for (int s = 0; s < RANK; s++) r.dt_r[s] = __ldg((const uint2 *)(dt + 32 * s));
    } else if (!BRANCH || left > 0) {
#pragma unroll
      for (int q = 0; q < 2; q++) {
        const bool here = l.t + 4 * q < left;
        r.x[q] = r.B[q] = r.C[q] = T::pack(0.f, 0.f), r.dt[q] = T::no_step();
        if (here && valid) r.x[q] = *(const P *)(x + 4 * q * sx);
        if (RANK == 0) load_pair(r.dt[q], dt + 4 * q * sdt, here && valid);
        load_pair(r.B[q], B + 4 * q * sB, here);
        load_pair(r.C[q], C + q * T::PAIR_BYTES, l.column < left);
      }
#pragma unroll
      for (int s = 0; s < RANK; s++) {
        r.dt_r[s] = make_uint2(0u, 0u);
        if (l.column < left) r.dt_r[s] = __ldg((const uint2 *)(dt + 32 * s));
      }
    }
    x += 8 * STEP * sx, dt += 8 * STEP * sdt, B += 8 * STEP * sB, C += 8 * STEP * sC;
  }
};

// to the 11 bits that the tensor cores read
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return T::EXACT ? x : number(bits(x) + 0x1000u);
}

// A group of 8 tokens, ready for the recurrence.
template <class T, int RANK, bool SOFTPLUS>
struct Group {
  float dt[2][2], dtx[2][2], B[2][2], C[2][2];  // [half of the tokens][channel], [half][n-block], [n-block][k]
  typename T::Pair x[2];
  template <bool MASKED = false>
  __device__ __forceinline__ void prepare(const Raw<T, RANK> &r, const StepWeights<RANK> &weights, float2 bias, int left,
                                          const Lane &l) {
    float product[4];  // channels 2g, 2g+1 of the tokens t and t + 4: one product gives the lane what it needs
    clear(product);
#pragma unroll
    for (int s = 0; s < RANK; s++) mma_k16(T(), product, weights.v[s], r.dt_r[s].x, r.dt_r[s].y);
#pragma unroll
    for (int q = 0; q < 2; q++) {
      float a = fmaf(RANK ? product[q] : T::first(r.dt[q]), LOG2E, bias.x);
      float b = fmaf(RANK ? product[2 + q] : T::second(r.dt[q]), LOG2E, bias.y);
      if (SOFTPLUS) a = softplus<T::EXACT>(a), b = softplus<T::EXACT>(b);
      if (RANK || !SOFTPLUS || MASKED) {  // a step of 0 leaves the state as it is
        const bool here = l.t + 4 * q < left;
        a = here ? a : 0.f, b = here ? b : 0.f;
      }
      dt[q][0] = a, dt[q][1] = b;
      dtx[q][0] = rounded<T>(dt[q][0] * T::first(r.x[q])), dtx[q][1] = rounded<T>(dt[q][1] * T::second(r.x[q]));
      x[q] = r.x[q];
      B[q][0] = T::first(r.B[q]), B[q][1] = T::second(r.B[q]);
      C[0][q] = T::first(r.C[q]), C[1][q] = T::second(r.C[q]);
    }
  }
  __device__ __forceinline__ void decays(float (&a)[2][4], const Tile &A, int token) const {
    const int q = token >> 2, j = token & 3;
    const float d0 = __shfl_sync(~0u, dt[q][0], j, 4), d1 = __shfl_sync(~0u, dt[q][1], j, 4);
#pragma unroll
    for (int e = 0; e < 2; e++)
#pragma unroll
      for (int i = 0; i < 4; i++) a[e][i] = decay<T::EXACT>((i < 2 ? d0 : d1) * A.v[e][i]);
  }
  __device__ __forceinline__ void inputs(float (&u)[2][4], int token, bool mine) const {
    const int q = token >> 2;
    const float a0 = mine ? dtx[q][0] : 0.f, a1 = mine ? dtx[q][1] : 0.f;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      clear(u[e]);
      mma_k4(u[e], bits(a0), bits(a1), bits(B[q][e]));
      if (T::EXACT) {
        mma_k4(u[e], low_part(a0), low_part(a1), bits(B[q][e]));
        mma_k4(u[e], bits(a0), bits(a1), low_part(B[q][e]));
      }
    }
  }
  __device__ __forceinline__ void outputs(float (&kept)[2][2], const float (&h)[2][4], int token, bool mine) const {
    const int q = token >> 2;
    float y[4];
    clear(y);
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const u32 all[4] = {bits(h[e][0]), bits(h[e][1]), bits(h[e][2]), bits(h[e][3])};
      mma_k8(y, all, bits(C[e][0]), bits(C[e][1]));
      if (T::EXACT) {
        const u32 low[4] = {low_part(h[e][0]), low_part(h[e][1]), low_part(h[e][2]), low_part(h[e][3])};
        mma_k8(y, low, bits(C[e][0]), bits(C[e][1]));
        mma_k8(y, all, low_part(C[e][0]), low_part(C[e][1]));
      }
    }
    const bool take = mine || (token & 3) == 0;
    kept[q][0] = take ? y[q] : kept[q][0], kept[q][1] = take ? y[2 + q] : kept[q][1];
  }
  __device__ __forceinline__ void write(char *y, int stride, const float (&kept)[2][2], float2 D, int left, const Lane &l,
                                        bool valid) const {
    const float scale = T::EXACT ? LN2 : LN2 * TRUNCATION;
#pragma unroll
    for (int q = 0; q < 2; q++)
      if (valid && l.t + 4 * q < left)
        *(typename T::Pair *)(y + 4 * q * stride) =
            T::pack(fmaf(D.x, T::first(x[q]), kept[q][0] * scale), fmaf(D.y, T::second(x[q]), kept[q][1] * scale));
  }
};

__device__ __forceinline__ float2 pair_of(const float *p, int channel, bool valid, float scale) {
  if (p == nullptr || !valid) return make_float2(0.f, 0.f);
  const float2 v = *(const float2 *)(p + channel);
  return make_float2(v.x * scale, v.y * scale);
}
// A warp's turn in a ring begins when the warp before has handed over the state. The slot that the turn writes was read by
// the warp after before it handed on, so round the ring before this turn. compute-sanitizer's racecheck follows neither
// bar.arrive nor such a chain: for it the turns can be taken at mbarriers, at which the reader arrives too, but slower.
#ifdef TURNS_BY_MBARRIER
__device__ __forceinline__ u32 turn_address(int barrier) {
  __shared__ unsigned long long turns[16];
  return (u32)__cvta_generic_to_shared(turns + barrier);
}
__device__ __forceinline__ void begin_turns() {
  if (threadIdx.x < 16) asm volatile("mbarrier.init.shared::cta.b64 [%0], 64;" ::"r"(turn_address(threadIdx.x)) : "memory");
  __syncthreads();
}
__device__ __forceinline__ void wait_for_turn(int barrier, int number) {
  asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
                   turn_address(barrier)),
               "r"(number & 1)
               : "memory");
}
__device__ __forceinline__ void arrive_at(int barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(turn_address(barrier)) : "memory");
}
__device__ __forceinline__ void release_slot(int barrier) { arrive_at(barrier); }
#else
__device__ __forceinline__ void begin_turns() {}
__device__ __forceinline__ void wait_for_turn(int barrier, int) { asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void arrive_at(int barrier) { asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void release_slot(int) {}
#endif

// Number of this thread's warp, known to be the same in all its lanes.
__device__ __forceinline__ int warp_of_block() { return __shfl_sync(~0u, (int)(threadIdx.x >> 5), 0); }

// One ring a chunk of every sequence: y and the last state, or the states that the backward needs, or both.
template <class T, int RANK, bool SOFTPLUS, bool Y, bool STATES>
__device__ __forceinline__ void scan_forward(const Problem &p) {
  __shared__ float4 slots[MAX_RINGS * WARPS][64];
  begin_turns();
  wait_for_kernel_before();
  const Lane l;
  const int warp = warp_of_block(), ring = warp / WARPS, w = warp % WARPS, next = w + 1 == WARPS ? 0 : w + 1;
  const int previous = w == 0 ? WARPS - 1 : w - 1;
  const i64 unit = (i64)blockIdx.x * (blockDim.x / (32 * WARPS)) + ring;
  const i64 tile = unit / p.num_chunks;
  const int chunk = (int)(unit - tile * p.num_chunks);
  const Place at(p, tile, l);
  if (at.direction >= p.num_directions) return;
  const Direction &d = p.direction[at.direction];
  float4(*slot)[64] = slots + ring * WARPS;
  const int barrier = 1 + ring * WARPS;
  const int start = chunk * p.chunk_length, length = min(p.length - start, p.chunk_length);
  Walk<T, RANK, WARPS, false> walk(p, d, at, l, start + 8 * w);
  const int sy = (d.reverse ? -1 : 1) * p.channels * (T::PAIR_BYTES / 2);
  char *y = d.y + ((i64)at.batch * p.length + (d.reverse ? p.length - 1 : 0)) * p.channels * (T::PAIR_BYTES / 2) +
            (i64)(start + 8 * w + l.t) * sy + at.channel / 2 * T::PAIR_BYTES;
  Tile A;
  A.load_rows(d.A + (i64)at.channel * 16, l.t, at.valid, 1.f);
  const float2 bias = pair_of(d.dt_bias, at.channel, at.valid, LOG2E), D = pair_of(d.D, at.channel, at.valid, 1.f);
  StepWeights<RANK> weights;
  weights.load(d, at, l);
  uint4 *states = p.states + (tile * (i64)((p.length + 7) / 8) + start / 8 + w) * 32 + l.lane;
  Raw<T, RANK> raw;
  walk.load(raw, length - 8 * w, l, at.valid, at.whole);
  Tile h;
  if (w == 0) {  // the state entering the chunk: that entering the sequence, carried through the chunks before
    h.clear_all();
    if (d.initial_state != nullptr)
      h.load_rows(d.initial_state + ((i64)at.batch * p.channels + at.channel) * 16, l.t, at.valid, LOG2E);
#pragma unroll 4
    for (int c = 0; c < chunk; c++) {
      Tile end;
      end.load(p.carry + (tile * p.num_chunks + c) * 64, l.lane);
      const float2 sum = p.carry_dt[(tile * p.num_chunks + c) * 32 + l.lane];
#pragma unroll
      for (int e = 0; e < 2; e++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          h.v[e][i] = fmaf(ex2((i < 2 ? sum.x : sum.y) * A.v[e][i]), h.v[e][i], end.v[e][i]);
    }
    h.store(slot[0], l.lane);
  }
  const bool always = p.chunk_length > 0;
  int turn = w == 0 ? -1 : 0, left = length - 8 * w;
  if (w >= 2 && left > -8) release_slot(barrier + previous);  // nothing is in the slot yet
  Group<T, RANK, SOFTPLUS> group;
  float a[8][2][4];
  group.prepare(raw, weights, bias, left, l);
  walk.load(raw, left - 8 * WARPS, l, at.valid, at.whole);
#pragma unroll
  for (int k = 0; k < 8; k++) group.decays(a[k], A, k);
#pragma unroll 1
  for (; left > 0; left -= 8 * WARPS) {
    if (turn >= 0) wait_for_turn(barrier + w, turn);
    turn++;
    h.load(slot[w], l.lane);
    if (STATES) *states = h.packed(), states += WARPS * 32;
#pragma unroll
    for (int k = 0; k < 8; k++) {
      float u[2][4];
      group.inputs(u, k, l.t == (k & 3));
#pragma unroll
      for (int e = 0; e < 2; e++)
#pragma unroll
        for (int i = 0; i < 4; i++) a[k][e][i] = h.v[e][i] = fmaf(a[k][e][i], h.v[e][i], u[e][i]);
    }
    h.store(slot[next], l.lane);
    if (left > 8) arrive_at(barrier + next);
    if (left > 8 * (WARPS - 1)) release_slot(barrier + previous);
    // y of this turn and the decays of the next. The branch, always taken, keeps the assembler from beginning with y in the
    // turn, where others wait.
    if (always) {
      Group<T, RANK, SOFTPLUS> following;
      following.prepare(raw, weights, bias, left - 8 * WARPS, l);
      walk.load(raw, left - 16 * WARPS, l, at.valid, at.whole);
      float kept[2][2];
#pragma unroll
      for (int k = 0; k < 8; k++) {
        if (Y) group.outputs(kept, a[k], k, l.t == (k & 3));
        following.decays(a[k], A, k);
      }
      if (Y) group.write(y, sy, kept, D, left, l, at.valid);
      group = following;
    }
    y += 8 * WARPS * sy;
  }
  left += 8 * WARPS;  // of this warp's last group
  if (left > 0 && left <= 8 && start + length == p.length && d.last_state != nullptr && at.valid)
    h.store_rows(d.last_state + ((i64)at.batch * p.channels + at.channel) * 16, l.t, LN2);
}

// The same with one warp a sequence tile: for many sequences.
template <class T, int RANK, bool SOFTPLUS, bool Y, bool STATES>
__device__ __forceinline__ void scan_sequence(const Problem &p) {
  wait_for_kernel_before();
  const Lane l;
  const Place at(p, blockIdx.x, l);
  const Direction &d = p.direction[at.direction];
  Walk<T, RANK, 1, true> walk(p, d, at, l, 0);
  const int sy = (d.reverse ? -1 : 1) * p.channels * (T::PAIR_BYTES / 2);
  char *y = d.y + ((i64)at.batch * p.length + (d.reverse ? p.length - 1 : 0)) * p.channels * (T::PAIR_BYTES / 2) + l.t * sy +
            at.channel / 2 * T::PAIR_BYTES;
  Tile A, h;
  A.load_rows(d.A + (i64)at.channel * 16, l.t, at.valid, 1.f);
  h.clear_all();
  if (d.initial_state != nullptr)
    h.load_rows(d.initial_state + ((i64)at.batch * p.channels + at.channel) * 16, l.t, at.valid, LOG2E);
  const float2 bias = pair_of(d.dt_bias, at.channel, at.valid, LOG2E), D = pair_of(d.D, at.channel, at.valid, 1.f);
  StepWeights<RANK> weights;
  weights.load(d, at, l);
  Raw<T, RANK> raw;
  walk.load(raw, p.length, l, at.valid, at.whole);
  uint4 *states = p.states + at.tile * ((p.length + 7) / 8) * 32 + l.lane;
#pragma unroll 1
  for (int left = p.length; left > 0; left -= 8) {
    Group<T, RANK, SOFTPLUS> group;
    group.prepare(raw, weights, bias, left, l);
    walk.load(raw, left - 8, l, at.valid, at.whole);
    if (STATES) *states = h.packed(), states += 32;
    float kept[2][2];
#pragma unroll
    for (int k = 0; k < 8; k++) {
      float a[2][4], u[2][4];
      group.decays(a, A, k);
      group.inputs(u, k, l.t == (k & 3));
#pragma unroll
      for (int e = 0; e < 2; e++)
#pragma unroll
        for (int i = 0; i < 4; i++) h.v[e][i] = fmaf(a[e][i], h.v[e][i], u[e][i]);
      if (Y) group.outputs(kept, h.v, k, l.t == (k & 3));
    }
    if (Y) group.write(y, sy, kept, D, left, l, at.valid), y += 8 * sy;
  }
  if (d.last_state != nullptr && at.valid)
    h.store_rows(d.last_state + ((i64)at.batch * p.channels + at.channel) * 16, l.t, LN2);
}

// End state from zero and sum of dt of every chunk but the last of a sequence: PARTS warps take a part each.
template <class T, int RANK, bool SOFTPLUS>
__device__ __forceinline__ void scan_chunks(const Problem &p) {
  __shared__ float4 ends[MAX_RINGS * PARTS][64];
  __shared__ float2 sums[MAX_RINGS * PARTS][32];
  wait_for_kernel_before();
  const Lane l;
  const int warp = warp_of_block(), ring = warp / PARTS, w = warp % PARTS;
  const i64 unit = (i64)blockIdx.x * (blockDim.x / (32 * PARTS)) + ring;
  const i64 tile = unit / (p.num_chunks - 1);
  const int chunk = (int)(unit - tile * (p.num_chunks - 1));
  const Place at(p, tile, l);
  const bool exists = at.direction < p.num_directions;
  const Direction &d = p.direction[exists ? at.direction : 0];
  const int part = p.chunk_length / PARTS;
  Tile A, h;
  h.clear_all();
  float2 sum = make_float2(0.f, 0.f);
  if (exists) {
    A.load_rows(d.A + (i64)at.channel * 16, l.t, at.valid, 1.f);
    const float2 bias = pair_of(d.dt_bias, at.channel, at.valid, LOG2E);
    StepWeights<RANK> weights;
    weights.load(d, at, l);
    Walk<T, RANK, 1, true> walk(p, d, at, l, chunk * p.chunk_length + w * part);
    Raw<T, RANK> raw;
    walk.load(raw, part, l, at.valid, at.whole);
#pragma unroll 1
    for (int left = part; left > 0; left -= 8) {
      Group<T, RANK, SOFTPLUS> group;
      group.prepare(raw, weights, bias, left, l);
      walk.load(raw, left - 8, l, at.valid, at.whole);
      sum.x += group.dt[0][0] + group.dt[1][0], sum.y += group.dt[0][1] + group.dt[1][1];
#pragma unroll
      for (int k = 0; k < 8; k++) {
        float a[2][4], u[2][4];
        group.decays(a, A, k);
        group.inputs(u, k, l.t == (k & 3));
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
          for (int i = 0; i < 4; i++) h.v[e][i] = fmaf(a[e][i], h.v[e][i], u[e][i]);
      }
    }
#pragma unroll
    for (int o = 1; o < 4; o *= 2) sum.x += __shfl_xor_sync(~0u, sum.x, o), sum.y += __shfl_xor_sync(~0u, sum.y, o);
    h.store(ends[warp], l.lane);
    sums[warp][l.lane] = sum;
  }
  __syncthreads();
  if (!exists || w != 0) return;
  for (int j = 1; j < PARTS; j++) {
    Tile end;
    end.load(ends[warp + j], l.lane);
    const float2 more = sums[warp + j][l.lane];
    sum.x += more.x, sum.y += more.y;
#pragma unroll
    for (int e = 0; e < 2; e++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        h.v[e][i] = fmaf(ex2((i < 2 ? more.x : more.y) * A.v[e][i]), h.v[e][i], end.v[e][i]);
  }
  h.store(p.carry + (tile * p.num_chunks + chunk) * 64, l.lane);
  p.carry_dt[(tile * p.num_chunks + chunk) * 32 + l.lane] = sum;
}

__device__ __forceinline__ u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }
__device__ __forceinline__ u32 transposed(u32 a) {
  u32 r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}
// Adds a pair to its sum, which is this warp's own where sums must not depend on the order.
__device__ __forceinline__ void add_pair(float *p, float a, float b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1,%2};" ::"l"(p), "f"(a), "f"(b) : "memory");
#else
  atomicAdd(p, a), atomicAdd(p + 1, b);
#endif
}

// One column a token of a product whose columns are tokens; lane (g, t) keeps those of tokens t and t + 4.
struct OwnColumns {
  float v[2][2];  // [half of the tokens][row g, row g + 8]
  __device__ __forceinline__ void keep(const float (&product)[4], int token, bool first, const Lane &l) {
    const int q = token >> 2;
    const bool take = first || l.t == (token & 3);
    v[q][0] = take ? product[q] : v[q][0], v[q][1] = take ? product[2 + q] : v[q][1];
  }
  // rows of two neighbours a lane, for tokens t and t + 4
  __device__ __forceinline__ void add_rows(float *p, int four, int left, const Lane &l) const {
    if (l.t < left) add_pair(p, v[0][0] * LN2, v[0][1] * LN2);
    if (l.t + 4 < left) add_pair(p + four, v[1][0] * LN2, v[1][1] * LN2);
  }
};

// Sums over the tile's channels of values (channel, state) times weights (channel, token), whose columns are tokens.
struct ChannelWeights {
  u32 even, odd;  // channels 4t, 4t+2 and 4t+1, 4t+3 of the token of this lane's column
  __device__ __forceinline__ void sum(float (&product)[4], const uint4 &v) const {
    const u32 rows[4] = {transposed(v.x), transposed(v.z), transposed(v.y), transposed(v.w)};
    clear(product);
    mma_k16(Bf16(), product, rows, even, odd);
  }
};

// What a group's turn in the backward reads, fetched one turn ahead: the state entering it, and a row a token of 16
// channels of x, of dy and of dt where it is given, then [dt_r | B | C | padding].
template <int RANK>
struct Stage {
  static constexpr int PIECES = 2 * RANK + 4;  // of 16 bytes, of [dt_r | B | C | padding]
  static constexpr int DY = 32, DT = 64, ROWS = RANK ? 64 : 96, TOKEN = ROWS + 16 * PIECES + (RANK == 2 ? 16 : 0);  // bytes
  uint4 state[32];
  char token[8][TOKEN];
};

// Fetches the groups of a sequence from the last to the first, every STEP-th.
template <int RANK, int STEP>
struct Fetch {
  typedef Stage<RANK> S;
  const char *state, *activation, *row, *dt;
  int activation_step, row_step, dt_step;
  __device__ __forceinline__ Fetch(const Problem &p, const Direction &d, const Place &at, const Lane &l, int group) {
    const int sign = d.reverse ? -1 : 1;
    const auto token = [&](int k) { return (i64)(d.reverse ? p.length - 1 - 8 * group - k : 8 * group + k); };
    const int k = (l.lane & 15) >> 1, bytes = 2 * (at.channel - 2 * l.g) + 16 * (l.lane & 1);
    state = (const char *)(p.states + (at.tile * ((p.length + 7) / 8) + group) * 32 + l.lane);
    activation = l.lane < 16 ? d.x + at.batch * d.x_batch + token(k) * d.x_token + bytes
                             : d.dy + at.batch * d.dy_batch + token(k) * d.dy_token + bytes;
    activation_step = -8 * STEP * sign * (l.lane < 16 ? d.x_token : d.dy_token);
    row = d.B + at.batch * d.B_batch + token(l.g) * d.B_token - 2 * p.rank + 16 * l.t;
    row_step = -8 * STEP * sign * d.B_token;
    if (RANK > 0) return;
    dt = d.dt + at.batch * d.dt_batch + token(k) * d.dt_token + bytes, dt_step = -8 * STEP * sign * d.dt_token;
  }
  __device__ __forceinline__ void next(S &to, int left, int pieces, const Lane &l) {
    const int k = (l.lane & 15) >> 1, part = 16 * (l.lane & 1);
    copy_async<16>(to.state + l.lane, state, left > 0);
    copy_async<16>(to.token[k] + 2 * (l.lane & 16) + part, activation, k < left);
#pragma unroll
    for (int i = 0; i < S::PIECES; i += 4)
      if (l.t + i < pieces) copy_async<16>(to.token[l.g] + S::ROWS + 16 * (l.t + i), row + 16 * i, l.g < left);
    if (RANK == 0 && l.lane < 16) copy_async<16>(to.token[k] + S::DT + part, dt, k < left);
    if (RANK == 0) dt += dt_step;
    state -= STEP * 512, activation += activation_step, row += row_step;
  }
};

// Shared memory of a warp in the backward.
template <int RANK>
struct BackwardWarp {
  Stage<RANK> stage[2];
  float2 dt[8][8];       // of the turn's tokens and pairs of channels
  float4 after[7][64];   // the states after each token of the turn but the last
  uint4 weight[RANK ? RANK : 1][2][32];  // dt_weight as operands: of dt, and of the gradient of dt_r
};

// All gradients of one scan in bfloat16; channels come in whole tiles. The groups are walked backwards; the states entering
// them come from the forward, so that only the adjoint state is handed on: from turn to turn of a ring, or, where there
// are sequences enough for one warp each (RING false), not at all.
template <int RANK, bool SOFTPLUS, bool RING>
__device__ __forceinline__ void scan_backward(const Problem &p) {
  extern __shared__ float4 memory[];
  typedef Bf16 T;
  if (RING) begin_turns();
  wait_for_kernel_before();
  typedef Stage<RANK> S;
  constexpr int STEP = RING ? WARPS : 1, K_STEPS = RANK ? RANK : 1;
  const Lane l;
  const int warp = RING ? warp_of_block() : 0, w = warp % STEP, next = warp + (w == 0 ? STEP - 1 : -1);
  const int previous = warp + (w == STEP - 1 ? 1 - STEP : 1);
  const Place at(p, RING ? (i64)blockIdx.x * (blockDim.x / (32 * WARPS)) + warp / WARPS : blockIdx.x, l);
  if (at.direction >= p.num_directions) return;
  const Direction &d = p.direction[at.direction];
  float4(*const slot)[64] = (float4(*)[64])memory;  // adjoint states on their way from warp to warp
  BackwardWarp<RANK> &mine = ((BackwardWarp<RANK> *)(memory + (RING ? 2 * blockDim.x : 0)))[warp];
  const int sign = d.reverse ? -1 : 1, end = d.reverse ? p.length - 1 : 0;
  Tile A, dA, G;
  A.load_rows(d.A + (i64)at.channel * 16, l.t, true, 1.f);
  dA.clear_all();
  float2 dD = make_float2(0.f, 0.f), dbias = dD;
  float dweight[K_STEPS][2][4];
#pragma unroll
  for (int s = 0; s < RANK; s++) clear(dweight[s][0]), clear(dweight[s][1]);
  if (RANK) {
    StepWeights<RANK> weights;
    weights.load(d, at, l);
#pragma unroll
    for (int s = 0; s < RANK; s++) {
      const u32 *const from = (const u32 *)(d.dt_weight + ((i64)(at.channel - 2 * l.g + 4 * l.t) * RANK + s) * 32) + l.g;
      const u32 a = from[0], b = from[8 * RANK], c = from[16 * RANK], e = from[24 * RANK];
      mine.weight[s][0][l.lane] = make_uint4(weights.v[s][0], weights.v[s][1], weights.v[s][2], weights.v[s][3]);
      mine.weight[s][1][l.lane] = make_uint4(low_halves(a, c), high_halves(a, c), low_halves(b, e), high_halves(b, e));
    }
  }
  const float2 bias = pair_of(d.dt_bias, at.channel, true, LOG2E), D = pair_of(d.D, at.channel, true, 1.f);
  const int groups = (p.length + 7) / 8, last = RING ? (groups + WARPS - 1) / WARPS * WARPS - WARPS + w : groups - 1;
  const int pieces = p.width / 8, B_at = S::ROWS + 2 * p.rank, C_at = B_at + 32;
  const i64 first_row = (i64)at.batch * p.length + end + sign * (8 * last + l.t);
  char *dx = d.dx + (first_row * p.channels + at.channel) * 2;
  const i64 to_ddt = d.ddt - d.dx;
  const int four_dx = 8 * sign * p.channels, four_row = 4 * sign * p.width;
  float *drow = d.drows + at.channel / 16 * p.partial_stride + first_row * p.width + 2 * l.g;
  Fetch<RANK, STEP> fetch(p, d, at, l, last);
  fetch.next(mine.stage[0], p.length - 8 * last, pieces, l);
  asm volatile("cp.async.commit_group;");
  if (!RING || (w == WARPS - 1)) {
    G.clear_all();
    if (d.dlast_state != nullptr)
      G.load_rows(d.dlast_state + ((i64)at.batch * p.channels + at.channel) * 16, l.t, true, 1.f);
  }
  if (RING && w < WARPS - 2) release_slot(1 + previous);  // nothing is in the slot yet
  int turn = w < WARPS - 1 ? 0 : -1;  // negative: no other warp has had the adjoint state
  int buffer = 0;
#pragma unroll 1
  for (int group_number = last; group_number >= 0; group_number -= STEP) {
    const int left = p.length - 8 * group_number;
    const Stage<RANK> &stage = mine.stage[buffer];
    buffer ^= 1;
    if (group_number >= STEP) fetch.next(mine.stage[buffer], left + 8 * STEP, pieces, l);
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncwarp();
    const char *const of_pair = stage.token[l.t] + 4 * l.g, *const of_column = stage.token[l.column] + 8 * l.t;
    Group<T, RANK, SOFTPLUS> group;
    {
      Raw<T, RANK> raw;
      StepWeights<RANK> weights;
#pragma unroll
      for (int s = 0; s < RANK; s++) {
        const uint4 v = mine.weight[s][0][l.lane];
        weights.v[s][0] = v.x, weights.v[s][1] = v.y, weights.v[s][2] = v.z, weights.v[s][3] = v.w;
        raw.dt_r[s] = *(const uint2 *)(of_column + S::ROWS + 32 * s);
      }
#pragma unroll
      for (int q = 0; q < 2; q++) {
        const char *const pair = of_pair + 4 * q * S::TOKEN;
        raw.x[q] = *(const u32 *)pair, raw.B[q] = *(const u32 *)(pair + B_at), raw.C[q] = 0;
        raw.dt[q] = RANK ? 0 : *(const u32 *)(pair + S::DT);
      }
      group.template prepare<true>(raw, weights, bias, left, l);
    }
#pragma unroll
    for (int q = 0; q < 2; q++) mine.dt[l.t + 4 * q][l.g] = make_float2(group.dt[q][0], group.dt[q][1]);
    __syncwarp();
    float a[8][2][4];
    {  // the states again, and the sums over channels that need them
      Tile h;
      h.unpack(stage.state[l.lane]);
      const uint2 dy = *(const uint2 *)(of_column + S::DY);
      const ChannelWeights weights = {low_halves(dy.x, dy.y), high_halves(dy.x, dy.y)};
      OwnColumns dC;
#pragma unroll
      for (int k = 0; k < 8; k++) {
        float u[2][4], product[4];
        const float2 dt = mine.dt[k][l.g];
        group.inputs(u, k, l.t == (k & 3));
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            a[k][e][i] = ex2((i < 2 ? dt.x : dt.y) * A.v[e][i]);
            h.v[e][i] = fmaf(a[k][e][i], h.v[e][i], u[e][i]);
          }
        if (k < 7) h.store(mine.after[k], l.lane);
        weights.sum(product, h.packed());
        dC.keep(product, k, (k & 3) == 0, l);
      }
      dC.add_rows(drow + p.rank + 16, four_row, left, l);
    }
    // what A and dt get: off the chain where others wait for it
    OwnColumns qA;
    const auto of_A_and_dt = [&](int k) {
      Tile before;
      if (k > 0)
        before.load(mine.after[k > 0 ? k - 1 : 0], l.lane);
      else
        before.unpack(stage.state[l.lane]);
      const float2 dt = mine.dt[k][l.g];
      float r0 = 0.f, r1 = 0.f, sums[4];
#pragma unroll
      for (int e = 0; e < 2; e++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float product = a[k][e][i] * before.v[e][i];
          dA.v[e][i] = fmaf(i < 2 ? dt.x : dt.y, product, dA.v[e][i]);
          if (i < 2)
            r0 = fmaf(A.v[e][i], product, r0);
          else
            r1 = fmaf(A.v[e][i], product, r1);
        }
      clear(sums);
      mma_k4(sums, bits(r0), bits(r1), bits(1.f));
      qA.keep(sums, k, (k & 3) == 3, l);
    };
    // the adjoint chain: a_k becomes a_k g_k
    OwnColumns gB;
    {
      float c[2][2];
      u32 dy[2];
#pragma unroll
      for (int q = 0; q < 2; q++) {
        const char *const pair = of_pair + 4 * q * S::TOKEN;
        const u32 C = *(const u32 *)(pair + C_at);
        c[q][0] = T::first(C), c[q][1] = T::second(C), dy[q] = *(const u32 *)(pair + S::DY);
      }
      const uint2 b = *(const uint2 *)(of_column + B_at);
      const u32 B[2] = {low_halves(b.x, b.y), high_halves(b.x, b.y)};
      const ChannelWeights weights = {transposed(pack_bf16(group.dtx[0][0], group.dtx[1][0])),
                                      transposed(pack_bf16(group.dtx[0][1], group.dtx[1][1]))};
      OwnColumns dB;
      if (RING && turn >= 0) {
        wait_for_turn(1 + warp, turn);
        G.load(slot[warp], l.lane);
      }
      turn++;
#pragma unroll
      for (int k = 7; k >= 0; k--) {
        const int q = k >> 2;
        const bool own = l.t == (k & 3);
        const u32 a0 = own ? bits(T::first(dy[q])) : 0u, a1 = own ? bits(T::second(dy[q])) : 0u;
        float product[4];
        mma_k4(G.v[0], a0, a1, bits(c[q][0])), mma_k4(G.v[1], a0, a1, bits(c[q][1]));
        const uint4 g = G.packed();
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
          for (int i = 0; i < 4; i++) a[k][e][i] = G.v[e][i] = G.v[e][i] * a[k][e][i];
        const u32 rows[4] = {g.x, g.y, g.z, g.w};
        clear(product);
        mma_k16(T(), product, rows, B[0], B[1]);
        gB.keep(product, k, (k & 3) == 3, l);
        weights.sum(product, g);
        dB.keep(product, k, (k & 3) == 3, l);
        if (!RING) of_A_and_dt(k);
      }
      if (RING && group_number > 0) {
        G.store(slot[next], l.lane);
        arrive_at(1 + next);
        if (group_number >= STEP - 1) release_slot(1 + previous);
      }
      dB.add_rows(drow + p.rank, four_row, left, l);
    }
    if (RING) {
#pragma unroll
      for (int k = 7; k >= 0; k--) of_A_and_dt(k);
    }
    float e[2][2];
#pragma unroll
    for (int q = 0; q < 2; q++) {
      const u32 x = group.x[q], dy = *(const u32 *)(of_pair + 4 * q * S::TOKEN + S::DY);
      const float x0 = T::first(x), x1 = T::second(x), y0 = T::first(dy), y1 = T::second(dy);
      e[q][0] = fmaf(x0, gB.v[q][0], LN2 * TRUNCATION * qA.v[q][0]);
      e[q][1] = fmaf(x1, gB.v[q][1], LN2 * TRUNCATION * qA.v[q][1]);
      if (SOFTPLUS) e[q][0] *= 1.f - ex2(-group.dt[q][0]), e[q][1] *= 1.f - ex2(-group.dt[q][1]);
      dD.x = fmaf(x0, y0, dD.x), dD.y = fmaf(x1, y1, dD.y);
      if (l.t + 4 * q < left) {
        dbias.x += e[q][0], dbias.y += e[q][1];
        const float dx0 = LN2 * group.dt[q][0] * gB.v[q][0], dx1 = LN2 * group.dt[q][1] * gB.v[q][1];
        *(u32 *)(dx + q * four_dx) = pack_bf16(fmaf(D.x, y0, dx0), fmaf(D.y, y1, dx1));
        if (RANK == 0) *(u32 *)(dx + q * four_dx + to_ddt) = pack_bf16(e[q][0], e[q][1]);
      }
    }
    if (RANK) {  // the steps' gradient times the weights, and times dt_r
      const u32 even = pack_bf16(e[0][0], e[1][0]), odd = pack_bf16(e[0][1], e[1][1]);
      const u32 even_rows = transposed(even), odd_rows = transposed(odd);
#pragma unroll
      for (int s = 0; s < RANK; s++) {
        const uint4 v = mine.weight[s][1][l.lane];
        const u32 rows[4] = {v.x, v.y, v.z, v.w};
        float product[4];
        clear(product);
        mma_k16(T(), product, rows, even_rows, odd_rows);
        const bool exists = 16 * s + 2 * l.g < p.rank;
        if (exists && l.t < left) add_pair(drow + 16 * s, product[0], product[2]);
        if (exists && l.t + 4 < left) add_pair(drow + four_row + 16 * s, product[1], product[3]);
        u32 dt_r[2];
        const int r = l.lane & 7;
        const char *const row = stage.token[(r >> 1) + 4 * (r & 1)] + S::ROWS + 32 * s + 2 * (l.lane & 8);
        const u32 from = (u32)__cvta_generic_to_shared(row);
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(dt_r[0]), "=r"(dt_r[1])
                     : "r"(from));
        mma_k8(dweight[s][0], even, odd, dt_r[0]), mma_k8(dweight[s][1], even, odd, dt_r[1]);
      }
    }
    dx -= 2 * STEP * four_dx, drow -= 2 * STEP * four_row;
    __syncwarp();
  }
  if (w == 0 && d.dinitial_state != nullptr)
    G.store_rows(d.dinitial_state + ((i64)at.batch * p.channels + at.channel) * 16, l.t, 1.f);
  // parameters: sums, or one part a warp for the caller to sum
#pragma unroll
  for (int o = 1; o < 4; o *= 2) {
    dbias.x += __shfl_xor_sync(~0u, dbias.x, o), dbias.y += __shfl_xor_sync(~0u, dbias.y, o);
    dD.x += __shfl_xor_sync(~0u, dD.x, o), dD.y += __shfl_xor_sync(~0u, dD.y, o);
  }
  const i64 part = (p.partial_stride == 0 ? 0 : ((i64)at.batch * STEP + w) * p.channels) + at.channel;
#pragma unroll
  for (int c = 0; c < 2; c++) {
    float *const to = d.dA + (part + c) * 16 + 4 * l.t;
    add_pair(to, dA.v[0][2 * c] * (LN2 * LN2), dA.v[1][2 * c] * (LN2 * LN2));
    add_pair(to + 2, dA.v[0][2 * c + 1] * (LN2 * LN2), dA.v[1][2 * c + 1] * (LN2 * LN2));
#pragma unroll
    for (int s = 0; s < RANK; s++)
#pragma unroll
      for (int j = 0; j < 2; j++)
        add_pair(d.ddt_weight + (part + c) * (16 * RANK) + 16 * s + 8 * j + 2 * l.t, dweight[s][j][2 * c],
             dweight[s][j][2 * c + 1]);
  }
  if (l.t == 0) add_pair(d.ddt_bias + part, dbias.x, dbias.y), add_pair(d.dD + part, dD.x, dD.y);
}

#define FORWARD(NAME, T, RANK, SOFTPLUS)                                                                      \
  extern "C" __global__ void __launch_bounds__(32 * WARPS *MAX_RINGS, 1)                                      \
      scan_forward_kernel_##NAME(const __grid_constant__ Problem p) {                                         \
    scan_forward<T, RANK, SOFTPLUS, true, false>(p);                                                          \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(32, 20)                                                        \
      scan_sequence_kernel_##NAME(const __grid_constant__ Problem p) {                                        \
    scan_sequence<T, RANK, SOFTPLUS, true, false>(p);                                                         \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(32 * PARTS *MAX_RINGS, 1)                                      \
      scan_chunks_kernel_##NAME(const __grid_constant__ Problem p) {                                          \
    scan_chunks<T, RANK, SOFTPLUS>(p);                                                                        \
  }
FORWARD(bfloat16_softplus, Bf16, 0, true)
FORWARD(bfloat16, Bf16, 0, false)
FORWARD(bfloat16_rank16, Bf16, 1, true)
FORWARD(bfloat16_rank32, Bf16, 2, true)
FORWARD(bfloat16_rank48, Bf16, 3, true)
FORWARD(float16_softplus, Fp16, 0, true)
FORWARD(float16, Fp16, 0, false)
FORWARD(float16_rank16, Fp16, 1, true)
FORWARD(float16_rank32, Fp16, 2, true)
FORWARD(float16_rank48, Fp16, 3, true)
FORWARD(float32_softplus, Fp32, 0, true)
FORWARD(float32, Fp32, 0, false)

// y and the states that the backward needs, or the states alone.
#define STATES(KIND, NAME, RANK, SOFTPLUS, Y)                                                                 \
  extern "C" __global__ void __launch_bounds__(32 * WARPS *MAX_RINGS, 1)                                      \
      scan_##KIND##_kernel_##NAME(const __grid_constant__ Problem p) {                                        \
    scan_forward<Bf16, RANK, SOFTPLUS, Y, true>(p);                                                           \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(32, 20)                                                        \
      scan_sequence_##KIND##_kernel_##NAME(const __grid_constant__ Problem p) {                               \
    scan_sequence<Bf16, RANK, SOFTPLUS, Y, true>(p);                                                          \
  }
STATES(both, bfloat16_softplus, 0, true, true)
STATES(both, bfloat16, 0, false, true)
STATES(both, bfloat16_rank16, 1, true, true)
STATES(both, bfloat16_rank32, 2, true, true)
STATES(both, bfloat16_rank48, 3, true, true)
STATES(states, bfloat16_rank16, 1, true, false)
STATES(states, bfloat16_rank32, 2, true, false)
STATES(states, bfloat16_rank48, 3, true, false)

#define BACKWARD(NAME, RANK, SOFTPLUS)                                                                        \
  extern "C" __global__ void __launch_bounds__(32 * WARPS *MAX_RINGS, 1)                                      \
      scan_backward_kernel_##NAME(const __grid_constant__ Problem p) {                                        \
    scan_backward<RANK, SOFTPLUS, true>(p);                                                                   \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(32, 12)                                                        \
      scan_sequence_backward_kernel_##NAME(const __grid_constant__ Problem p) {                               \
    scan_backward<RANK, SOFTPLUS, false>(p);                                                                  \
  }
BACKWARD(bfloat16_softplus, 0, true)
BACKWARD(bfloat16, 0, false)
BACKWARD(bfloat16_rank16, 1, true)
BACKWARD(bfloat16_rank32, 2, true)
BACKWARD(bfloat16_rank48, 3, true)
