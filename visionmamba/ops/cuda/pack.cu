// A mixer's parameters into the order, padding and dtypes that its kernels and matrix products read, in one launch.
// 280 thousand numbers for Vim-Ti: the time is that of a launch.

constexpr int MAX_PIECES = 16, THREADS = 256;

struct Piece {
  const char *from;
  char *to;
  int rows, columns;        // of what is given
  int all_rows, all_columns;  // of what is written: zeros beyond what is given
  int first_block, is_log_rate;  // is_log_rate: -exp(x) is written
};
struct Pieces {
  Piece piece[MAX_PIECES];
  int count, from_kind, to_kind[MAX_PIECES];  // kinds: 0 float32, 1 bfloat16, 2 float16
};

__device__ __forceinline__ float read(const char *p, i64 i, int kind) {
  if (kind == 0) return ((const float *)p)[i];
  const u32 v = ((const unsigned short *)p)[i];
  return kind == 1 ? Bf16::first(v) : Fp16::first(v);
}
__device__ __forceinline__ void write(char *p, i64 i, int kind, float v) {
  if (kind == 0)
    ((float *)p)[i] = v;
  else
    ((unsigned short *)p)[i] = (unsigned short)(kind == 1 ? Bf16::pack(v, 0.f) : Fp16::pack(v, 0.f));
}

extern "C" __global__ void __launch_bounds__(THREADS) pack_kernel_all(const __grid_constant__ Pieces p) {
  int i = 0;
  while (i + 1 < p.count && (int)blockIdx.x >= p.piece[i + 1].first_block) i++;
  const Piece &piece = p.piece[i];
  const i64 at = (i64)(blockIdx.x - piece.first_block) * THREADS + threadIdx.x;
  const int row = (int)(at / piece.all_columns), column = (int)(at - (i64)row * piece.all_columns);
  if (row >= piece.all_rows) return;
  float v = 0.f;
  if (row < piece.rows && column < piece.columns) {
    v = read(piece.from, (i64)row * piece.columns + column, p.from_kind);
    if (piece.is_log_rate) v = -expf(v);
  }
  write(piece.to, at, p.to_kind[i], v);
}
