// The two projections of a mixer at inference, each one kernel with the pointwise work before it: residual addition,
// RMSNorm and the projection to x and z; sum of both directions, gate and the projection back. Vim-Ti's widths (D 192,
// E 384), bfloat16 and float16, on NVIDIA GPUs from sm_80 on; many tokens on sm_90.
//
// us in bfloat16, medians of CUDA graph replays over inputs beyond the L2 cache; H200, driver 580.159.04,
// torch 2.11.0+cu130, 2026-11-23; norm_project and gate_project of projections.py remake it. Separate: a pointwise kernel
// and cuBLAS. Bytes: what must be read and written, at 4.28 TB/s.
//   tokens    norm_project   separate   bytes    gate_project   separate   bytes
//      197             2.7        4.0     0.2             3.2        4.2     0.1
//     1576             5.6        6.6     1.3             7.7        6.5     1.0
//     6085            10.1       12.2     4.9             9.4       11.1     3.8
//    12608            15.8       20.7    10.2            15.4       17.6     7.9
//    48680              66         59      39              39         52      31
//   131080             174        156     106             107        140      82
// A plain kernel with norm_project's reads and writes takes 45 at 48680 tokens.
//
// Plan. Many tokens: a block stays on its multiprocessor with 144 KB of weights in shared memory. Eight warps read tiles
// of 64 tokens, do the pointwise work in registers and leave the left operand in a ring in shared memory; two warpgroups
// multiply (wgmma) and store from registers. 768 columns of norm_project are two blocks' work: both read each token, one
// writes the total. Few tokens: many small blocks of 16 tokens and some of the columns (mma.sync), weights by cp.async.
// Weights come in before the kernel before has ended.
// Bytes a token, in bfloat16: norm_project 6 D read, 4 D + 4 E written; gate_project 6 E read, 2 D written.

struct NormProject {
  const char *branch, *weight;          // (rows, D), (columns, D)
  const float *residual, *norm_weight;  // (rows, D) or null, (D,)
  char *out;                            // (rows, columns)
  float *total;                         // (rows, D)
  i64 rows;
  int columns, parts;  // parts: blocks that share a tile of tokens, each with its columns
  float eps;
};
struct GateProject {
  const char *y, *z, *weight;  // (2, rows, E), rows of E, (columns, E)
  const float *layer_scale;    // (columns,) or null
  char *out;                   // (rows, columns)
  i64 rows, z_row;             // z_row: bytes from row to row
  int columns, parts;
  int d_inner;  // E; as a constant in the loads it costs registers, and 8 % at many tokens
  float scale;
};

// An operand in shared memory: rows of 64 numbers, three blocks of them side by side
constexpr int ATOM = 64, ATOMS = 3, DEPTH = ATOMS * ATOM, D_INNER = 2 * DEPTH;

// Loads that stay where they are written: all of a tile's are in flight before the first is waited for
__device__ __forceinline__ uint4 load_16(const void *p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_8(const void *p) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ float4 load_floats(const float *p) {
  const uint4 v = load_16(p);
  return make_float4(number(v.x), number(v.y), number(v.z), number(v.w));
}

// Where a 16-byte piece of a row of 128 bytes lies
__device__ __forceinline__ int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

// Columns of a product are computed in an order in which every lane gets neighbouring ones: lane t of a quad has columns
// 2t, 2t+1 of each tensor-core tile of 8; those of COUNT tiles are made to be 2 COUNT t .. 2 COUNT t + 2 COUNT - 1.
template <int COUNT>
__device__ __forceinline__ int place_of_column(int column) {
  const int c = column % (8 * COUNT);
  return column - c + 8 * (c % (2 * COUNT) / 2) + 2 * (c / (2 * COUNT)) + c % 2;
}

// The left operand of norm_project: PAIRS times two tokens of a warp, loaded, then added up, normalised and stored
template <class T, int PAIRS>
struct NormRows {
  float4 total[PAIRS][ATOMS];
  uint2 branch[PAIRS][ATOMS];
  __device__ __forceinline__ void load(const NormProject &p, i64 first, int lane) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      const i64 row = min(first + 2 * i + (lane >> 4), p.rows - 1), at = row * DEPTH + 4 * (lane & 15);
#pragma unroll
      for (int a = 0; a < ATOMS; a++) branch[i][a] = load_8(p.branch + 2 * (at + ATOM * a));
      if (p.residual != nullptr) {
#pragma unroll
        for (int a = 0; a < ATOMS; a++) total[i][a] = load_floats(p.residual + at + ATOM * a);
      } else {
#pragma unroll
        for (int a = 0; a < ATOMS; a++) total[i][a] = make_float4(0.f, 0.f, 0.f, 0.f);
      }
    }
  }
  // to: the tile in shared memory; row: of the tile, the first of the warp
  __device__ __forceinline__ void finish(const NormProject &p, const float4 (&weight)[ATOMS], char *to, int row,
                                         int atom_bytes, int lane) {
    const int half = lane >> 4, l = lane & 15;
    float squares[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      squares[i] = 0.f;
#pragma unroll
      for (int a = 0; a < ATOMS; a++) {
        float4 &v = total[i][a];
        v.x += T::first(branch[i][a].x), v.y += T::second(branch[i][a].x);
        v.z += T::first(branch[i][a].y), v.w += T::second(branch[i][a].y);
        squares[i] = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, squares[i]))));
      }
    }
#pragma unroll
    for (int o = 8; o > 0; o >>= 1)
#pragma unroll
      for (int i = 0; i < PAIRS; i++) squares[i] += __shfl_xor_sync(~0u, squares[i], o);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      const float s = rsqrtf(fmaf(squares[i], 1.f / DEPTH, p.eps));
      char *const at = to + swizzled(row + 2 * i + half, l >> 1) + 8 * (l & 1);
#pragma unroll
      for (int a = 0; a < ATOMS; a++) {
        const float4 v = total[i][a], w = weight[a];
        *(uint2 *)(at + a * atom_bytes) =
            make_uint2(T::pack(v.x * s * w.x, v.y * s * w.y), T::pack(v.z * s * w.z, v.w * s * w.w));
      }
    }
  }
  __device__ __forceinline__ void store_total(const NormProject &p, i64 first, int lane) const {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      const i64 row = first + 2 * i + (lane >> 4);
      if (row < p.rows) {
#pragma unroll
        for (int a = 0; a < ATOMS; a++) *(float4 *)(p.total + row * DEPTH + 4 * (lane & 15) + ATOM * a) = total[i][a];
      }
    }
  }
};
__device__ __forceinline__ void load_norm_weight(float4 (&weight)[ATOMS], const float *from, int lane) {
#pragma unroll
  for (int a = 0; a < ATOMS; a++) weight[a] = load_floats(from + ATOM * a + 4 * (lane & 15));
}

// The left operand of gate_project: half the columns of four tokens
template <class T>
struct GateRows {
  uint4 forward[ATOMS], backward[ATOMS], z[ATOMS];
  __device__ __forceinline__ void load(const GateProject &p, i64 first, int column, int lane) {
    const i64 row = min(first + (lane >> 3), p.rows - 1);
    column += 8 * (lane & 7);
    const char *const y = p.y + 2 * (row * p.d_inner + column), *const gate = p.z + row * p.z_row + 2 * column;
#pragma unroll
    for (int a = 0; a < ATOMS; a++) {
      forward[a] = load_16(y + 2 * ATOM * a);
      backward[a] = load_16(y + 2 * (p.rows * p.d_inner + ATOM * a));
      z[a] = load_16(gate + 2 * ATOM * a);
    }
  }
  static __device__ __forceinline__ float gated(float a, float b, float z, float scale) {
    float sigmoid;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.f + ex2(-LOG2E * z)));
    return scale * (a + b) * (z * sigmoid);
  }
  static __device__ __forceinline__ u32 gated(u32 a, u32 b, u32 z, float scale) {
    return T::pack(gated(T::first(a), T::first(b), T::first(z), scale),
                   gated(T::second(a), T::second(b), T::second(z), scale));
  }
  __device__ __forceinline__ void finish(const GateProject &p, char *to, int row, int atom_bytes, int lane) const {
    char *const at = to + swizzled(row + (lane >> 3), lane & 7);
#pragma unroll
    for (int a = 0; a < ATOMS; a++) {
      const uint4 f = forward[a], b = backward[a], g = z[a];
      *(uint4 *)(at + a * atom_bytes) = make_uint4(gated(f.x, b.x, g.x, p.scale), gated(f.y, b.y, g.y, p.scale),
                                                   gated(f.z, b.z, g.z, p.scale), gated(f.w, b.w, g.w, p.scale));
    }
  }
};

template <class T, int PAIRS>
struct alignas(T::PAIR_BYTES *PAIRS) Pack {
  typename T::Pair pair[PAIRS];
};

// A lane's neighbouring columns of two rows, 8 rows apart, out of COUNT tensor-core tiles. left: rows from the first on
template <class T, int COUNT>
__device__ __forceinline__ void store_columns(const float *tiles, char *to, i64 row_bytes, i64 left, const float *scale) {
  float by[2 * COUNT];
#pragma unroll
  for (int i = 0; i < 2 * COUNT; i++) by[i] = 1.f;
  if (scale != nullptr) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
      const float4 v = load_floats(scale + 2 * i);
      by[2 * i] = v.x, by[2 * i + 1] = v.y, by[2 * i + 2] = v.z, by[2 * i + 3] = v.w;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    Pack<T, COUNT> v;
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      v.pair[i] = T::pack(tiles[4 * i + 2 * h] * by[2 * i], tiles[4 * i + 2 * h + 1] * by[2 * i + 1]);
    if (8 * h < left) *(Pack<T, COUNT> *)(to + h * 8 * row_bytes) = v;
  }
}

// Few tokens: a block has 16 of them and a part of the columns. Four warps make four tokens ready each, then compute 16 of
// 64 columns each. Weights come in stages of 64 columns x 64 numbers.
constexpr int FEW_ROWS = 16, FEW_COLUMNS = 64, FEW_WARPS = 4, FEW_STAGES = 6, FEW_COUNT = FEW_COLUMNS / 8 / FEW_WARPS;
constexpr int FEW_ATOM_BYTES = FEW_ROWS * 128, FEW_STAGE_BYTES = FEW_COLUMNS * 128;

template <class T>
__device__ __forceinline__ void multiply_tile(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
__device__ __forceinline__ void multiply_tile<Bf16>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_tile<Fp16>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void load_tiles(u32 (&r)[4], const char *p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

// A block's columns of the product with the left operand in shared memory, 64 PIECES numbers deep
template <class T, int PIECES>
struct FewColumns {
  const char *from;  // what this thread fetches next
  char *stages;
  int count, first_column, fetched, atom;
  __device__ __forceinline__ FewColumns(const char *weight, char *stages, int first_column, int columns)
      : stages(stages), count(columns / FEW_COLUMNS * PIECES), first_column(first_column), fetched(0), atom(0) {
    from = weight + 2 * ((i64)(first_column + (threadIdx.x >> 3)) * PIECES * ATOM + 8 * (threadIdx.x & 7));
#pragma unroll
    for (int i = 0; i < FEW_STAGES - 1; i++) fetch();
  }
  __device__ __forceinline__ void fetch() {
    constexpr int STEP = 4 * FEW_WARPS, ROW_BYTES = 2 * ATOM * PIECES;  // STEP: columns that the block fetches at once
    if (fetched < count) {
      char *const to = stages + fetched % FEW_STAGES * FEW_STAGE_BYTES;
#pragma unroll
      for (int i = 0; i < FEW_COLUMNS / STEP; i++) {
        const int column = (threadIdx.x >> 3) + STEP * i;
        copy_async<16>(to + swizzled(place_of_column<FEW_COUNT>(column), threadIdx.x & 7), from + STEP * i * ROW_BYTES,
                       true);
      }
    }
    from += 2 * ATOM;
    if (++atom == PIECES) atom = 0, from += (FEW_COLUMNS - 1) * ROW_BYTES;
    fetched++;
    asm volatile("cp.async.commit_group;");
  }
  __device__ __forceinline__ void multiply(const char *left, char *out, i64 first_row, i64 rows, int columns,
                                           const float *layer_scale) {
    const int lane = threadIdx.x & 31, first = 8 * FEW_COUNT * (threadIdx.x >> 5);
    const int column = first + (lane >> 4) * 8 + (lane & 7);
    float sums[FEW_COUNT][4];
    for (int s = 0; s < count; s++) {
      const int atom = s % PIECES;
      if (atom == 0) {
#pragma unroll
        for (int i = 0; i < 4 * FEW_COUNT; i++) sums[i / 4][i % 4] = 0.f;
      }
      asm volatile("cp.async.wait_group %0;" ::"n"(FEW_STAGES - 2) : "memory");
      __syncthreads();
      fetch();
      const char *const stage = stages + s % FEW_STAGES * FEW_STAGE_BYTES;
#pragma unroll
      for (int k = 0; k < ATOM / 16; k++) {
        u32 a[4], b[4];
        load_tiles(a, left + atom * FEW_ATOM_BYTES + swizzled(lane & 15, 2 * k + (lane >> 4)));
        load_tiles(b, stage + swizzled(column, 2 * k + ((lane >> 3) & 1)));
#pragma unroll
        for (int j = 0; j < FEW_COUNT; j++) multiply_tile<T>(sums[j], a, b[2 * j], b[2 * j + 1]);
      }
      if (atom == PIECES - 1) {
        const int at = first_column + s / PIECES * FEW_COLUMNS + first + 2 * FEW_COUNT * (lane & 3);
        const i64 to = first_row + (lane >> 2);
        store_columns<T, FEW_COUNT>(sums[0], out + 2 * (to * columns + at), 2ll * columns, rows - to,
                                    layer_scale == nullptr ? nullptr : layer_scale + at);
      }
    }
  }
};

template <class T>
__device__ __forceinline__ void norm_project_few(const NormProject &p) {
  extern __shared__ __align__(1024) char memory[];
  const int lane = threadIdx.x & 31, row = threadIdx.x / 32 * 4, part = blockIdx.x % p.parts;
  const i64 first = (i64)(blockIdx.x / p.parts) * FEW_ROWS;
  char *const left = memory + FEW_STAGES * FEW_STAGE_BYTES;
  FewColumns<T, ATOMS> columns(p.weight, memory, part * (p.columns / p.parts), p.columns / p.parts);
  float4 weight[ATOMS];
  load_norm_weight(weight, p.norm_weight, lane);
  wait_for_kernel_before();
  let_next_kernel_start();
  NormRows<T, 2> rows;
  rows.load(p, first + row, lane);
  rows.finish(p, weight, left, row, FEW_ATOM_BYTES, lane);
  if (part == 0) rows.store_total(p, first + row, lane);
  columns.multiply(left, p.out, first, p.rows, p.columns, nullptr);
}

template <class T>
__device__ __forceinline__ void gate_project_few(const GateProject &p) {
  extern __shared__ __align__(1024) char memory[];
  const int lane = threadIdx.x & 31, row = threadIdx.x / 32 * 4, part = blockIdx.x % p.parts;
  const i64 first = (i64)(blockIdx.x / p.parts) * FEW_ROWS;
  char *const left = memory + FEW_STAGES * FEW_STAGE_BYTES;
  FewColumns<T, 2 * ATOMS> columns(p.weight, memory, part * (p.columns / p.parts), p.columns / p.parts);
  wait_for_kernel_before();
  let_next_kernel_start();
  GateRows<T> rows[2];
#pragma unroll
  for (int half = 0; half < 2; half++) rows[half].load(p, first + row, half * DEPTH, lane);
#pragma unroll
  for (int half = 0; half < 2; half++)
    rows[half].finish(p, left + half * ATOMS * FEW_ATOM_BYTES, row, FEW_ATOM_BYTES, lane);
  columns.multiply(left, p.out, first, p.rows, p.columns, p.layer_scale);
}

#define PROJECT_FEW(NAME, T)                                                                \
  extern "C" __global__ void __launch_bounds__(32 * FEW_WARPS, 2)                           \
      norm_project_few_kernel_##NAME(const __grid_constant__ NormProject p) {               \
    norm_project_few<T>(p);                                                                 \
  }                                                                                         \
  extern "C" __global__ void __launch_bounds__(32 * FEW_WARPS, 2)                           \
      gate_project_few_kernel_##NAME(const __grid_constant__ GateProject p) {               \
    gate_project_few<T>(p);                                                                 \
  }
PROJECT_FEW(bfloat16, Bf16)
PROJECT_FEW(float16, Fp16)

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // wgmma is of sm_90a alone
// Many tokens: eight warps make tiles of 64 tokens x 192 numbers ready, eight tokens each, in a ring of three.
// norm_project: a block has 384 columns, 192 a warpgroup. gate_project: a tile of the product takes two of the ring, and
// the warpgroups take turns at its 192 columns.
constexpr int TILE = 64, TILES = 3, WARP_ROWS = 8, GROUP_COLUMNS = 192;
constexpr int PRODUCERS = TILE / WARP_ROWS, CONSUMERS = 8;  // warps
constexpr int ATOM_BYTES = TILE * 128, TILE_BYTES = ATOMS * ATOM_BYTES, WEIGHT_BYTES = 2 * GROUP_COLUMNS * DEPTH * 2;

__device__ __forceinline__ void begin_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait_until(u32 barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra over;\n"
      "bra again;\nover:\n}" ::"r"(barrier), "r"(phase)
      : "memory");
}
__device__ __forceinline__ void show_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// How wgmma finds rows of 128 bytes with swizzled pieces, 1024 bytes every 8 rows
__device__ __forceinline__ unsigned long long operand(u32 address) {
  return (unsigned long long)(address >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(d, i) FOUR(d, i), FOUR(d, i + 4), FOUR(d, i + 8), FOUR(d, i + 12)
#define WGMMA(TYPE)                                                                                                     \
  asm volatile(                                                                                                         \
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %98, 0;\n"                                                                \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." TYPE "." TYPE " {"                                                 \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"                          \
      "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                \
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,"                \
      "%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95},"               \
      " %96, %97, adds, 1, 1, 0, 0;\n}"                                                                                 \
      : SIXTEEN(d, 0), SIXTEEN(d, 16), SIXTEEN(d, 32), SIXTEEN(d, 48), SIXTEEN(d, 64), SIXTEEN(d, 80)                   \
      : "l"(a), "l"(b), "r"((int)adds))
template <class T>
__device__ __forceinline__ void multiply_group(float (&d)[96], unsigned long long a, unsigned long long b, bool adds);
template <>
__device__ __forceinline__ void multiply_group<Bf16>(float (&d)[96], unsigned long long a, unsigned long long b, bool adds) {
  WGMMA("bf16");
}
template <>
__device__ __forceinline__ void multiply_group<Fp16>(float (&d)[96], unsigned long long a, unsigned long long b, bool adds) {
  WGMMA("f16");
}

struct ManyShared {
  u32 weights, tiles, full, empty;  // addresses
  char *memory;
  __device__ __forceinline__ ManyShared(char *memory, int consumers) : memory(memory) {
    weights = shared_address(memory), tiles = weights + WEIGHT_BYTES;
    full = tiles + TILES * TILE_BYTES, empty = full + 8 * TILES;
    if (threadIdx.x == 0) {
      for (int i = 0; i < TILES; i++) begin_barrier(full + 8 * i, PRODUCERS), begin_barrier(empty + 8 * i, consumers);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
  }
  __device__ __forceinline__ char *tile(int number) const { return memory + WEIGHT_BYTES + number % TILES * TILE_BYTES; }
  __device__ __forceinline__ void wait_empty(int number) const {
    wait_until(empty + 8 * (number % TILES), (number / TILES + 1) & 1);
  }
  __device__ __forceinline__ void wait_full(int number) const {
    wait_until(full + 8 * (number % TILES), number / TILES & 1);
  }
  __device__ __forceinline__ void now_full(int number) const {
    show_to_tensor_cores();
    __syncwarp();
    if ((threadIdx.x & 31) == 0) arrive(full + 8 * (number % TILES));
  }
  __device__ __forceinline__ void now_empty(int number) const {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) arrive(empty + 8 * (number % TILES));
  }
  // COLUMNS rows of COUNT numbers, by the consumers
  template <int COLUMNS, int COUNT>
  __device__ __forceinline__ void load_weights(const char *from) const {
    for (int i = threadIdx.x; i < COLUMNS * COUNT / 8; i += 32 * CONSUMERS) {
      const int column = i / (COUNT / 8), piece = i % (COUNT / 8);
      copy_async<16>(memory + piece / 8 * (COLUMNS * 128) + swizzled(place_of_column<4>(column), piece & 7),
                     from + 16 * (i64)i, true);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    show_to_tensor_cores();
    asm volatile("bar.sync 1, %0;" ::"n"(32 * CONSUMERS) : "memory");
  }
  // sums (+)= tile x weights, b: address of the first column; waits until the product is there
  template <class T, int COLUMNS>
  __device__ __forceinline__ void multiply(float (&sums)[96], int number, u32 b, bool adds) const {
    const u32 a = tiles + number % TILES * TILE_BYTES;
    wait_full(number);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++)
      multiply_group<T>(sums, operand(a + k / 4 * ATOM_BYTES + k % 4 * 32),
                        operand(b + k / 4 * (COLUMNS * 128) + k % 4 * 32), adds || k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 96; i++) asm volatile("" : "+f"(sums[i])::"memory");
    now_empty(number);
  }
};

// A warpgroup's 64 x 192 sums, scaled and stored
template <class T>
__device__ __forceinline__ void store_group(const float (&sums)[96], char *out, i64 first_row, i64 rows, int columns,
                                            int first_column, const float *layer_scale) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
  const i64 row = first_row + 16 * warp + (lane >> 2), row_bytes = 2ll * columns;
  const int column = first_column + 8 * (lane & 3);
#pragma unroll
  for (int q = 0; q < GROUP_COLUMNS / 32; q++)
    store_columns<T, 4>(sums + 16 * q, out + row * row_bytes + 2 * column + 64 * q, row_bytes, rows - row,
                     layer_scale == nullptr ? nullptr : layer_scale + column + 32 * q);
}

template <class T>
__device__ __forceinline__ void norm_project(const NormProject &p) {
  extern __shared__ __align__(1024) char memory[];
  const ManyShared shared(memory, CONSUMERS);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = blockIdx.x % p.parts, step = gridDim.x / p.parts;
  const int tiles = (int)((p.rows + TILE - 1) / TILE), first_column = part * 2 * GROUP_COLUMNS;
  int tile = blockIdx.x / p.parts, number = 0;
  if (warp < CONSUMERS) {
    const int group = warp / 4;
    shared.load_weights<2 * GROUP_COLUMNS, DEPTH>(p.weight + 2ll * first_column * DEPTH);
    for (; tile < tiles; tile += step, number++) {
      float sums[96];
      shared.multiply<T, 2 * GROUP_COLUMNS>(sums, number, shared.weights + group * GROUP_COLUMNS * 128, false);
      store_group<T>(sums, p.out, (i64)tile * TILE, p.rows, p.columns, first_column + group * GROUP_COLUMNS, nullptr);
    }
  } else {
    const int row = (warp - CONSUMERS) * WARP_ROWS;
    float4 weight[ATOMS];
    load_norm_weight(weight, p.norm_weight, lane);
    wait_for_kernel_before();
    for (; tile < tiles; tile += step, number++) {
      NormRows<T, 4> rows;
      rows.load(p, (i64)tile * TILE + row, lane);
      shared.wait_empty(number);
      rows.finish(p, weight, shared.tile(number), row, ATOM_BYTES, lane);
      shared.now_full(number);
      if (part == 0) rows.store_total(p, (i64)tile * TILE + row, lane);
    }
    let_next_kernel_start();
  }
}

template <class T>
__device__ __forceinline__ void gate_project(const GateProject &p) {
  extern __shared__ __align__(1024) char memory[];
  const ManyShared shared(memory, CONSUMERS / 2);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int tiles = (int)((p.rows + TILE - 1) / TILE);
  int tile = blockIdx.x, number = 0;
  if (warp < CONSUMERS) {
    shared.load_weights<GROUP_COLUMNS, D_INNER>(p.weight);
    tile += warp / 4 * gridDim.x, number += warp / 4 * 2;
    for (; tile < tiles; tile += 2 * gridDim.x, number += 4) {
      float sums[96];
      shared.multiply<T, GROUP_COLUMNS>(sums, number, shared.weights, false);
      shared.multiply<T, GROUP_COLUMNS>(sums, number + 1, shared.weights + WEIGHT_BYTES / 2, true);
      store_group<T>(sums, p.out, (i64)tile * TILE, p.rows, GROUP_COLUMNS, 0, p.layer_scale);
    }
  } else {
    const int row = (warp - CONSUMERS) * WARP_ROWS;
    wait_for_kernel_before();
    GateRows<T> rows[2];
#pragma unroll
    for (int i = 0; i < 2; i++) rows[i].load(p, (i64)tile * TILE + row + 4 * i, 0, lane);
#pragma unroll 1
    while (tile < tiles) {
      const int half = number & 1;
      tile += half * gridDim.x;  // of the next half
      shared.wait_empty(number);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        rows[i].finish(p, shared.tile(number), row + 4 * i, ATOM_BYTES, lane);
        rows[i].load(p, (i64)tile * TILE + row + 4 * i, (1 - half) * DEPTH, lane);
      }
      shared.now_full(number++);
    }
    let_next_kernel_start();
  }
}

#define PROJECT(NAME, T)                                                                                                \
  extern "C" __global__ void __launch_bounds__(32 * (PRODUCERS + CONSUMERS), 1)                                         \
      norm_project_kernel_##NAME(const __grid_constant__ NormProject p) {                                               \
    norm_project<T>(p);                                                                                                 \
  }                                                                                                                     \
  extern "C" __global__ void __launch_bounds__(32 * (PRODUCERS + CONSUMERS), 1)                                         \
      gate_project_kernel_##NAME(const __grid_constant__ GateProject p) {                                               \
    gate_project<T>(p);                                                                                                 \
  }
PROJECT(bfloat16, Bf16)
PROJECT(float16, Fp16)
#endif
