// The selective scan on NVIDIA GPUs from sm_80 on, compiled at run time by NVRTC; forward in float32, bfloat16 and
// float16, backward in bfloat16.
//
// Both directions, 16 states, bfloat16, softplus and D inside; us, medians of CUDA graph replays over inputs beyond the
// L2 cache; H200, driver 580.159.04, torch 2.11.0+cu130, 2026-11-23. Roof: the exponential unit at the 1.80 GHz that the
// chip holds while tensor cores work (1.98 GHz otherwise). scan_forward and scan_backward of library.py remake it.
//   (B, d_inner, L)   forward   of the roof   forward + backward (which runs the forward again)
//   (64, 384, 197)         66          70 %      474
//   (8, 384, 6085)        253          70 %     1409
//   (1, 384, 6085)         63          35 %      655   two passes over eight chunks
//
// Plan. A warp owns a tile of 16 channels x 16 states in the accumulator layout of mma.m16n8: lane (g, t) = (lane / 4,
// lane % 4) holds channels 2g, 2g+1 and states 4t .. 4t+3, eight numbers. Tokens come in groups of 8; lane (g, t) loads,
// softplusses and stores channels 2g, 2g+1 of tokens t and t+4, so nothing but a pair of shuffles a token is exchanged.
//   dt x B     is an outer product: mma.m16n8k4 whose k are four tokens, all but one masked to zero,
//   C h        is a product with k = states and n = tokens; each token keeps its own column,
//   exp(dt A)  is one ex2 a state: dt is kept in units of ln 2, the state in units of 1 / ln 2.
// Tensor cores read 11 bits: h is rounded there for y only, never in the recurrence. float32 activations are split in a
// high and a low part (three products), so they lose nothing.
// Ring: four warps take turns at the groups of one sequence and hand the state on through shared memory; a group's 64
// exponentials are ready in registers before its turn. So one sequence keeps four schedulers busy and every exponential
// is computed once. A lone long sequence is cut in chunks: their end states from zero first, then the rings.
// Bytes a channel and token: forward 3 activations (x, dt, y); backward 5 (x, dt, dy, dx, ddt) and 8 of saved states.

struct Direction {
  const char *x, *dt, *B, *C, *dy;
  const float *A, *D, *dt_bias, *initial_state, *dlast_state;
  char *y, *dx, *ddt;
  float *last_state, *dB, *dC, *dA, *dD, *ddt_bias, *dinitial_state;
  i64 x_batch, dt_batch, B_batch, C_batch, dy_batch;  // strides in bytes
  int x_token, dt_token, B_token, C_token, dy_token, reverse;
};

struct Problem {
  Direction direction[2];
  float4 *states;  // entering every group of 8 tokens, [sequence tile][group][2][lane]; for the backward
  float4 *carry;   // end state of every chunk from zero, [sequence tile][chunk][2][lane]
  float2 *carry_dt;
  int batch, length, channels, num_directions, chunk_length, num_chunks;
  i64 partial_stride;  // floats between the channel tiles' partial dB and dC; 0: they are added with atomics
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
    direction = sequence >= p.batch, batch = (int)(sequence - direction * p.batch);
    valid = channel < p.channels, whole = channel - 2 * l.g + 16 <= p.channels;
  }
};

template <class T>
struct Raw {
  typename T::Pair x[2], dt[2], B[2], C[2];
};

// Walks a sequence of (x, dt, B, C) group by group, from one end or the other. BRANCH: whole groups are loaded without
// predicates, which pays where the warp is the bottleneck (see docs/log.md).
template <class T, int STEP, bool BRANCH>
struct Walk {
  const char *x, *dt, *B, *C;
  int sx, sdt, sB, sC;
  __device__ __forceinline__ Walk(const Problem &p, const Direction &d, const Place &at, const Lane &l, int position) {
    const int sign = d.reverse ? -1 : 1;
    const i64 first = d.reverse ? p.length - 1 - position : position;
    sx = sign * d.x_token, sdt = sign * d.dt_token, sB = sign * d.B_token, sC = sign * d.C_token;
    const int pair = at.channel / 2 * T::PAIR_BYTES;
    x = d.x + at.batch * d.x_batch + first * d.x_token + l.t * sx + pair;
    dt = d.dt + at.batch * d.dt_batch + first * d.dt_token + l.t * sdt + pair;
    B = d.B + at.batch * d.B_batch + first * d.B_token + l.t * sB + l.g * T::PAIR_BYTES;
    C = d.C + at.batch * d.C_batch + first * d.C_token + l.column * sC + 2 * l.t * T::PAIR_BYTES;
  }
  // valid: this lane's channels exist; whole: those of all lanes do
  __device__ __forceinline__ void load(Raw<T> &r, int left, const Lane &l, bool valid, bool whole) {
    typedef typename T::Pair P;
    if (BRANCH && left >= 8 && whole) {
#pragma unroll
      for (int q = 0; q < 2; q++) {
        r.x[q] = load_pair<P>(x + 4 * q * sx), r.dt[q] = load_pair<P>(dt + 4 * q * sdt);
        r.B[q] = load_pair<P>(B + 4 * q * sB), r.C[q] = load_pair<P>(C + q * T::PAIR_BYTES);
      }
    } else if (!BRANCH || left > 0) {
#pragma unroll
      for (int q = 0; q < 2; q++) {
        const bool here = l.t + 4 * q < left;
        r.x[q] = r.B[q] = r.C[q] = T::pack(0.f, 0.f), r.dt[q] = T::no_step();
        load_pair(r.x[q], x + 4 * q * sx, here && valid);
        load_pair(r.dt[q], dt + 4 * q * sdt, here && valid);
        load_pair(r.B[q], B + 4 * q * sB, here);
        load_pair(r.C[q], C + q * T::PAIR_BYTES, l.column < left);
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
template <class T, bool SOFTPLUS>
struct Group {
  float dt[2][2], dtx[2][2], B[2][2], C[2][2];  // [half of the tokens][channel], [half][n-block], [n-block][k]
  typename T::Pair x[2];
  template <bool MASKED = false>
  __device__ __forceinline__ void prepare(const Raw<T> &r, float2 bias, int left, const Lane &l) {
#pragma unroll
    for (int q = 0; q < 2; q++) {
      float a = fmaf(T::first(r.dt[q]), LOG2E, bias.x), b = fmaf(T::second(r.dt[q]), LOG2E, bias.y);
      if (SOFTPLUS) a = softplus<T::EXACT>(a), b = softplus<T::EXACT>(b);
      if (!SOFTPLUS || MASKED) {  // a step of 0 leaves the state as it is
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
__device__ __forceinline__ void wait_for(int barrier) { asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void hand_to(int barrier) { asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory"); }

// y of every sequence, one ring a chunk; also its last state and the states that the backward needs.
template <class T, bool SOFTPLUS, bool STATES>
__device__ __forceinline__ void scan_forward(const Problem &p) {
  __shared__ float4 slots[MAX_RINGS * WARPS][64];
  const Lane l;
  const int ring = threadIdx.x / (32 * WARPS), w = (threadIdx.x >> 5) % WARPS, next = w + 1 == WARPS ? 0 : w + 1;
  const i64 unit = (i64)blockIdx.x * (blockDim.x / (32 * WARPS)) + ring;
  const i64 tile = unit / p.num_chunks;
  const int chunk = (int)(unit - tile * p.num_chunks);
  const Place at(p, tile, l);
  if (at.direction >= p.num_directions) return;
  const Direction &d = p.direction[at.direction];
  float4(*slot)[64] = slots + ring * WARPS;
  const int barrier = 1 + ring * WARPS;
  const int start = chunk * p.chunk_length, length = min(p.length - start, p.chunk_length);
  Walk<T, WARPS, false> walk(p, d, at, l, start + 8 * w);
  const int sy = (d.reverse ? -1 : 1) * p.channels * (T::PAIR_BYTES / 2);
  char *y = d.y + ((i64)at.batch * p.length + (d.reverse ? p.length - 1 : 0)) * p.channels * (T::PAIR_BYTES / 2) +
            (i64)(start + 8 * w + l.t) * sy + at.channel / 2 * T::PAIR_BYTES;
  Tile A;
  A.load_rows(d.A + (i64)at.channel * 16, l.t, at.valid, 1.f);
  const float2 bias = pair_of(d.dt_bias, at.channel, at.valid, LOG2E), D = pair_of(d.D, at.channel, at.valid, 1.f);
  float4 *states = p.states + (tile * (i64)((p.length + 7) / 8) + start / 8 + w) * 64;
  Raw<T> raw;
  walk.load(raw, length - 8 * w, l, at.valid, at.whole);
  Tile h;
  if (w == 0) {  // the state entering the chunk: that entering the sequence, carried through the chunks before
    h.clear_all();
    if (d.initial_state != nullptr)
      h.load_rows(d.initial_state + ((i64)at.batch * p.channels + at.channel) * 16, l.t, at.valid, LOG2E);
    if (chunk > 0) wait_for_kernel_before();
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
  bool first = w == 0;
  int left = length - 8 * w;
#pragma unroll 1
  for (; left > 0; left -= 8 * WARPS) {
    Group<T, SOFTPLUS> group;
    group.prepare(raw, bias, left, l);
    walk.load(raw, left - 8 * WARPS, l, at.valid, at.whole);
    float a[8][2][4], kept[2][2];
#pragma unroll
    for (int k = 0; k < 8; k++) group.decays(a[k], A, k);
    if (!first) wait_for(barrier + w);
    first = false;
    h.load(slot[w], l.lane);
    if (STATES) h.store(states, l.lane), states += WARPS * 64;
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
    if (left > 8) hand_to(barrier + next);
#pragma unroll
    for (int k = 0; k < 8; k++) group.outputs(kept, a[k], k, l.t == (k & 3));
    group.write(y, sy, kept, D, left, l, at.valid);
    y += 8 * WARPS * sy;
  }
  left += 8 * WARPS;  // of this warp's last group
  if (left > 0 && left <= 8 && start + length == p.length && d.last_state != nullptr && at.valid)
    h.store_rows(d.last_state + ((i64)at.batch * p.channels + at.channel) * 16, l.t, LN2);
}

// y of every sequence, one warp a sequence tile: for many sequences.
template <class T, bool SOFTPLUS, bool STATES>
__device__ __forceinline__ void scan_sequence(const Problem &p) {
  const Lane l;
  const Place at(p, blockIdx.x, l);
  const Direction &d = p.direction[at.direction];
  Walk<T, 1, true> walk(p, d, at, l, 0);
  const int sy = (d.reverse ? -1 : 1) * p.channels * (T::PAIR_BYTES / 2);
  char *y = d.y + ((i64)at.batch * p.length + (d.reverse ? p.length - 1 : 0)) * p.channels * (T::PAIR_BYTES / 2) + l.t * sy +
            at.channel / 2 * T::PAIR_BYTES;
  Tile A, h;
  A.load_rows(d.A + (i64)at.channel * 16, l.t, at.valid, 1.f);
  h.clear_all();
  if (d.initial_state != nullptr)
    h.load_rows(d.initial_state + ((i64)at.batch * p.channels + at.channel) * 16, l.t, at.valid, LOG2E);
  const float2 bias = pair_of(d.dt_bias, at.channel, at.valid, LOG2E), D = pair_of(d.D, at.channel, at.valid, 1.f);
  Raw<T> raw;
  walk.load(raw, p.length, l, at.valid, at.whole);
  float4 *states = p.states + at.tile * ((p.length + 7) / 8) * 64;
#pragma unroll 1
  for (int left = p.length; left > 0; left -= 8) {
    Group<T, SOFTPLUS> group;
    group.prepare(raw, bias, left, l);
    walk.load(raw, left - 8, l, at.valid, at.whole);
    if (STATES) h.store(states, l.lane), states += 64;
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
      group.outputs(kept, h.v, k, l.t == (k & 3));
    }
    group.write(y, sy, kept, D, left, l, at.valid);
    y += 8 * sy;
  }
  if (d.last_state != nullptr && at.valid)
    h.store_rows(d.last_state + ((i64)at.batch * p.channels + at.channel) * 16, l.t, LN2);
}

// End state from zero and sum of dt of every chunk but the last of a sequence: PARTS warps take a part each.
template <class T, bool SOFTPLUS>
__device__ __forceinline__ void scan_chunks(const Problem &p) {
  __shared__ float4 ends[MAX_RINGS * PARTS][64];
  __shared__ float2 sums[MAX_RINGS * PARTS][32];
  const Lane l;
  let_next_kernel_start();
  const int warp = threadIdx.x >> 5, ring = warp / PARTS, w = warp % PARTS;
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
    Walk<T, 1, true> walk(p, d, at, l, chunk * p.chunk_length + w * part);
    Raw<T> raw;
    walk.load(raw, part, l, at.valid, at.whole);
#pragma unroll 1
    for (int left = part; left > 0; left -= 8) {
      Group<T, SOFTPLUS> group;
      group.prepare(raw, bias, left, l);
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
__device__ __forceinline__ void add_rows(float *p, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#else
  atomicAdd(p, a), atomicAdd(p + 1, b), atomicAdd(p + 2, c), atomicAdd(p + 3, d);
#endif
}

// Sums over the tile's channels, a row of 16 states a token: weights (token, channel) times v (channel, state).
struct ChannelSum {
  float v[2][4];
  u32 first, second;  // weights of token g: channels 4t, 4t+2 and 4t+1, 4t+3
  __device__ __forceinline__ ChannelSum(uint2 weights) {
    clear(v[0]), clear(v[1]);
    first = low_halves(weights.x, weights.y), second = high_halves(weights.x, weights.y);
  }
  __device__ __forceinline__ void add(const float (&h)[2][4], bool mine) {
    const u32 a0 = mine ? first : 0u, a2 = mine ? second : 0u;
#pragma unroll
    for (int e = 0; e < 2; e++)
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
          : "+f"(v[e][0]), "+f"(v[e][1]), "+f"(v[e][2]), "+f"(v[e][3])
          : "r"(a0), "r"(0u), "r"(a2), "r"(transposed(pack_bf16(h[e][0], h[e][1]))),
            "r"(transposed(pack_bf16(h[e][2], h[e][3]))));
  }
  __device__ __forceinline__ void write(float *p, bool atomic) const {
    const float a = v[0][0] * LN2, b = v[1][0] * LN2, c = v[0][1] * LN2, d = v[1][1] * LN2;
    if (atomic)
      add_rows(p, a, b, c, d);
    else
      *(float4 *)p = make_float4(a, b, c, d);
  }
};

// What a group's turn in the backward reads, fetched one turn ahead; rows of 16 channels or states, one a token.
struct Stage {
  float4 state[64];
  uint2 x[8][4], dt[8][4], dy[8][4], B[8][4], C[8][4];
  __device__ __forceinline__ void fetch(const Problem &p, const Direction &d, const Place &at, const Lane &l, int group) {
    const int left = p.length - 8 * group, channel = at.channel - 2 * l.g;
    const auto token = [&](int k) { return (i64)(d.reverse ? p.length - 1 - 8 * group - k : 8 * group + k); };
    if (left > 0) {
      const float4 *const from = p.states + (at.tile * ((p.length + 7) / 8) + group) * 64 + l.lane;
      copy_async<16>(state + l.lane, from, true), copy_async<16>(state + 32 + l.lane, from + 32, true);
    }
    const int k = (l.lane & 15) >> 1, part = l.lane & 1, r = l.g;
    const i64 ahead = token(k), row = token(r);
    const bool second = l.lane >= 16;
    const char *const from = second ? d.dt + at.batch * d.dt_batch + ahead * d.dt_token
                                    : d.x + at.batch * d.x_batch + ahead * d.x_token;
    copy_async<16>((second ? dt[k] : x[k]) + 2 * part, from + 2 * channel + 16 * part, k < left);
    if (!second)
      copy_async<16>(dy[k] + 2 * part, d.dy + at.batch * d.dy_batch + ahead * d.dy_token + 2 * channel + 16 * part,
                     k < left);
    copy_async<8>(B[r] + l.t, d.B + at.batch * d.B_batch + row * d.B_token + 8 * l.t, r < left);
    copy_async<8>(C[r] + l.t, d.C + at.batch * d.C_batch + row * d.C_token + 8 * l.t, r < left);
  }
};
__device__ __forceinline__ u32 pair_at(const uint2 (&row)[4], int g) { return ((const u32 *)row)[g]; }

struct BackwardShared {
  float4 slot[MAX_RINGS * WARPS][64];  // adjoint states on their way from warp to warp
  struct {
    Stage stage[2];
    uint2 dtx[8][4];
    float4 after[8][64];  // the states after each token of the turn
  } warp[MAX_RINGS * WARPS];
};

// All gradients of one scan in bfloat16; channels come in whole tiles. The ring walks the groups backwards and hands the
// adjoint state on; the states entering each group come from the forward, so nothing else waits.
template <bool SOFTPLUS>
__device__ __forceinline__ void scan_backward(const Problem &p) {
  extern __shared__ float4 memory[];
  BackwardShared &shared = *(BackwardShared *)memory;
  typedef Bf16 T;
  const Lane l;
  const int warp = threadIdx.x >> 5, ring = warp / WARPS, w = warp % WARPS, next = warp + (w == 0 ? WARPS - 1 : -1);
  const i64 unit = (i64)blockIdx.x * (blockDim.x / (32 * WARPS)) + ring;
  const Place at(p, unit, l);
  if (at.direction >= p.num_directions) return;
  const Direction &d = p.direction[at.direction];
  const int sign = d.reverse ? -1 : 1, end = d.reverse ? p.length - 1 : 0;
  auto &mine = shared.warp[warp];
  Tile A, dA, G;
  A.load_rows(d.A + (i64)at.channel * 16, l.t, true, 1.f);
  dA.clear_all();
  float2 dD = make_float2(0.f, 0.f), dbias = dD;
  const float2 bias = pair_of(d.dt_bias, at.channel, true, LOG2E), D = pair_of(d.D, at.channel, true, 1.f);
  const int turns = (p.length + 8 * WARPS - 1) / (8 * WARPS);
  mine.stage[(turns - 1) & 1].fetch(p, d, at, l, (turns - 1) * WARPS + w);
  asm volatile("cp.async.commit_group;");
#pragma unroll 1
  for (int turn = turns - 1; turn >= 0; turn--) {
    const int position = (turn * WARPS + w) * 8, left = p.length - position;
    if (turn > 0) mine.stage[(turn - 1) & 1].fetch(p, d, at, l, (turn - 1) * WARPS + w);
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncwarp();
    const Stage &stage = mine.stage[turn & 1];
    Group<T, SOFTPLUS> group;
    {
      Raw<T> raw;
#pragma unroll
      for (int q = 0; q < 2; q++) {
        const int k = l.t + 4 * q;
        raw.x[q] = pair_at(stage.x[k], l.g), raw.dt[q] = pair_at(stage.dt[k], l.g), raw.B[q] = pair_at(stage.B[k], l.g);
        raw.C[q] = 0;
      }
      group.template prepare<true>(raw, bias, left, l);
    }
#pragma unroll
    for (int q = 0; q < 2; q++)
      ((u32 *)mine.dtx[l.t + 4 * q])[l.g] = pack_bf16(group.dtx[q][0], group.dtx[q][1]);
    const i64 row = ((i64)at.batch * p.length + end + sign * (position + l.g)) * 16 + 4 * l.t;
    const i64 partial = at.channel / 16 * p.partial_stride;
    float a[8][2][4];
    {  // the states again, and the sums over channels that need them
      Tile h;
      h.clear_all();
      if (left > 0) h.load(stage.state, l.lane);
      ChannelSum dC(stage.dy[l.g][l.t]);
#pragma unroll
      for (int k = 0; k < 8; k++) {
        float u[2][4];
        group.decays(a[k], A, k);
        group.inputs(u, k, l.t == (k & 3));
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
          for (int i = 0; i < 4; i++) h.v[e][i] = fmaf(a[k][e][i], h.v[e][i], u[e][i]);
        h.store(mine.after[k], l.lane);
        dC.add(h.v, l.g == k);
      }
      if (l.g < left) dC.write(d.dC + partial + row, p.partial_stride == 0);
    }
    // the adjoint chain: a_k becomes a_k g_k
    float gB[2][2];
    {
      float c[2][2];
      u32 dy[2];
#pragma unroll
      for (int q = 0; q < 2; q++) {
        const u32 pair = pair_at(stage.C[l.t + 4 * q], l.g);
        c[q][0] = T::first(pair), c[q][1] = T::second(pair), dy[q] = pair_at(stage.dy[l.t + 4 * q], l.g);
      }
      const uint2 b = stage.B[l.column][l.t];
      const u32 B[2][2] = {{bits(T::first(b.x)), bits(T::first(b.y))}, {bits(T::second(b.x)), bits(T::second(b.y))}};
      ChannelSum dB(mine.dtx[l.g][l.t]);
      if (w == WARPS - 1 && turn == turns - 1) {
        G.clear_all();
        if (d.dlast_state != nullptr)
          G.load_rows(d.dlast_state + ((i64)at.batch * p.channels + at.channel) * 16, l.t, true, 1.f);
      } else {
        wait_for(1 + warp);
        G.load(shared.slot[warp], l.lane);
      }
#pragma unroll
      for (int k = 7; k >= 0; k--) {
        const int q = k >> 2;
        const bool own = l.t == (k & 3), take = own || (k & 3) == 3;
        const u32 a0 = own ? bits(T::first(dy[q])) : 0u, a1 = own ? bits(T::second(dy[q])) : 0u;
        float g[2][4], y[4];
        clear(y);
#pragma unroll
        for (int e = 0; e < 2; e++) {
          clear(g[e]);
          mma_k4(g[e], a0, a1, bits(c[q][e]));
#pragma unroll
          for (int i = 0; i < 4; i++) {
            g[e][i] += G.v[e][i];
            a[k][e][i] = G.v[e][i] = g[e][i] * a[k][e][i];
          }
          const u32 all[4] = {bits(g[e][0]), bits(g[e][1]), bits(g[e][2]), bits(g[e][3])};
          mma_k8(y, all, B[e][0], B[e][1]);
        }
        dB.add(g, l.g == k);
        gB[q][0] = take ? y[q] : gB[q][0], gB[q][1] = take ? y[2 + q] : gB[q][1];
      }
      if (w > 0 || turn > 0) {
        G.store(shared.slot[next], l.lane);
        hand_to(1 + next);
      } else if (d.dinitial_state != nullptr) {
        G.store_rows(d.dinitial_state + ((i64)at.batch * p.channels + at.channel) * 16, l.t, 1.f);
      }
      if (l.g < left) dB.write(d.dB + partial + row, p.partial_stride == 0);
    }
    // what A and dt get, off the chain
    float qA[2][2];
#pragma unroll
    for (int k = 7; k >= 0; k--) {
      const int q = k >> 2, j = k & 3;
      const bool take = l.t == j || j == 3;
      Tile before;
      if (k > 0)
        before.load(mine.after[k - 1], l.lane);
      else if (left > 0)
        before.load(stage.state, l.lane);
      else
        before.clear_all();
      const float d0 = __shfl_sync(~0u, group.dt[q][0], j, 4), d1 = __shfl_sync(~0u, group.dt[q][1], j, 4);
      float r0 = 0.f, r1 = 0.f, sums[4];
      clear(sums);
#pragma unroll
      for (int e = 0; e < 2; e++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float product = a[k][e][i] * before.v[e][i];
          dA.v[e][i] = fmaf(i < 2 ? d0 : d1, product, dA.v[e][i]);
          if (i < 2)
            r0 = fmaf(A.v[e][i], product, r0);
          else
            r1 = fmaf(A.v[e][i], product, r1);
        }
      mma_k4(sums, bits(r0), bits(r1), bits(1.f));
      qA[q][0] = take ? sums[0] : qA[q][0], qA[q][1] = take ? sums[2] : qA[q][1];
    }
    char *const out = d.dx + (((i64)at.batch * p.length + end + sign * (position + l.t)) * p.channels + at.channel) * 2;
    const i64 to_ddt = d.ddt - d.dx;
    const int four = 8 * sign * p.channels;
#pragma unroll
    for (int q = 0; q < 2; q++) {
      const u32 x = pair_at(stage.x[l.t + 4 * q], l.g), dy = pair_at(stage.dy[l.t + 4 * q], l.g);
      const float x0 = T::first(x), x1 = T::second(x), y0 = T::first(dy), y1 = T::second(dy);
      const float g0 = gB[q][0] * TRUNCATION, g1 = gB[q][1] * TRUNCATION;
      float e0 = fmaf(x0, g0, LN2 * TRUNCATION * qA[q][0]), e1 = fmaf(x1, g1, LN2 * TRUNCATION * qA[q][1]);
      if (SOFTPLUS) e0 *= 1.f - ex2(-group.dt[q][0]), e1 *= 1.f - ex2(-group.dt[q][1]);
      if (l.t + 4 * q < left) {
        dbias.x += e0, dbias.y += e1, dD.x = fmaf(x0, y0, dD.x), dD.y = fmaf(x1, y1, dD.y);
        *(u32 *)(out + q * four) =
            pack_bf16(fmaf(D.x, y0, LN2 * group.dt[q][0] * g0), fmaf(D.y, y1, LN2 * group.dt[q][1] * g1));
        *(u32 *)(out + q * four + to_ddt) = pack_bf16(e0, e1);
      }
    }
    __syncwarp();
  }
  // one partial a warp, summed by the caller
  const i64 partial = ((i64)at.batch * WARPS + w) * p.channels + at.channel;
#pragma unroll
  for (int o = 1; o < 4; o *= 2) {
    dbias.x += __shfl_xor_sync(~0u, dbias.x, o), dbias.y += __shfl_xor_sync(~0u, dbias.y, o);
    dD.x += __shfl_xor_sync(~0u, dD.x, o), dD.y += __shfl_xor_sync(~0u, dD.y, o);
  }
  dA.store_rows(d.dA + partial * 16, l.t, LN2 * LN2);
  if (l.t == 0) *(float2 *)(d.ddt_bias + partial) = dbias, *(float2 *)(d.dD + partial) = dD;
}

// The gate behind the scans: out = scale (a + b) silu(z), and what it hands back.
struct Gate {
  const char *a, *b, *z, *dy;  // a and b contiguous, b may be null; z and dy with strides in bytes
  char *out, *dz;              // forward: out = y; backward: out = gradient of a and of b
  i64 z_batch, dy_batch, rows;
  int z_token, dy_token, length, channels;
  float scale;
};
template <class T, int PAIRS>
struct alignas(T::PAIR_BYTES *PAIRS) Pack {
  typename T::Pair v[PAIRS];
};

template <class T, int PAIRS, bool BACKWARD>
__device__ __forceinline__ void gate(const Gate &p) {
  typedef Pack<T, PAIRS> P;
  const int packs = p.channels / (2 * PAIRS);
  const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x, row = at / packs;
  if (row >= p.rows) return;
  const int column = (int)(at - row * packs), batch = (int)(row / p.length), token = (int)(row - (i64)batch * p.length);
  const P none = {};
  const P z = *((const P *)(p.z + batch * p.z_batch + (i64)token * p.z_token) + column);
  const P a = ((const P *)p.a)[at], b = p.b == nullptr ? none : ((const P *)p.b)[at];
  const P dy = BACKWARD ? *((const P *)(p.dy + batch * p.dy_batch + (i64)token * p.dy_token) + column) : none;
  P out, dz;
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    float y[2], g[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const float gate = c ? T::second(z.v[i]) : T::first(z.v[i]);
      const float sum = c ? T::second(a.v[i]) + T::second(b.v[i]) : T::first(a.v[i]) + T::first(b.v[i]);
      const float sigmoid = 1.f / (1.f + ex2(-LOG2E * gate));
      if (BACKWARD) {
        const float d = (c ? T::second(dy.v[i]) : T::first(dy.v[i])) * p.scale;
        y[c] = d * gate * sigmoid, g[c] = d * sum * sigmoid * (1.f + gate * (1.f - sigmoid));
      } else {
        y[c] = p.scale * sum * gate * sigmoid;
      }
    }
    out.v[i] = T::pack(y[0], y[1]);
    if (BACKWARD) dz.v[i] = T::pack(g[0], g[1]);
  }
  ((P *)p.out)[at] = out;
  if (BACKWARD) ((P *)p.dz)[at] = dz;
}

#define GATE(NAME, T, PAIRS)                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) gate_forward_kernel_##NAME(const __grid_constant__ Gate p) { \
    gate<T, PAIRS, false>(p);                                                                                 \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(256) gate_backward_kernel_##NAME(const __grid_constant__ Gate p) { \
    gate<T, PAIRS, true>(p);                                                                                  \
  }
GATE(bfloat16, Bf16, 1)
GATE(bfloat16_wide, Bf16, 4)
GATE(float16, Fp16, 1)
GATE(float16_wide, Fp16, 4)
GATE(float32, Fp32, 1)
GATE(float32_wide, Fp32, 2)

#define FORWARD(NAME, T, SOFTPLUS)                                                                            \
  extern "C" __global__ void __launch_bounds__(32 * WARPS *MAX_RINGS, 1)                                      \
      scan_forward_kernel_##NAME(const __grid_constant__ Problem p) {                                         \
    scan_forward<T, SOFTPLUS, false>(p);                                                                      \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(32, 20)                                                        \
      scan_sequence_kernel_##NAME(const __grid_constant__ Problem p) {                                        \
    scan_sequence<T, SOFTPLUS, false>(p);                                                                     \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(32 * PARTS *MAX_RINGS, 1)                                      \
      scan_chunks_kernel_##NAME(const __grid_constant__ Problem p) {                                          \
    scan_chunks<T, SOFTPLUS>(p);                                                                              \
  }
FORWARD(bfloat16_softplus, Bf16, true)
FORWARD(bfloat16, Bf16, false)
FORWARD(float16_softplus, Fp16, true)
FORWARD(float16, Fp16, false)
FORWARD(float32_softplus, Fp32, true)
FORWARD(float32, Fp32, false)

#define BACKWARD(NAME, SOFTPLUS)                                                                              \
  extern "C" __global__ void __launch_bounds__(32 * WARPS *MAX_RINGS, 1)                                      \
      scan_states_kernel_##NAME(const __grid_constant__ Problem p) {                                          \
    scan_forward<Bf16, SOFTPLUS, true>(p);                                                                    \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(32, 20)                                                        \
      scan_sequence_states_kernel_##NAME(const __grid_constant__ Problem p) {                                 \
    scan_sequence<Bf16, SOFTPLUS, true>(p);                                                                   \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(32 * WARPS *MAX_RINGS, 1)                                      \
      scan_backward_kernel_##NAME(const __grid_constant__ Problem p) {                                        \
    scan_backward<SOFTPLUS>(p);                                                                               \
  }
BACKWARD(bfloat16_softplus, true)
BACKWARD(bfloat16, false)
